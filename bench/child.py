"""Runs Python in a process of its own, and records the time and the memory that it takes.

Two peaks of memory are read every 20 ms: `peak_gib` is VmHWM, which counts the pages of mapped
files (the system can drop these at any time); `peak_anonymous_gib` leaves them out. ru_maxrss would
begin with the memory of the process that starts this one.
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.memory_group import MemoryGroup

ROOT = Path(__file__).parents[1]

CALL = "import sys; from bench.child import answer; answer(*sys.argv[1:])"
ANSWER = "answer.json"


@dataclass(frozen=True)
class Child:
    """What a process took."""

    exit_code: int
    seconds: float
    peak_gib: float
    peak_anonymous_gib: float

    def memory(self) -> dict[str, float]:
        """Return the two peaks, for a result file."""
        return {
            "peak_gib": round(self.peak_gib, 2),
            "peak_anonymous_gib": round(self.peak_anonymous_gib, 2),
        }

    def check(self, work: str) -> None:
        """Refuse a process that failed.

        Raises:
            RuntimeError: Names the work and the exit code.
        """
        if self.exit_code:
            raise RuntimeError(f"{work}: exit code {self.exit_code}, after {self.seconds:.0f} s")


def run_measured(
    arguments: list[str],
    folder: Path,
    checkout: Path = ROOT,
    group: MemoryGroup | None = None,
) -> Child:
    """Run Python and watch its memory.

    Args:
        arguments: Of Python.
        folder: The working directory.
        checkout: Whose code is imported.
        group: Limits the memory of the process.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, *arguments]
    if group:
        command = group.command(command)
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment)
    peak = anonymous = 0
    try:
        while process.poll() is None:
            time.sleep(0.02)
            peak = _kib(process.pid, "VmHWM") or peak
            anonymous = max(anonymous, _kib(process.pid, "RssAnon"))
    except BaseException:
        process.kill()
        process.wait()
        raise
    seconds = time.perf_counter() - started
    return Child(process.returncode, seconds, peak / 2**20, anonymous / 2**20)


def call_measured(
    function: Callable[..., dict[str, float]],
    *arguments: Path | str,
    folder: Path,
    group: MemoryGroup | None = None,
) -> dict[str, float]:
    """Call a function in a process of its own.

    Args:
        function: Of a module of this package; its result is written as JSON.
        arguments: Of the function, which gets texts.
        folder: The working directory; the result passes through a file there.
        group: Limits the memory of the process.

    Returns:
        What the function returned, and the two peaks of memory.
    """
    # The module of a command that runs has another name.
    module = f"{__package__}.{Path(inspect.getfile(function)).stem}"
    names = [module, function.__name__, *map(str, arguments)]
    child = run_measured(["-c", CALL, *names], folder, group=group)
    child.check(function.__name__)
    found: dict[str, float] = json.loads((folder / ANSWER).read_text())
    return {name: round(value, 3) for name, value in found.items()} | child.memory()


def answer(module: str, function: str, *arguments: str) -> None:
    """Call a function and write what it returns to a file; in a process of its own."""
    call: Callable[..., Any] = getattr(importlib.import_module(module), function)
    Path(ANSWER).write_text(json.dumps(call(*arguments)))


def _kib(pid: int, figure: str) -> int:
    """Return a figure of a process; 0 of one that has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{figure}:\s+(\d+) kB", status, re.M)
    return int(found[1]) if found else 0
