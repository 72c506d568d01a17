"""The doctor: right about healthy installations, and alive on broken ones."""

import argparse
import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import tandem_attn
from tandem_attn import doctor

PACKAGE = pathlib.Path(tandem_attn.__file__).parent


def run_doctor(*options: str, **variables: str) -> subprocess.CompletedProcess:
    """`tandem-attn doctor` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "tandem_attn", "doctor", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def break_package(folder: pathlib.Path, name: str, error: str) -> dict[str, str]:
    """Variables under which importing a package raises."""
    broken = folder / name
    broken.mkdir()
    (broken / "__init__.py").write_text(f"raise {error}\n")
    return {"PYTHONPATH": str(folder)}


def test_it_imports_the_standard_library_only():
    tree = ast.parse(pathlib.Path(doctor.__file__).read_text())
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.partition(".")[0] in sys.stdlib_module_names


@pytest.fixture(scope="module")
def healthy():
    return run_doctor("--json")


def test_a_healthy_installation(healthy):
    assert healthy.returncode == 0, healthy.stderr
    found = json.loads(healthy.stdout)
    assert found["ok"] is True
    assert found["tandem_attn"]["version"] == tandem_attn.__version__
    assert found["torch"]["version"] == torch.__version__
    assert found["answer"]["right"] is True
    backend = found["backend"]
    assert backend["answered by"] in ("gluon", "torch")
    assert set(backend["not by"]) == {"gluon", "torch", "reference"} - {backend["answered by"]}
    assert all(backend["not by"].values()), "each other backend has a reason"
    assert found["cache"]["path"]


def test_the_text_holds_all_the_facts(healthy):
    found = json.loads(healthy.stdout)
    lines = doctor.text(found).splitlines()
    assert lines[-1].startswith("ok")
    for name in doctor.PROBES:
        assert name in lines
    assert any(tandem_attn.__version__ in line for line in lines)
    assert any(found["backend"]["how"] in line for line in lines)
    assert doctor.text(found | {"ok": False}).splitlines()[-1].startswith("NOT OK")


@pytest.mark.parametrize("error", ["ImportError('undefined symbol: zork')", "OSError('libcudart zork')"])
def test_a_torch_that_cannot_be_imported(tmp_path, error):
    done = run_doctor("--json", **break_package(tmp_path, "torch", error))
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["ok"] is False
    for probe in ("torch", "backend", "answer"):
        assert "zork" in found[probe]["error"]
    assert found["system"]["python"]
    assert "path" in found["cache"]
    assert done.stderr == ""


def test_a_triton_that_cannot_be_imported(tmp_path, monkeypatch):
    """Torch imports triton only for what needs it, and so do we."""
    variables = break_package(tmp_path, "triton", "ImportError('libtriton zork')")
    done = run_doctor(**variables)
    assert "cannot be imported: ImportError: libtriton zork" in done.stdout
    gpu = torch.cuda.is_available()
    assert done.returncode == 0 or gpu, done.stdout


def test_a_backend_that_answers_wrong(monkeypatch):
    right = tandem_attn.flash_attn_func

    def wrong(*args, **kwargs):
        return right(*args, **kwargs | {"causal": False})

    monkeypatch.setattr(tandem_attn, "flash_attn_func", wrong)
    found = doctor.examine()
    assert found["answer"]["right"] is False
    assert found["ok"] is False
    assert doctor.run(argparse.Namespace(json=True)) == 1


@pytest.mark.parametrize("damage", ["out", "lse"])
def test_nan_is_not_right(monkeypatch, damage):
    right = tandem_attn.flash_attn_func

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        (out if damage == "out" else lse)[0, 1, 0] = float("nan")
        return out, lse

    monkeypatch.setattr(tandem_attn, "flash_attn_func", wrong)
    assert doctor.examine()["answer"]["right"] is False


def test_a_backend_that_is_not_there(monkeypatch):
    from tandem_attn import ops

    monkeypatch.setenv("TANDEM_BACKEND", "zork")
    ops.clear_plans()
    found = doctor.examine()
    assert not found["ok"]
    assert "supported: gluon" in found["answer"]["error"]


def test_variables_are_shown_and_unknown_ones_doubted(monkeypatch):
    monkeypatch.setenv("TANDEM_BACKENT", "torch")
    monkeypatch.setenv("TANDEM_BACKEND", "reference")
    found = doctor.examine()
    assert found["variables"]["TANDEM_BACKENT"] == "torch"
    assert found["backend"]["answered by"] == "reference"
    doubts = [said for said in found["warnings"] if said.startswith("variables")]
    assert any("nothing reads TANDEM_BACKENT" in said for said in doubts)
    assert any("every question to reference" in said for said in doubts)


def test_known_variables_are_those_the_library_reads():
    read = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name != "doctor.py":
            read |= set(re.findall(r"environ(?:\.get)?[\[(]\"(TANDEM_\w+)", path.read_text()))
    assert read == set(doctor.KNOWN_VARIABLES)


def fake_ptxas(path: pathlib.Path, release: str, version: str) -> pathlib.Path:
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{version}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "release, warned", [("12.9", True), ("13.2", True), ("13.3", False), ("14.0", False)]
)
def test_old_assemblers_are_warned_about(tmp_path, monkeypatch, release, warned):
    path = fake_ptxas(tmp_path / "ptxas", release, f"{release}.86")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(path))
    found = doctor.examine()
    assert found["ptxas"] == {"version": f"{release}.86", "path": str(path)}
    assert any("11781" in said for said in found["warnings"]) is warned


def test_an_assembler_that_does_not_run(tmp_path, monkeypatch):
    """As Triton does: the next candidate, but not in silence."""
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "gone"))
    found = doctor._ptxas()
    assert any("gone does not run" in said for said in found["warnings"])
    assert "gone" not in found.get("path", "")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor._ptxas()["error"] == "there is none"


def test_where_kernels_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert doctor._cache()["path"] == str(tmp_path / ".triton" / "cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "here"))
    found = doctor._cache()
    assert (found["path"], found["exists"]) == (str(tmp_path / "here"), False)
    assert found["warnings"] == []
    monkeypatch.setattr(doctor, "file_system", lambda path: "nfs4")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: argparse.Namespace(free=2**20))
    warnings = doctor._cache()["warnings"]
    assert any("nfs4" in said for said in warnings)
    assert any("0.00 GiB" in said for said in warnings)


def test_file_systems_by_the_longest_mount(tmp_path):
    inner = tmp_path / "a b" / "c"
    inner.mkdir(parents=True)
    mounts = tmp_path / "mounts"
    spaced = str(tmp_path / "a b").replace(" ", "\\040")
    mounts.write_text(
        f"none / ext4 rw 0 0\nhost:/x {spaced} nfs4 rw 0 0\nnone {tmp_path}/other tmpfs rw 0 0\n"
    )
    assert doctor.file_system(inner, str(mounts)) == "nfs4"
    assert doctor.file_system(tmp_path, str(mounts)) == "ext4"
    assert doctor.file_system(tmp_path, str(tmp_path / "none")) == "unknown"
