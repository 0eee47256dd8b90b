"""What a command says before it has begun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ["cache.verify", "pipeline.extract", "train.pretrain", "eval.evaluate", "demo.world"]


def call(name, tmp_path, *, isolated=True, code=0):
    """Call a command, without or with the packages of the environment."""
    flags = ["-S"] if isolated else []
    return subprocess.run(
        [sys.executable, *flags, "-m", name],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_without_the_environment_one_line_says_how_to_have_it(tmp_path, name):
    failed = call(name, tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: the Python package ")
    assert "source .venv/bin/activate" in failed.stderr


@pytest.mark.parametrize(
    "fault",
    ["import cache.none", "from os import none", "import xml.none", "raise AssertionError"],
)
def test_a_mistake_of_ours_is_not_hidden(tmp_path, fault):
    (tmp_path / "numpy.py").write_text(fault)
    failed = call("cache.verify", tmp_path)
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr


def test_an_interrupt_of_the_imports_is_one_line(tmp_path):
    (tmp_path / "numpy.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    stopped = call("cache.verify", tmp_path)
    assert stopped.returncode in (130, -signal.SIGINT)
    assert stopped.stderr == "error: interrupted; run the same command again\n"


def test_who_imports_the_package_keeps_a_hook_of_his_own():
    code = "import sys; hook = sys.excepthook; import cache; assert sys.excepthook is hook"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
