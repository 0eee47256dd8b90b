"""All errors of libraries become one error of the project, except failures of the system."""

import errno
import re
from pathlib import Path

import pytest
from safetensors import SafetensorError

from cache.errors import CorruptShardError
from cache.files.foreign import reading_foreign_file, writing_foreign_file
from workspace.errors import StageError

A = Path("a file")


class PanicError(BaseException):
    """Like a panic of Rust, a BaseException but no Exception."""


def refuse(detail):
    return StageError(f"file: {detail}")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ValueError("not\n what  it was"), "file: not what it was"),
        (KeyError("gelu"), "file: KeyError: 'gelu'"),
        (IndexError(), "file: IndexError"),
        (OSError("file signature not found"), "file: file signature not found"),
        (PanicError("no entry found for key"), "file: PanicError: no entry found for key"),
        (RecursionError("too deep"), "file: too deep"),
        (OSError(errno.EINVAL, "Invalid argument"), "file: [Errno 22] Invalid argument"),
        (MemoryError(), "file: MemoryError"),
    ],
)
def test_anything_raised_becomes_one_line_of_ours(raised, said):
    with pytest.raises(StageError) as found, reading_foreign_file(refuse):
        raise raised
    assert str(found.value) == said


@pytest.mark.parametrize(
    "raised",
    [KeyboardInterrupt(), SystemExit(3), CorruptShardError("ours"), CorruptShardError("errno = 5")],
)
def test_interrupts_and_errors_of_ours_pass(raised):
    with pytest.raises(type(raised)) as found, reading_foreign_file(refuse):
        raise raised
    assert found.value is raised


FAILURES = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EIO, "Unable to open file (file read failed: time = Sat\n, errno = 5, error)"),
    ValueError("Unable to open group (file read failed: time = Sat\n, errno = 5, error message"),
    RuntimeError("Can't decrement id ref count (file write failed: errno = 5, error message = 'I"),
    OSError("[Errno 5] Error reading bytes from file. Detail: [errno 5] Input/output error"),
    SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"),
    Exception("Input/output error (os error 5)"),
]
"""An input/output error in the words of Python, HDF5, Arrow, safetensors and tokenizers."""


@pytest.mark.parametrize("raised", FAILURES)
def test_failures_of_the_system_are_in_its_own_words_whoever_met_them(raised):
    for guard in (reading_foreign_file(refuse), writing_foreign_file(A)):
        with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error") as found, guard:
            raise raised
        assert found.value.errno == errno.EIO
    assert str(found.value).endswith(": 'a file'")


def test_a_missing_file_is_refused_and_a_path_is_added_to_a_failure():
    missing = FileNotFoundError(errno.ENOENT, "Failed to open local file 'b'. Detail: no")
    with pytest.raises(StageError) as found, reading_foreign_file(refuse):
        raise missing
    assert str(found.value) == "file: [Errno 2] No such file or directory"
    with pytest.raises(OSError, match=r"error: 'a file'$"), reading_foreign_file(refuse, A):
        raise OSError(errno.EIO, "Error reading bytes from file")


def test_a_failure_keeps_the_name_of_its_file_and_its_class():
    with pytest.raises(PermissionError, match=r"Permission denied: 'b'"), writing_foreign_file(A):
        raise PermissionError(errno.EACCES, "no", "b")
    with pytest.raises(OSError, match=r"device: 'target'$"), writing_foreign_file(A):
        raise OSError(errno.ENOSPC, "No space left on device", "source", None, "target")


@pytest.mark.parametrize("text", ["errno = 0", "os error", "errno = 12345", "shape [5]"])
def test_other_errors_pass_unchanged(text):
    raised = ValueError(text)
    with pytest.raises(StageError), reading_foreign_file(refuse):
        raise raised
    with pytest.raises(ValueError, match=re.escape(text)) as found, writing_foreign_file(A):
        raise raised
    assert found.value is raised
