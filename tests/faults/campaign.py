"""Runs stages while the n-th write or read below their folder fails, and says what ends wrong.

    python -m tests.faults.campaign LIBRARY FOLDER [--stages extract pretrain] [--most 3]

LIBRARY is `failing_io.c`, compiled, and must be preloaded; FOLDER is for what is made, and is
best in memory. Without --most every n is tried, in every way: some 2,000 tries, an hour of a core;
two processes can share the stages. Prints a line of JSON for each stage and way: how often it was
tried, and what was wrong.

A try must end with exit code 1 and one line that names a path and the system's reason, or with
exit code 0 and the right files; and after exit code 1, the same command must make the right files.
"""

import argparse
import ctypes
import errno
import gc
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.stages import STAGES, Stage, import_all, offer_downloads, serve, write_inputs

TIMEOUT_S = 120


@dataclass(frozen=True)
class Fault:
    """A way in which calls fail, as `failing_io.c` numbers them."""

    name: str
    mode: int
    reads: bool
    errno: int


FAULTS = (
    Fault("all writes from the n-th", 0, False, errno.ENOSPC),
    Fault("one write", 1, False, errno.ENOSPC),
    Fault("one short write, then all", 2, False, errno.EDQUOT),
    Fault("one short write", 3, False, errno.ENOSPC),
    Fault("one read", 1, True, errno.EIO),
    Fault("all reads from the n-th", 0, True, errno.EIO),
)

DAMAGE = ("corrupt", "damaged", "again: its bytes", "not the file that was indexed")
"""Words for a file that is not as it was written, which a failed read does not show."""


TOP_LEVEL = (
    r"\.work/",
    "data/",
    "demo/",
    "exported",
    "reports/",
    "runs/",
    "world/",
    r"params\.yaml",
)
"""What a workspace holds, of which an error names one."""


@dataclass(frozen=True)
class Ended:
    """How a try ended."""

    code: int
    """Exit code; negative: the number of the signal; 99: a traceback."""
    out: str
    err: str


@dataclass(frozen=True)
class Undisturbed:
    """How a stage runs when nothing fails."""

    stage: Stage
    before: Path
    """The folder as the stages before left it."""
    wanted: dict[str, str]
    """Its outputs."""
    calls: list[int]
    """How many writes and reads it makes."""

    def tries(self, most: int | None) -> list[tuple[Fault, int]]:
        """Return every fault at every call, or so many of them, spread over all."""
        every = [(f, n) for f in FAULTS for n in range(1, self.calls[f.reads] + 1)]
        if most is None:
            return every
        return [every[int((part + 0.5) * len(every) / most)] for part in range(most)]


class Campaign:
    """Tries stages in copies of the folders that undisturbed runs left."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._folder = folder.resolve()
        self._library.fault_arm(b"/nowhere", 0, 0, 0, 0)

    def prepare(self, names: list[str]) -> Iterator["Undisturbed"]:
        """Run the stages as they are, up to the last of those that are named; yield those."""
        before = self._folder / "inputs"
        before.mkdir(parents=True)
        write_inputs(before)
        server = 0
        try:
            last = max(n for n, stage in enumerate(STAGES) if stage.name in names)
            for stage in STAGES[: last + 1]:
                if stage.name == "fetch":
                    server, port = serve(before / "world")
                    offer_downloads(before, port)
                after = self._folder / f"after {stage.name}"
                shutil.copytree(before, after)
                ended = self._run(stage, after)
                if (ended.code, ended.err) != (0, ""):
                    raise RuntimeError(f"{stage.name}, undisturbed: {ended}")
                wanted = stage.result(after)
                if not wanted:
                    raise RuntimeError(f"{stage.name}: no outputs")
                if stage.name in names:
                    calls = [self._library.fault_calls(kind) for kind in (False, True)]
                    yield Undisturbed(stage, before, wanted, calls)
                before = after
        finally:
            if server:
                os.kill(server, signal.SIGKILL)
                os.waitpid(server, 0)

    def try_one(self, undisturbed: "Undisturbed", fault: Fault, n: int) -> str:
        """Let a stage meet a fault; return what was wrong, or nothing."""
        stage, before = undisturbed.stage, undisturbed.before
        folder = self._copy(before)
        ended = self._run(stage, folder, fault, n)
        if problem := _problem(ended, fault, folder):
            return problem
        if fault.reads:
            lost = [path for path in _files(before) if not (folder / path).exists()]
            if lost:
                return f"deleted {lost}"
        if ended.code == 0:
            return _difference(stage.result(folder), undisturbed.wanted)
        again = self._run(stage, folder)
        if again.code != 0:
            return f"the next run ended with {again.code}: {again.err[-2000:]}"
        difference = _difference(stage.result(folder), undisturbed.wanted)
        return difference and f"after the next run: {difference}"

    def _copy(self, before: Path) -> Path:
        folder = self._folder / "try"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        return folder

    def _run(self, stage: Stage, folder: Path, fault: Fault | None = None, n: int = 0) -> Ended:
        """Run a stage in a forked process; the parent never computes, so that it has no threads."""
        logs = [self._folder / "out.txt", self._folder / "err.txt"]
        process = os.fork()
        if process == 0:
            self._be_the_stage(stage, folder, logs, fault, n)
        code = _wait(process)
        out, err = (path.read_text(errors="replace") for path in logs)
        return Ended(code, out, err)

    def _be_the_stage(
        self, stage: Stage, folder: Path, logs: list[Path], fault: Fault | None, n: int
    ) -> None:
        os.setsid()
        code = 99
        try:
            for descriptor, path in zip((1, 2), logs, strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            os.chdir(folder)
            failure = (fault.errno, fault.mode, int(fault.reads)) if fault else (0, 0, 0)
            self._library.fault_arm(os.fsencode(folder), n, *failure)
            stage.run()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        # What the exit of an interpreter does, but for tearing down all that the parent imported.
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(process: int) -> int:
    """Wait for a process and return its exit code, or the negative number of its signal."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return -signal.SIGKILL


def _problem(ended: Ended, fault: Fault, folder: Path) -> str:
    """Say what is wrong with how a try ended, but for its files."""
    said = ended.out + ended.err
    if ended.code not in (0, 1) or "Traceback" in said:
        return f"ended with {ended.code}: {said[-3000:]}"
    if fault.reads and any(word in said.lower() for word in DAMAGE):
        return f"calls it damage: {said}"
    if ended.code == 0:
        return ""
    lines = ended.err.splitlines()
    reason = os.strerror(fault.errno).lower()
    if len(lines) != 1 or not lines[0].startswith("error: ") or reason not in lines[0].lower():
        return f"wanted one line with {reason!r}: {said}"
    is_named = re.search("|".join(TOP_LEVEL), lines[0])
    return "" if is_named else f"names no path: {said}"


def _difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    names = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    return f"other files: {names}" if names else ""


def _files(folder: Path) -> list[Path]:
    return [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    ]


def main() -> None:
    """Read the command line and try."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", nargs="*", default=[stage.name for stage in STAGES])
    parser.add_argument("--most", type=int, help="tries for each stage")
    arguments = parser.parse_args()
    import_all()
    campaign = Campaign(arguments.library, arguments.folder)
    # So that no child looks through, and copies, all that was imported.
    gc.freeze()
    for undisturbed in campaign.prepare(arguments.stages):
        tries = undisturbed.tries(arguments.most)
        for fault, same in itertools.groupby(tries, lambda pair: pair[0]):
            numbers = [n for _, n in same]
            found = {n: campaign.try_one(undisturbed, fault, n) for n in numbers}
            wrong = [f"n {n}: {problem}" for n, problem in found.items() if problem]
            line = {"stage": undisturbed.stage.name, "fault": fault.name, "tries": len(numbers)}
            print(json.dumps(line | {"wrong": wrong}), flush=True)
    gc.unfreeze()


if __name__ == "__main__":
    main()
