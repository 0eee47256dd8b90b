"""The lock of a folder of the workspace is a stage's error where another process holds it."""

import subprocess
import sys
from pathlib import Path

import pytest

from workspace.errors import StageError
from workspace.locks import folder_lock

HOLDER = """
import sys
from pathlib import Path
from workspace.locks import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_process_holds_is_a_stage_error(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StageError, match="another process works in it"), folder_lock(tmp_path):
            pass
    with folder_lock(tmp_path):
        pass
