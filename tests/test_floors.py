"""The order of the rooms: imports go down only, kernels stay in ops/, the package imports with nothing installed."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import childtune_kernels

PACKAGE = Path(childtune_kernels.__file__).resolve().parent
FLOORS = [
    {"philox", "files", "names", "errors"},
    {"ops"},
    {"selection"},
    {"mask"},
    {"fisher", "delta", "optim"},
    {"distributed", "baselines", "measure"},
    {"hf"},
    {"experiments"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))
SCRIPTS = sorted(p for folder in ("benchmarks", "examples") for p in (PACKAGE.parent / folder).glob("*.py"))
OPTIONAL = ("triton", "sklearn", "matplotlib", "transformers")


def room_of(file: Path) -> str:
    return file.parts[0] if len(file.parts) > 1 else file.stem


def imported_modules(file: Path) -> set[str]:
    """Every absolute module name that a file imports, anywhere in it; ``from . import x`` gives the module x."""
    package = ["childtune_kernels", *file.parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names.add(prefix)
            names.update(f"{prefix}.{alias.name}" for alias in node.names)
    return names


def imported_rooms(file: Path) -> set[str]:
    parts = [name.split(".") for name in imported_modules(file)]
    return {p[1] for p in parts if p[0] == "childtune_kernels" and len(p) > 1 and p[1] in FLOOR_OF}


def test_the_walk_sees_relative_and_absolute_imports():
    assert {"philox", "ops", "mask"} <= imported_rooms(Path("optim/adamw.py"))
    assert "mask" in imported_rooms(Path("delta.py")) and "philox" in imported_rooms(Path("ops/reference/bits.py"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down_only(file):
    room = room_of(file)
    assert room in FLOOR_OF, f"{file} has no floor: say which in FLOORS"
    for other in imported_rooms(file) - {room}:
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{file} on floor {FLOOR_OF[room]} imports {other}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_triton_is_imported_by_its_own_files_only(file):
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    at_top = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    at_top |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    anywhere = any(name.split(".")[0] == "triton" for name in imported_modules(file))
    if file.parts[:2] == ("ops", "triton"):
        return  # loaded only when the implementation is asked for; test_cold_import checks that
    assert not any(name.split(".")[0] == "triton" for name in at_top)
    inside_a_function = file == Path("ops/registry.py") or room_of(file) in (
        "cli",
        "measure",
    )  # versions, compile counts
    assert not anywhere or inside_a_function


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) != "ops"], ids=str)
def test_kernels_are_known_to_ops_only(file):
    assert "torch.ops.childtune" not in (PACKAGE / file).read_text(encoding="utf-8")
    below = {name for name in imported_modules(file) if re.search(r"\.ops\.(triton|csrc|reference)", name)}
    assert not below, f"{file} reaches into ops: {below}"


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) == "ops"], ids=str)
def test_no_autotune_on_kernels_that_write_their_inputs(file):
    names = {n.attr for n in ast.walk(ast.parse((PACKAGE / file).read_text())) if isinstance(n, ast.Attribute)}
    names |= {n.id for n in ast.walk(ast.parse((PACKAGE / file).read_text())) if isinstance(n, ast.Name)}
    assert "autotune" not in names and not any("autotune" in name for name in imported_modules(file))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda p: p.name)
def test_scripts_use_public_names_only(file):
    """They are what others copy from; what several of them or a command need is in measure/ or experiments/."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = imported_modules(file)
    names = {part for name in imported for part in name.split(".")}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {name for name in names if re.match("_[^_]", name)}
    assert not {name for name in imported if name.startswith("childtune_kernels.cli")}
    if file.name.startswith("bench_"):  # measure.results.main has the one command line
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert "argparse" not in names and "main" not in defined


def test_csrc_keeps_to_the_stable_abi():
    sources = [p for p in (PACKAGE.parent / "csrc").rglob("*") if p.suffix in {".cpp", ".cu", ".cuh", ".h", ".hpp"}]
    if not sources:
        pytest.skip("an installed package has no sources")
    for source in sources:
        if source.parent.name == "python":  # reads lists of tensors, which needs torch's own ABI: see setup.py
            continue
        text = source.read_text(encoding="utf-8")
        for banned in ("<ATen", '"ATen', "at::", "<c10/", '"c10/', "pybind", "TORCH_LIBRARY_FRAGMENT(", "m.def("):
            assert banned not in text.replace("STABLE_TORCH_LIBRARY", ""), f"{source.name} has {banned}"


BLOCKER = "import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"  # None: importing it raises
TRAIN = """
import torch, childtune_kernels as ck
w = torch.nn.Parameter(torch.ones(70))
w.grad = torch.ones(70)
opt = ck.ChildAdamW([("w", w)], reserve_p=0.5)
opt.step()
assert (w < 1).all() and 0 < opt.mask_at(1, "w").sum() < 70
assert (opt.state[w]["exp_avg"] != 0).equal(opt.mask_at(1, "w"))
"""


def _run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert done.returncode == 0, done.stderr


def test_cold_import_and_step_with_every_optional_package_blocked():
    _run(BLOCKER.format(blocked=OPTIONAL) + TRAIN)


def test_import_loads_no_optional_package():
    _run(
        "import torch, sys\nbefore = set(sys.modules)\nimport childtune_kernels\n"
        "loaded = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        f"assert not loaded & set({OPTIONAL!r}), loaded"
    )


def test_public_names():
    assert childtune_kernels.__all__ == sorted(childtune_kernels.__all__)
    for name in childtune_kernels.__all__:
        assert getattr(childtune_kernels, name) is not None and not name.startswith("_")
    for file in FILES:
        if file.name == "__init__.py":
            module = importlib.import_module(".".join(["childtune_kernels", *file.parts[:-1]]))
            for name in getattr(module, "__all__", ()):
                assert hasattr(module, name), f"{module.__name__}.{name}"
