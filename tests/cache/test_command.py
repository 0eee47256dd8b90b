import subprocess
import sys

import pytest

STAGE = """
\"\"\"A stage.\"\"\"
import os, signal, sys
from cache.command import run_stage
from cache.errors import MissingImageError, SettingsError, StageError

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
    assert "no settings file that can be read" in missing.stderr
