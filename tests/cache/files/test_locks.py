"""A folder is locked by one process at a time, until that process ends."""

import errno
import fcntl
import multiprocessing
import os
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
