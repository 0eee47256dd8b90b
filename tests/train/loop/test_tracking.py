import errno
import socket
from pathlib import Path

import pytest
import wandb

from train.loop.tracking import Tracker
from train.settings import TrackingSettings


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """An empty home, no account, no network."""

    def refuse(self, address, *rest):
        # wandb talks to its own process on this machine.
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"):
            return real(self, address, *rest)
        raise AssertionError(f"connects to {address}")

    real = socket.socket.connect
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)


class Run:
    stage = "pretrain"
    is_main = True

    def tracking_id(self):
        return "0123abcd"


def log_something(mode, run=None):
    config = {"seed": 0, "llm": {"model": "x"}}
    with Tracker(TrackingSettings(wandb=mode), run or Run(), config) as tracker:
        tracker.log(1, {"loss": 2.0})
        tracker.log_samples(1, [(7, "a cat", "a dog")])


def test_offline_needs_no_account_and_writes_below_the_work_directory():
    """And a run that goes on, in a folder of its own, is the same run."""
    for _ in range(2):
        log_something("offline")
    assert [path.name for path in Path().iterdir()] == [".work"]
    assert [path.name for path in Path(".work").iterdir()] == ["wandb"]
    runs = list(Path(".work/wandb").glob("offline-run-*"))
    assert {run.name.rsplit("-", 1)[1] for run in runs} == {"0123abcd"}
    for run in runs:
        assert (run / "run-0123abcd.wandb").stat().st_size > 0


def test_disabled_writes_nothing():
    log_something("disabled")
    assert [path for path in Path().rglob("*") if path.is_file()] == []


def test_of_several_processes_only_the_main_one_records():
    other = Run()
    other.is_main = False
    log_something("offline", other)
    assert [path for path in Path().rglob("*") if path.is_file()] == []


class Failing:
    """A run whose n-th call fails, and every later one."""

    def __init__(self, n):
        self.n, self.calls = n, 0

    def _call(self, *args, **options):
        self.calls += 1
        if self.calls >= self.n:
            raise OSError(errno.ENOSPC, "No space left on device", ".work/wandb/x")

    log = finish = _call


@pytest.mark.parametrize("n", range(5))
def test_what_wandb_meets_is_said_once_and_ends_the_recording_alone(n, monkeypatch, capsys):
    """At the start, while it records, and at the end."""
    failing = Failing(n)

    def init(**options):
        failing._call()
        failing.calls = 0
        return failing

    monkeypatch.setattr(wandb, "init", init if n == 0 else lambda **options: failing)
    log_something("offline")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (n <= 3)
    assert all("No space left on device: '.work/wandb/x'); training goes on" in x for x in lines)
    assert failing.calls <= max(n, 3)


def test_what_our_own_files_meet_is_no_matter_of_wandb():
    class Broken(Run):
        def tracking_id(self):
            raise OSError(errno.ENOSPC, "No space left on device", "tracking_id")

    with pytest.raises(OSError, match="'tracking_id'"):
        log_something("offline", Broken())


def test_an_interrupt_while_wandb_works_is_an_interrupt(monkeypatch):
    def init(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(KeyboardInterrupt):
        log_something("offline")
