"""Limits the memory of a process and its children, page cache included, by a control group.

The group is made below the group of this process and deleted afterwards; that needs the right to
write there, which root has. Files count for the group that reads them first, so that a file has to
be dropped from the page cache before (`bench.pages`).
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")

FILES = {
    1: ("memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    2: ("memory.max", "memory.peak"),
}
"""The files of the limit and of the peak, by version of control groups."""

JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


@dataclass(frozen=True)
class MemoryGroup:
    """A control group with a limit of memory."""

    folder: Path
    peak_file: str

    def command(self, command: list[str]) -> list[str]:
        """Return a command that joins the group, and then is the given command."""
        return ["sh", "-c", JOIN, str(self.folder), *command]

    def peak(self) -> int:
        """Return the most bytes that its processes and their files took at a time."""
        return int((self.folder / self.peak_file).read_text())


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """Make a group of processes that may take so many bytes, for a `with` block.

    Raises:
        OSError: This system, or its administrator, does not let this process do so.
    """
    parent, version = _own_group()
    limit_file, peak_file = FILES[version]
    folder = parent / f"bench-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / limit_file).write_text(str(limit))
        yield MemoryGroup(folder, peak_file)
    finally:
        folder.rmdir()


def _own_group() -> tuple[Path, int]:
    """Return the folder of this process's group, and the version of control groups."""
    groups = Path("/proc/self/cgroup").read_text()
    if found := re.search(r"^\d+:memory:/(.*)$", groups, re.M):
        return CONTROL_GROUPS / "memory" / found[1], 1
    found = re.search(r"^0::/(.*)$", groups, re.M)
    return CONTROL_GROUPS / (found[1] if found else ""), 2
