import subprocess
import sys

import pytest

from cache.cli.interrupts import without_interrupts

COMMAND = """
import os, signal, sys
from cache.cli.command import run_guarded
{before}
def work():
    {body}
run_guarded(work)
"""

LINE = "error: interrupted; run the same command again\n"


def run(body, before=""):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(body=body, before=before)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_one_signal_or_many_end_the_command_in_order(name):
    send = f"os.kill(os.getpid(), signal.{name})"
    once = f"{send}; signal.pause()"
    again = f"try: {once}\n    finally: {send}; print('put away')"
    assert run(once) == (130, "", LINE)
    assert run(again) == (130, "put away\n", LINE)


def test_an_interruption_that_a_library_drops_is_made_again_and_clean_up_is_left_in_peace():
    before = "import contextlib, time; import cache.cli.interrupts as i; i.REPEAT_SECONDS = 0.1"
    body = """
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
    print("dropped")
    try:
        time.sleep(9)
    finally:
        try:
            open("/nowhere/at/all")
        except OSError:
            time.sleep(0.3)
        print("put away")
    """
    assert run(body, before) == (130, "dropped\nput away\n", LINE)


def test_signals_that_the_caller_ignores_stay_ignored_except_sigterm():
    ignore = "for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)"
    body = "os.kill(os.getpid(), 1); os.kill(os.getpid(), 2); print('on'); os.kill(os.getpid(), 15)"
    assert run(body, ignore) == (130, "on\n", LINE)


def test_an_interruption_of_a_destructor_is_made_again_without_a_word():
    before = """
class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10): pass
"""
    assert run("Interrupted(); signal.pause()", before) == (130, "", LINE)


def test_a_process_that_begins_in_the_block_never_sees_them():
    code = "import os; [os.kill(os.getpid(), n) for n in (1, 2, 15)]; print('on')"
    with without_interrupts():
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.communicate() == (b"on\n", None)


def test_a_process_hears_behind_the_block_what_came_in_it():
    """By its only thread, and by one that does not block it."""
    code = """
import os, signal
from concurrent.futures import ThreadPoolExecutor
from cache.cli.interrupts import INTERRUPTS, without_interrupts
def open_and_leave_a_block():
    with without_interrupts():
        pass

heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
with without_interrupts():
    os.kill(os.getpid(), signal.SIGTERM)
    assert not heard
assert heard == [signal.SIGTERM]
with ThreadPoolExecutor(1) as other:
    other.submit(int).result()
    with without_interrupts():
        other.submit(signal.raise_signal, signal.SIGTERM).result()
        assert heard == [signal.SIGTERM]
    assert heard == [signal.SIGTERM] * 2
    other.submit(open_and_leave_a_block).result()
with without_interrupts(), without_interrupts():
    pass
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(INTERRUPTS)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
