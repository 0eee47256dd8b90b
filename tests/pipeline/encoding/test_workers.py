import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import synchronize
from pathlib import Path

import numpy as np
import pytest

from cache.cli.interrupts import INTERRUPTS
from cache.errors import SettingsError
from pipeline.encoding.workers import WorkerPool, _Worker
from workspace.errors import StageError

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

MEGABYTE = 2**20


def array(number):
    """Much larger than what a pipe holds."""
    return np.full(MEGABYTE, number % 251, np.uint8)


def own_process(number):
    return os.getpid()


def children():
    return len(multiprocessing.active_children())


@pytest.mark.parametrize(
    ("workers", "ahead", "count"), [(0, 2, 5), (1, 1, 7), (3, 2, 20), (3, 2, 0)]
)
def test_results_arrive_whole_and_in_order(workers, ahead, count):
    with WorkerPool(array, workers) as pool:
        results = list(pool.results(range(count), ahead))
    assert len(results) == count
    for number, result in enumerate(results):
        assert np.array_equal(result, array(number))
        assert result.flags.writeable
    assert children() == 0


def test_the_work_is_done_side_by_side_and_not_here():
    with WorkerPool(own_process, 2) as pool:
        found = set(pool.results(range(50), 2))
    assert os.getpid() not in found
    assert 1 <= len(found) <= 2


@pytest.mark.parametrize(("workers", "ahead"), [(0, 2), (1, 1), (2, 2)])
def test_a_number_is_asked_for_when_its_turn_comes(workers, ahead):
    numbers = itertools.count()
    with WorkerPool(array, workers) as pool:
        results = pool.results(numbers, ahead)
        for _ in range(5):
            next(results)
    assert next(numbers) == 5 + ahead * workers


def test_neither_shared_memory_nor_semaphores_are_needed(monkeypatch):
    """All of what the system keeps in /dev/shm: Docker's has 64 MB, others none."""

    def refuse(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synchronize.SemLock, "__init__", refuse)
    monkeypatch.setattr("mmap.mmap", refuse)
    monkeypatch.setattr("torch.UntypedStorage._share_fd_cpu_", refuse)
    monkeypatch.setattr("torch.UntypedStorage._share_filename_cpu_", refuse)
    with WorkerPool(array, 2) as pool:
        assert [result[0] for result in pool.results(range(9), 2)] == list(range(9))


# When something fails


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [StageError("no"), SettingsError("no"), OSError(5, "no", "a")])
def test_an_error_of_the_function_is_raised_here(workers, error):
    def fail(number):
        if number == 3:
            raise error
        return number

    with WorkerPool(fail, workers) as pool:
        results = pool.results(range(9), 2)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(type(error)) as caught:
            next(results)
    assert str(caught.value) == str(error)
    assert children() == 0


@pytest.mark.parametrize("seed", range(6))
def test_a_process_killed_at_any_moment_gives_one_line(seed):
    """While it works, while it sends, while it waits: nobody waits for it for ever."""
    rng = np.random.default_rng(seed)
    with WorkerPool(array, 2) as pool:
        victim = pool._workers[seed % 2]._process.pid
        killer = threading.Timer(rng.uniform(0, 0.05), os.kill, (victim, signal.SIGKILL))
        killer.start()
        with pytest.raises(StageError, match=r"decoding process died \(SIGKILL\)") as caught:
            for _ in pool.results(itertools.count(), 2):
                pass
        killer.join()
    assert "\n" not in str(caught.value)
    assert "extract.workers" in str(caught.value)
    assert children() == 0


def test_a_process_that_ends_by_itself_gives_one_line():
    with (
        WorkerPool(lambda number: os._exit(3), 1) as pool,
        pytest.raises(StageError, match=r"died \(exit code 3\)"),
    ):
        next(pool.results(range(2), 1))


@pytest.mark.parametrize("number", INTERRUPTS)
def test_a_signal_to_the_whole_group_is_the_matter_of_this_process(number):
    with WorkerPool(own_process, 2) as pool:
        for worker in pool._workers:
            os.kill(worker._process.pid, number)
        assert len(list(pool.results(range(20), 2))) == 20


def test_work_that_hangs_is_left_at_an_interrupt(tmp_path):
    """It waits for a FIFO that nobody writes to, or for a disk that does not answer."""
    os.mkfifo(tmp_path / "fifo")
    with WorkerPool(lambda _: (tmp_path / "fifo").open(), 2) as pool:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(pool.results(range(4), 2))
    assert children() == 0


@pytest.mark.parametrize("moment", ["start", "end"])
def test_an_interrupt_while_they_start_or_end_leaves_none(monkeypatch, moment):
    """It comes by a thread that does not block it, such as tqdm's."""
    started = []

    def fork(real=os.fork):
        process = real()
        if process:
            started.append(process)
            if moment == "start":
                interrupt()
        return process

    def kill(worker, real=_Worker.kill):
        if moment == "end":
            interrupt()
        real(worker)

    def interrupt():
        other_thread.submit(signal.raise_signal, signal.SIGINT).result()

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(_Worker, "kill", kill)
    with ThreadPoolExecutor(1) as other_thread:
        other_thread.submit(int).result()
        with pytest.raises(KeyboardInterrupt), WorkerPool(own_process, 2) as pool:
            next(pool.results(range(2), 1))
    assert len(started) == {"start": 1, "end": 2}[moment]
    left = []
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            left.append(process)
    assert left == []


def test_they_end_when_this_process_is_killed(tmp_path):
    """Even one that hangs; else they would hold files and memory for ever."""
    os.mkfifo(tmp_path / "fifo")
    receiver, sender = os.pipe()

    def hang(number):
        if number:
            (tmp_path / "fifo").open()
        return os.getpid()

    def begin():
        with WorkerPool(hang, 2) as pool:
            os.write(sender, b"%d " % next(pool.results(range(3), 2)))
            signal.pause()

    parent = multiprocessing.get_context("fork").Process(target=begin)
    parent.start()
    worker = int(os.read(receiver, 20))
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 60
    while is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.close(receiver)
    os.close(sender)


def is_running(process):
    with contextlib.suppress(FileNotFoundError):
        # A zombie waits to be collected by whoever inherited it.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
