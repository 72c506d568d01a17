"""The architecture under test: who may import whom, how large things grow, and what documents name."""

import ast
import functools
import pathlib
import re

import pytest

import tandem_attn

PACKAGE = pathlib.Path(tandem_attn.__file__).parent
ROOT = PACKAGE.parents[1]
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))

MAX_FILE, MAX_FUNCTION, MAX_ARGUMENTS, MAX_KERNEL_ARGUMENTS, MAX_LINE = 500, 80, 12, 31, 110
# FlashAttention-3's signatures are not ours to shorten
FA3_SIGNATURES = {
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flash_attn_fp8_varlen_func",
    "get_scheduler_metadata",
}

# module or folder: what it may import from tandem_attn, inside functions too
LEAVES = {"spec", "spec_decode", "spec_quant", "spec_fp8", "quant", "arch"}
MAY_IMPORT = {
    "_version": set(),
    "spec": set(),
    "spec_decode": {"spec", "quant"},
    "check_decode": {"spec", "spec_decode", "spec_fp8"},
    "quant": {"spec"},
    "spec_quant": {"quant", "spec", "spec_decode", "check_decode"},
    "spec_fp8": {"quant", "spec"},
    "arch": set(),
    "log": set(),
    "device": {"device"},
    "kernels": {"kernels", "device", *LEAVES},
    "reference": LEAVES,
    "reference_decode": {"reference", *LEAVES},
    "reference_quant": {"reference", "reference_decode", *LEAVES},
    "reference_fp8": {"reference", *LEAVES},
    "torch_fused": {"reference", *LEAVES},
    "dispatch": {
        *("kernels", "torch_fused", "reference", "reference_decode", "reference_fp8", "reference_quant"),
        *LEAVES,
    },
    "ops": {"dispatch", "reference", "log", *LEAVES},
    "ops_decode": {"ops", "dispatch", "check_decode", "log", *LEAVES},
    "ops_fp8": {"ops", "dispatch", "log", *LEAVES},
    "api": {"ops", "ops_fp8", "dispatch", *LEAVES},
    "api_fp8": {"ops", "ops_fp8", *LEAVES},
    "api_decode": {"api", "ops_decode", "dispatch", "reference_decode", "check_decode", *LEAVES},
    "testing": {"testing", "kernels", "device", "__init__", *LEAVES},
    "__init__": {"api", "api_decode", "api_fp8", "cache", "_version"},
}
PUBLIC = {"__init__", "_version"}  # what everything above api uses, besides its own kind
ABOVE_API = {"bench", "cache", "cli", "demo", "doctor", "__main__", "distributed", "integrations"}


def owner(path: pathlib.Path) -> str:
    """spec.py -> spec, device/mask.py -> device."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@functools.cache
def parsed(path: pathlib.Path) -> ast.Module:
    """Several tests look at each module; none changes the tree."""
    return ast.parse(path.read_text())


def imports(tree: ast.AST, path: pathlib.Path):
    """(line, dotted name) of everything imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            if node.module == "tandem_attn":  # from tandem_attn import x
                yield from ((node.lineno, f"tandem_attn.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def parts_imported(path: pathlib.Path):
    """(line, part of the package) for each import of tandem_attn."""
    for line, name in imports(parsed(path), path):
        if name == "tandem_attn":
            yield line, "__init__"
        elif name.startswith("tandem_attn."):
            part = name.split(".")[1]
            yield line, part if part in MAY_IMPORT or part in ABOVE_API else "__init__"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_direction_of_imports(path):
    mine = owner(path)
    assert mine in MAY_IMPORT or mine in ABOVE_API, f"{path.name} has no place in the architecture yet"
    allowed = MAY_IMPORT.get(mine, PUBLIC | ABOVE_API | {"testing"})
    for line, part in parts_imported(path):
        assert part in allowed, f"{path.name}:{line} imports {part}; {mine} may import {sorted(allowed)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_device_and_kernels_know_triton(path):
    names = {name.partition(".")[0] for _, name in imports(parsed(path), path)}
    mine = owner(path)
    if mine == "device":
        assert not names & {"torch", "numpy"}, "device code sees numbers and descriptors, no tensors"
    if mine not in {"device", "kernels"} and not path.name.startswith("compile") and mine not in ABOVE_API:
        assert "triton" not in names


def test_kernels_are_imported_only_when_a_function_runs():
    """A top-level import would bring Triton to everyone who imports the package."""
    for path in MODULES:
        if owner(path) in {"kernels", "testing"}:
            continue
        top = ast.Module(body=[n for n in parsed(path).body if isinstance(n, (ast.Import, ast.ImportFrom))])
        for line, name in imports(top, path):
            heavy = name.startswith(("triton", "tandem_attn.kernels", "tandem_attn.device"))
            assert not heavy or owner(path) == "device", f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", MODULES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_size_caps(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE, f"{path.name} has {len(lines)} lines"
    for number, line in enumerate(lines, 1):
        assert len(line) <= MAX_LINE or "# fmt: skip" in line, f"{path.name}:{number} is {len(line)} long"
    for node in ast.walk(parsed(path)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = node.end_lineno - node.lineno + 1
        assert length <= MAX_FUNCTION, f"{path.name}:{node.lineno} {node.name} has {length} lines"
        count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
        kernel = owner(path) in {"kernels", "device"} if path in MODULES else False
        limit = MAX_KERNEL_ARGUMENTS if kernel and node.name in kernel_entries(path) else MAX_ARGUMENTS
        if node.name not in FA3_SIGNATURES:
            assert count <= limit, f"{path.name}:{node.lineno} {node.name} takes {count} arguments"


def kernel_entries(path: pathlib.Path) -> set[str]:
    """Jit functions that a launch starts: public, in kernels/."""
    tree = parsed(path)
    jitted = (
        n for n in tree.body if isinstance(n, ast.FunctionDef) and "jit" in map(_name, n.decorator_list)
    )
    return {n.name for n in jitted if not n.name.startswith("_") and owner(path) == "kernels"}


def _name(decorator: ast.expr) -> str:
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_assert_for_the_mistakes_of_users(path):
    """python -O removes asserts; validation lives in spec.py and check_decode.py and raises."""
    of_decode = {"spec_decode", "check_decode", "reference_decode", "ops_decode", "api_decode"}
    if owner(path) in {"spec", "api", "ops", "dispatch", "arch", "log", *of_decode}:
        assert not [n for n in ast.walk(parsed(path)) if isinstance(n, ast.Assert)]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_and_public_functions_have_docstrings(path):
    tree = parsed(path)
    if path.name != "_version.py" and tree.body:
        assert ast.get_docstring(tree), f"{path.name} does not say what it is"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}:{node.lineno} {node.name} has no docstring"


DOCUMENTS = sorted((ROOT / "docs").rglob("*.md")) + sorted(ROOT.glob("*.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_name_files_that_exist(path):
    for name in re.findall(r"`([\w./-]+\.(?:py|md|json|toml))`", path.read_text()):
        places = (ROOT / name, PACKAGE / name, ROOT / "src" / name, path.parent / name, ROOT / "tests" / name)
        assert any(place.exists() for place in places), f"{path.name} names {name}, which is gone"


def test_there_is_something_to_check():
    assert len(MODULES) > 20 and len(TESTS) > 6 and DOCUMENTS
