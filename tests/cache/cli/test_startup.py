"""Messages of a command that ends during its imports."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMANDS = [
    "cache.verify",
    "pipeline.extract",
    "train.pretrain",
    "eval.evaluate",
    "demo.world",
    "bench.read",
]


FIRST = ("fsspec", "h5py", "numpy", "pyarrow", "requests", "ruamel", "torch", "tqdm", "xxhash")
"""Packages of the environment, one of which a command imports first."""


def write_first(folder, text):
    """Put a module in the place of the first package that a command imports."""
    for package in FIRST:
        (folder / f"{package}.py").write_text(text)


def call(name, tmp_path, *, isolated=True, **environment):
    """Call a command, without or with the packages of the environment."""
    flags = ["-S"] if isolated else []
    return subprocess.run(
        [sys.executable, *flags, "-m", name],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PATH": os.environ["PATH"]}
        | environment,
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
    write_first(tmp_path, fault)
    failed = call("cache.verify", tmp_path)
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr


HELD_UP = "import signal\n{before}\nsignal.raise_signal(signal.{name})\nprint('went on')\nexit()"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_during_the_imports_is_one_line(tmp_path, command, name):
    write_first(tmp_path, HELD_UP.format(name=name, before=""))
    stopped = call(command, tmp_path)
    assert stopped.returncode == 130
    assert stopped.stdout == ""
    assert stopped.stderr == "error: interrupted; run the same command again\n"


def test_an_import_that_catches_everything_does_not_go_on(tmp_path):
    held = "import signal\ntry: signal.raise_signal(signal.SIGTERM)\nexcept BaseException: pass"
    write_first(tmp_path, held)
    assert call("cache.verify", tmp_path).returncode == 130


def test_a_signal_ends_an_import_that_waits(tmp_path):
    write_first(tmp_path, "import time; print(flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-S", "-m", "cache.verify"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.terminate()
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr == b"error: interrupted; run the same command again\n"


def test_signals_that_the_caller_ignores_stay_ignored_during_the_imports(tmp_path):
    before = "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN"
    write_first(tmp_path, HELD_UP.format(name="SIGHUP", before=before))
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert call("cache.verify", tmp_path).stdout == "went on\n"
    finally:
        signal.signal(signal.SIGHUP, usual)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("given", "used"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_idle_openmp_threads_of_a_command_do_not_spin(tmp_path, command, given, used):
    write_first(tmp_path, "import os\nprint(os.environ['GOMP_SPINCOUNT'])\nexit()")
    assert call(command, tmp_path, **given).stdout == f"{used}\n"


def test_a_program_that_imports_the_package_keeps_its_hook_and_signals():
    code = (
        "import signal, sys; now = lambda: [sys.excepthook, *map(signal.getsignal, (1, 2, 15))]; "
        "before = now(); import cache, cache.cli.command; assert now() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
