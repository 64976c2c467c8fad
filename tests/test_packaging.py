"""What is shipped: a source distribution that can test itself, a quiet installation, and a record of the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from childtune_kernels.cli import doctor, main

ROOT = Path(__file__).resolve().parent.parent
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|childtune_kernels\.egg-info/.*")

pytest.importorskip("setuptools", "77")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: a source distribution has nothing to be compared with")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    copy = tmp_path_factory.mktemp("tree")
    for name in filter(None, listed):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def setup(tree: Path, *commands: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CHILDTUNE_BUILD_EXT": "0"}
    line = [sys.executable, "setup.py", "-q", *commands]
    return subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True, check=True)


def test_the_source_distribution_is_what_git_tracks(tree, tmp_path):
    """No less, so that it runs its own tests, and no more."""
    tracked = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    setup(tree, "sdist", "--dist-dir", str(tmp_path))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {name for name in names if not GENERATED.fullmatch(name)} == tracked


def test_a_build_leaves_its_reasons_where_doctor_finds_them(tree, tmp_path, monkeypatch, capsys):
    """pip shows no output of a build, so the package itself carries what was left out and why."""
    setup(tree, "build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib"))
    record = tmp_path / "lib" / "childtune_kernels" / "_build.txt"
    monkeypatch.setattr(doctor, "BUILT", record)
    assert main(["doctor"]) == 0
    assert "build of csrc      csrc is not built (CHILDTUNE_BUILD_EXT=0)" in capsys.readouterr().out
    record.unlink()
    assert main(["doctor"]) == 0
    assert "build of csrc      no record" in capsys.readouterr().out


def test_doctor_says_how_to_get_what_is_faster():
    assert doctor.faster_than("csrc", "cpu") == doctor.faster_than("triton", "cuda") == ""
    assert "pip install --no-build-isolation ." in doctor.faster_than("reference", "cpu")
    assert "childtune_kernels[triton]" in doctor.faster_than("csrc", "cuda")
    assert "childtune_kernels[triton]" not in doctor.faster_than("reference", "cpu")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_installation_is_quiet(tree, target):
    """make says in a line of its own what it is about to install; pip speaks only of what goes wrong."""
    done = subprocess.run(["make", "-n", f".venv/.{target}"], cwd=tree, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    installs = [i for i, line in enumerate(lines) if "pip install" in line]
    assert len(installs) == 2 and all("--quiet" in lines[i] for i in installs)
    assert sum(line.startswith("echo ") for line in lines) == 2
    with open(tree / "Makefile") as makefile:
        recipes = [line.strip() for line in makefile if line.startswith("\t$(PIP_INSTALL)")]
    assert not [line for line in recipes if "ruff" not in line], "make prints these lines themselves"
