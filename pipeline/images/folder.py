"""The image files below a folder."""

import contextlib
import os
import stat
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pipeline.images.names import ImageNameError, check_size, is_visible, reading_image
from workspace.errors import StageError


class ImageFolder:
    """The image files below a folder, which may itself be a link."""

    def __init__(self, path: Path, *, key: str, follow_links: bool) -> None:
        """Open the folder; errors name the settings key.

        Raises:
            StageError: The folder is empty or cannot be listed.
        """
        with reading_image(
            lambda reason: StageError(f"{key}: {path}: {reason}."), f"{key}: {path}"
        ):
            if not any(path.iterdir()):
                raise StageError(f"{key}: {path} is an empty folder, wanted images in it.")
        self.path = path
        self._key = key
        self._follow_links = follow_links
        self._root = Path(os.path.realpath(path))
        self._real_folders: dict[str, Path] = {}
        self._names: dict[str, list[str]] | None = None
        self._unlisted: list[tuple[str, str]] = []
        """Folders that cannot be listed, and why; filled together with `_names`."""

    def has(self, full_name: str) -> bool:
        """Whether a file of this name exists, even one that a link outside the folder leads to."""
        path = self._root / full_name
        with contextlib.suppress(ImageNameError), reading_image(ImageNameError, str(path)):
            return stat.S_ISREG(path.stat().st_mode)
        return False

    def names(self, base_name: str) -> Sequence[str]:
        """Return the full names of all files with this base name, in all folders."""
        return self._by_base_name().get(base_name, ())

    def all_names(self) -> list[str]:
        """Return the full names of all files, but for hidden ones, sorted.

        Raises:
            StageError: A folder cannot be listed, so that images could be missing.
        """
        names = [name for found in self._by_base_name().values() for name in found]
        for folder, reason in self._unlisted:
            if is_visible(f"{folder}/x"):
                raise StageError(
                    f"{self._key}: the folder {folder!r} in {self.path} cannot be listed: "
                    f"{reason}. Let it be read, or move it out of there."
                )
        return sorted(filter(is_visible, names))

    def _by_base_name(self) -> dict[str, list[str]]:
        if self._names is None:
            self._names = self._walk()
        return self._names

    def _walk(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = defaultdict(list)
        self._unlisted = []
        waiting, seen = [""], {self._root}
        while waiting:
            folder = waiting.pop()
            for name, is_folder in self._entries(folder):
                full_name = f"{folder}/{name}" if folder else name
                if not is_folder:
                    names[name].append(full_name)
                elif self._must_enter(full_name, seen):
                    waiting.append(full_name)
        return {name: sorted(found) for name, found in names.items()}

    def _entries(self, folder: str) -> list[tuple[str, bool]]:
        path = self._root / folder
        try:
            with reading_image(ImageNameError, str(path)), os.scandir(path) as entries:
                return [(entry.name, _is_folder(entry)) for entry in entries]
        except ImageNameError as error:
            # No permission to list the folder, as with a disk's lost+found.
            self._unlisted.append((folder, str(error)))
            return []

    def _must_enter(self, folder: str, seen: set[Path]) -> bool:
        """Whether a folder's files were not listed yet; `seen` breaks cycles of links."""
        path = self._root / folder
        real = Path(os.path.realpath(path))
        if path.is_symlink() and (real.is_relative_to(self._root) or not self._follow_links):
            return False
        is_new = real not in seen
        seen.add(real)
        return is_new

    def real_path(self, full_name: str) -> str:
        """Return a file's path with all links resolved, the same for every name of the file.

        Raises:
            ImageNameError: A link leads out of the folder, which the settings do not allow.
        """
        folder, _, base_name = full_name.rpartition("/")
        # Cached by folder: otherwise every file costs a system call per folder above it.
        if folder not in self._real_folders:
            self._real_folders[folder] = Path(os.path.realpath(self._root / folder))
        path = self._real_folders[folder] / base_name
        if path.is_symlink():
            path = Path(os.path.realpath(path))
        if not (self._follow_links or path.is_relative_to(self._root)):
            raise ImageNameError(
                f"file name {full_name!r} leaves the image root by a link to {str(path)!r}, which "
                f"only data.follow_links: true allows"
            )
        return str(path)

    def read(self, full_name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            ImageNameError: The file is outside the folder, cannot be read, or is too large.
            StageError: The disk or the machine failed.
        """
        path = Path(self.real_path(full_name))
        where = f"{full_name!r} in {self.path}"
        with reading_image(lambda reason: ImageNameError(f"{where}: {reason}"), where):
            status = path.stat()
            # Reading a pipe would block for ever.
            if not stat.S_ISREG(status.st_mode):
                raise ImageNameError(f"{where} is no ordinary file")
            check_size(full_name, status.st_size)
            return path.read_bytes()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_names": None}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # entry.is_dir() raises for a cycle of links.
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir()
