"""Compiling with every supported Triton, for tests/test_compile.py and its like for decode and backward.

Other Tritons than the installed one are found in VENV/triton-X.Y.Z, where tools/triton_matrix.sh puts them.
Results are kept in pytest's cache under a digest of all sources that matter: an edit compiles everything
again, nothing else does.

    TANDEM_TRITON_MATRIX=0   the installed Triton only
    TANDEM_COMPILE_JOBS=1    fewer processes than cores
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest

import tandem_attn

PACKAGE = pathlib.Path(tandem_attn.__file__).parent
TOOLS = PACKAGE.parents[1] / "tools"
INSTALLED = importlib.metadata.version("triton").partition("+")[0]
SUPPORTED = dict(
    line.split() for line in (TOOLS / "tritons.txt").read_text().splitlines()
)  # version: oldest Python
JOBS = int(os.environ.get("TANDEM_COMPILE_JOBS") or os.cpu_count())


def why_missing(version: str) -> str:
    """Why this Triton is not there; empty if it is."""
    if version == INSTALLED:
        return ""
    if os.environ.get("TANDEM_TRITON_MATRIX") == "0":
        return "TANDEM_TRITON_MATRIX=0"
    if (where(version) / "triton").is_dir():
        return ""
    oldest = tuple(map(int, SUPPORTED[version].split(".")))
    if sys.version_info[:2] < oldest:
        return f"needs Python {SUPPORTED[version]}"
    failed = where(version).with_suffix(where(version).suffix + ".failed")
    said = failed.read_text().strip().splitlines()[-1:] if failed.exists() else []
    return said[0] if said else f"not in {where(version)}: run tools/triton_matrix.sh"


def where(version: str) -> pathlib.Path:
    return pathlib.Path(sys.prefix, f"triton-{version}")


def cases(names_for):
    """(version, name) of everything to compile; versions that are missing are one skipped case.

    names_for: a function from a version to names.
    """
    for version in dict.fromkeys([INSTALLED, *SUPPORTED]):
        missing = why_missing(version)
        if missing:
            skip = pytest.mark.skip(reason=f"Triton {version}: {missing}")
            yield pytest.param(version, next(iter(names_for(version))), marks=skip, id=version)
            continue
        for name in names_for(version):
            yield pytest.param(version, name, id=f"{version}-{name}")


class Compiled:
    """Reports, as plain data, of tandem_attn.testing.MODULE, which also depends on `sources` beside it."""

    def __init__(self, request, tmp_path_factory, module: str, sources: tuple[str, ...]):
        self.module, self.request, self.tmp = module, request, tmp_path_factory
        self.known: dict[str, dict] = {}
        files = [*sorted(PACKAGE.glob("device/*.py")), *sorted(PACKAGE.glob("kernels/*.py"))]
        files += [PACKAGE / "testing" / f"{name}.py" for name in (module, *sources)]
        self.digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
        cache = getattr(request.config, "cache", None)
        name = {"compile": "compiled"}.get(module, module)
        self.folder = cache.mkdir(name) if cache else tmp_path_factory.mktemp(name)

    def report(self, version: str, name: str) -> dict:
        """When first asked, it compiles all that this session's tests want of a version."""
        kept = self.folder / f"{version}-{self.digest}.json"
        if version not in self.known:
            self.known[version] = json.loads(kept.read_text()) if kept.exists() else {}
        fields = self.known[version]
        if name not in fields:
            wanted = self._wanted(version) | {name}
            fields |= self._compile(version, sorted(wanted - set(fields)))
            for old in self.folder.glob(f"{version}-*.json"):
                old.unlink()
            kept.write_text(json.dumps(fields))
        if "error" in fields[name]:
            pytest.fail(f"Triton {version} does not compile {name}:\n{fields[name]['error']}")
        return fields[name]

    def _wanted(self, version: str) -> set[str]:
        """Names in tests/test_MODULE.py."""
        mine = (i for i in self.request.session.items if i.path.stem == f"test_{self.module}")
        params = [i.callspec.params for i in mine if hasattr(i, "callspec")]
        return {p["name"] for p in params if p.get("version") == version}

    def _compile(self, version: str, names: list[str]) -> dict:
        """Reports of these kernels by another interpreter, which sees that Triton first."""
        terminal = self.request.config.pluginmanager.get_plugin("terminalreporter")
        if terminal:
            terminal.write_line(f"\ncompiling {len(names)} kernels with Triton {version}, {JOBS} at a time")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "TANDEM_"))}
        if version != INSTALLED:
            environment["PYTHONPATH"] = os.pathsep.join(
                [str(where(version)), environment.get("PYTHONPATH", "")]
            )
        out = self.tmp.mktemp("reports") / f"{version}.json"
        command = [sys.executable, "-m", f"tandem_attn.testing.{self.module}"]
        command += ["--jobs", str(JOBS), "--out", out, *names]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out.parent)
        assert out.exists(), f"{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
        assert run.stdout.startswith(f"triton {version}"), f"another Triton: {run.stdout[:100]}"
        return json.loads(out.read_text())
