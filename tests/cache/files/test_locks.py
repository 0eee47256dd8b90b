"""A folder is locked by one process at a time, until that process ends."""

import errno
import fcntl
import multiprocessing
import os
import threading
import time

import pytest

from cache.errors import CacheError
from cache.files.locks import exclusive_lock


def hold(folder, ready, seconds):
    with exclusive_lock(folder, CacheError):
        # A worker of the holder, which a kill of the holder leaves behind.
        if os.fork() == 0:
            time.sleep(seconds)
            os._exit(0)
        ready.set()
        time.sleep(seconds)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_folder_is_for_one_process_until_that_one_ends_even_if_its_children_live(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "held", ready, 5))
    holder.start()
    assert ready.wait(30)
    with (
        pytest.raises(CacheError, match="another process works in it"),
        exclusive_lock(tmp_path / "held", CacheError),
    ):
        pass
    holder.kill()
    holder.join()
    with exclusive_lock(tmp_path / "held", CacheError):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_without_locks_it_warns_and_goes_on(tmp_path, monkeypatch, capsys, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    done = []
    with exclusive_lock(tmp_path / "held", CacheError):
        done.append(True)
    assert done
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"warning: {tmp_path / 'held'}: its file system has no locks (")
    assert err.count("\n") == 1


def test_another_failure_of_a_lock_is_not_taken_for_a_lack_of_locks(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.raises(OSError, match="Input/output error"),
        exclusive_lock(tmp_path / "held", CacheError),
    ):
        pytest.fail("went on")


def lock_in_a_thread(folder):
    """Return the error of a thread that asks for the lock, if any."""
    errors = []

    def ask():
        try:
            with exclusive_lock(folder, CacheError):
                pass
        except CacheError as error:
            errors.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return errors


def test_a_folder_is_for_one_thread_by_whatever_path(tmp_path):
    folder = tmp_path / "held"
    (tmp_path / "alias").symlink_to(folder)
    with exclusive_lock(folder, CacheError):
        for path in (folder, tmp_path / "alias", folder / ".." / "held"):
            (error,) = lock_in_a_thread(path)
            assert error.startswith(f"{path}: this process works in it already")
    assert lock_in_a_thread(folder) == []


def test_a_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive_lock(tmp_path, CacheError):
        raise ZeroDivisionError
    assert lock_in_a_thread(tmp_path) == []


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_the_lock_file_keeps_whatever_somebody_wrote(tmp_path, make):
    (tmp_path / "mine").write_text("mine")
    make(tmp_path / "mine", tmp_path / ".lock")
    if make is os.symlink:
        with (
            pytest.raises(CacheError, match=r"\.lock: a link"),
            exclusive_lock(tmp_path, CacheError),
        ):
            pytest.fail("went on")
    else:
        assert lock_in_a_thread(tmp_path) == []
    assert (tmp_path / "mine").read_text() == "mine"
