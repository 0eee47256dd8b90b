import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from workspace.stage import run_stage

STAGE = """
\"\"\"A stage.\"\"\"
import os, signal, sys
from workspace.stage import run_stage
from cache.errors import MissingImageError, SettingsError
from workspace.errors import StageError

def stage(params):
    {body}

run_stage(stage, __doc__)
"""


def command(tmp_path, body, *arguments):
    (tmp_path / "params.yaml").write_text("seed: 5\n")
    return subprocess.run(
        [sys.executable, "-c", STAGE.format(body=body), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def run(tmp_path, body):
    return command(tmp_path, body, "--params", str(tmp_path / "params.yaml"))


def test_a_stage_gets_the_settings_it_was_named(tmp_path):
    done = run(tmp_path, "print(params.seed())")
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("raise StageError('no images')", 1, "error: no images\n"),
        ("raise SettingsError('no key')", 2, "error: no key\n"),
        ("raise MissingImageError('image 3')", 1, "error: image 3\n"),
        (
            "raise MemoryError('no 9\\nGiB')",
            1,
            "error: out of memory: no 9 GiB Lower micro_batch_tokens or batch_size of the stage's "
            "settings, or end other programs.\n",
        ),
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory.')",
            1,
            "error: out of memory: CUDA out of memory. Lower micro_batch_tokens or batch_size of "
            "the stage's settings, or end other programs.\n",
        ),
        ("open('/none/none')", 1, "error: [Errno 2] No such file or directory: '/none/none'\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(tmp_path, body, code, text):
    failed = run(tmp_path, body)
    assert (failed.returncode, failed.stderr) == (code, text)


def test_a_path_that_is_no_text_can_be_printed(tmp_path):
    done = run(tmp_path, "print(chr(0xDCFF)); raise StageError(chr(0xDCFE))")
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("\\udcff\n", "error: \\udcfe\n")


def test_a_mistake_of_ours_is_not_hidden(tmp_path):
    failed = run(tmp_path, "raise AssertionError('a bug')")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_leaves_by_the_front_door(tmp_path, name):
    body = f"os.kill(os.getpid(), signal.{name}); signal.pause()"
    stopped = run(tmp_path, body)
    assert stopped.returncode == 130
    assert stopped.stderr.startswith("error: interrupted")
    assert "Traceback" not in stopped.stderr


def test_wrong_calls_end_with_2(tmp_path):
    assert command(tmp_path, "pass", "--none").returncode == 2
    missing = command(tmp_path, "pass", "--params", str(tmp_path / "none.yaml"))
    assert missing.returncode == 2
    assert "no such settings file" in missing.stderr


@pytest.mark.parametrize(
    "body", ["print('x' * 10**6)", "print('x')", "print('x'); sys.stdout.flush()"]
)
def test_a_reader_that_leaves_is_no_error(tmp_path, body):
    (tmp_path / "params.yaml").write_text("seed: 5\n")
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-c", STAGE.format(body=body), "--params", tmp_path / "params.yaml"],
            stdout=gone,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    (tmp_path / "params.yaml").write_text("seed: 5\n")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                STAGE.format(body="print('x')"),
                "--params",
                tmp_path / "params.yaml",
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def help_into(stdout):
    return subprocess.run(
        [sys.executable, "-c", STAGE.format(body="pass"), "--help"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def test_help_that_nobody_reads_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = help_into(gone)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_into_a_full_disk_is_one_line():
    with Path("/dev/full").open("wb") as full:
        done = help_into(full)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_another_broken_pipe_is_an_error(tmp_path):
    failed = run(tmp_path, "raise BrokenPipeError(32, 'Broken pipe')")
    assert (failed.returncode, failed.stderr) == (1, "error: [Errno 32] Broken pipe\n")


def test_an_error_stays_one_line_whatever_it_names(tmp_path):
    failed = run(tmp_path, "raise StageError('a\\nb\\x1b[2J')")
    assert failed.stderr == "error: a\\nb\\x1b[2J\n"


ROOT = Path(__file__).parents[3]
COMMANDS = sorted(
    f"{path.parent.name}.{path.stem}"
    for folder in ("cache", "workspace", "pipeline", "train", "eval", "demo")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
    if path.name not in ("command.py",)
)


def test_every_command_has_the_same_frame():
    for folder in ("cache", "workspace", "pipeline", "train", "eval", "demo", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            if path != ROOT / "cache/cli/command.py":
                assert "ArgumentParser(" not in text, path
            if '== "__main__"' in text and path.stem != "command":
                assert re.search("run_guarded|run_stage|run_benchmark", text), path


def test_commands_were_found():
    assert {"pipeline.extract", "cache.verify", "eval.compare", "demo.world"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_how_a_command_is_called(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    spec = module.__spec__
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    main = getattr(module, "main", None)
    with pytest.raises(SystemExit) as ended:
        main() if main else run_stage(getattr(module, name.partition(".")[2]), module.__doc__)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {name} ")
