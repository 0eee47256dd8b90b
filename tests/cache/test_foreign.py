"""Whatever a foreign library raises becomes one error of ours; the system's failures do not."""

import errno

import pytest

from cache.errors import CorruptShardError, StageError
from cache.foreign import MAX_DETAIL, naming_failures, one_line, reading_foreign_file


class PanicError(BaseException):
    """What Rust's panics are in Python: no Exception."""


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
    [
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        KeyboardInterrupt(),
        SystemExit(3),
        CorruptShardError("ours"),
    ],
)
def test_failures_of_the_system_interrupts_and_errors_of_ours_pass(raised):
    with pytest.raises(type(raised)) as found, reading_foreign_file(refuse):
        raise raised
    assert found.value is raised


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (OSError(errno.EIO, "Error reading bytes"), errno.EIO),
        (RuntimeError("file read failed: errno = 5, error message = 'x'"), errno.EIO),
        (OSError("Can't read data (file read failed: errno = 5, ...)"), errno.EIO),
        (FileNotFoundError(errno.ENOENT, "No such file"), errno.ENOENT),
    ],
)
def test_a_failure_of_the_system_names_the_file(tmp_path, raised, number):
    with pytest.raises(OSError, match=str(tmp_path)) as found, naming_failures(tmp_path):
        raise raised
    assert (found.value.errno, found.value.filename) == (number, str(tmp_path))


@pytest.mark.parametrize(
    "raised",
    [
        OSError("file signature not found"),
        OSError(errno.EINVAL, "Invalid argument"),
        RuntimeError("wrong version number, errno = 0"),
        ValueError("x"),
        CorruptShardError("ours, errno = 5"),
    ],
)
def test_damage_stays_what_it_is(tmp_path, raised):
    with pytest.raises(type(raised)) as found, naming_failures(tmp_path):
        raise raised
    assert found.value is raised


def test_a_long_text_is_cut():
    assert one_line("x " * MAX_DETAIL).endswith("...")
    assert len(one_line("x" * 10 * MAX_DETAIL)) == MAX_DETAIL + 3
