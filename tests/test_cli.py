"""The `childtune` command itself: what it imports, and what it says to no command and to a wrong one."""

import subprocess
import sys

import pytest

from childtune_kernels.cli import main


def test_a_command_imports_only_what_it_needs():
    code = (
        "import sys; from childtune_kernels.cli import main; main(['doctor']);"
        "ours = {'cli.demo', 'cli.bench', 'measure.results', 'experiments'};"
        "heavy = {'sklearn', 'scipy', 'matplotlib', *(f'childtune_kernels.{name}' for name in ours)};"
        "loaded = heavy & sys.modules.keys(); sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_command_and_no_such_command(capsys):
    for argv in ([], ["dmeo"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert "demo" in capsys.readouterr().err


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "childtune_kernels", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "childtune_kernels")
