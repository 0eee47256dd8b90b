"""The images of a split: one or several places, and the file there that a name means.

A name means the file of exactly that full name or, if none exists, the only file of that base name
in any folder: COCO's zips hold `train2017/000000000009.jpg` where its annotations say
`000000000009.jpg`, and other data sets do the opposite. A file's full name is the prefix of its
place, then its path there; see `pipeline.images.places` for shards and tables.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cache.remote.urls import is_url
from pipeline.images.names import ImageNameError, check_file_name, plain_name
from pipeline.images.places import ImageFiles, Place, open_places
from workspace.data_settings import ImagePath


class ImageArchive:
    """The images of one split, each read where it is."""

    def __init__(self, paths: Sequence[ImagePath], *, key: str, follow_links: bool = False) -> None:
        """Open the images.

        Args:
            paths: Where they are.
            key: The settings key that named them, for the error text.
            follow_links: Whether links in a folder may lead out of it.

        Raises:
            StageError: A path does not exist, is empty, or cannot be read.
        """
        self._places = [
            _with_prefix(place, item.prefix)
            for item in paths
            for place in open_places(item.path, key, follow_links)
        ]
        self._by_prefix: dict[str, list[Place]] = defaultdict(list)
        for place in self._places:
            self._by_prefix[place.prefix].append(place)
        self._num_folders = max((p.count("/") for p in self._by_prefix), default=0)
        """Most folders in a prefix."""
        self.path = ", ".join(item.path for item in paths)
        """All places, for error texts."""

    def has(self, file_name: str) -> bool:
        """Whether a file has exactly this full name."""
        return any(self._holders(plain_name(file_name)))

    def missing_paths(self) -> list[str]:
        """Return the places that this machine does not have, URLs left out."""
        paths = [place.path for place in self._places if not is_url(place.path)]
        return [path for path in paths if not Path(path).exists()]

    def names(self, file_name: str) -> list[str]:
        """Return the full names of all files with the base name of `file_name`.

        Where the settings give a place a prefix, texts name its files in full: a name with other
        folders is that of another place, which may be missing.
        """
        wanted = plain_name(file_name)
        folders, _, base_name = wanted.rpartition("/")
        names = (
            place.prefix + name
            for place in self._places
            for name in place.files.names(base_name)
            if not (folders and place.has_prefix) or f"{place.prefix}{name}".endswith(f"/{wanted}")
        )
        return list(dict.fromkeys(names))

    def all_names(self) -> list[str]:
        """Return the full names of all files, place by place."""
        names = (p.prefix + name for p in self._places for name in p.files.all_names())
        return list(dict.fromkeys(names))

    def real_path(self, full_name: str) -> str:
        """Return a file's path with all links resolved, the same for every name of the file.

        Raises:
            ImageNameError: The settings do not allow a link out of the folder, or two places hold
                different files of this name, or it is a pipe or a link to nothing.
        """
        files, name = self._only_holder(full_name)
        return files.real_path(name)

    def find(self, file_name: str) -> str:
        """Return the full name of the file that a name in the annotations means.

        Raises:
            ImageNameError: The name leaves the image root, or means no file or different ones.
            StageError: The disk or the machine failed.
        """
        check_file_name(file_name)
        if self.has(file_name):
            return plain_name(file_name)
        names = self.names(file_name)
        if not names:
            raise ImageNameError(f"no file {file_name!r} in {self.path}")
        for other in names[1:]:
            if not self._is_same(names[0], other):
                raise ImageNameError(
                    f"{file_name!r} may be {names[0]!r} or {other!r} in {self.path}"
                )
        return names[0]

    def read(self, file_name: str) -> bytes:
        """Return the bytes of the image file that a name means; see `find`.

        Raises:
            ImageNameError: As `find` raises it, or the file cannot be read or is too large.
            StageError: The disk or the machine failed.
        """
        holders = list(self._holders(plain_name(file_name)))
        if len(holders) == 1:
            # The usual case, without a second search for the name.
            check_file_name(file_name)
            ((place, name),) = holders
            return place.files.read(name)
        files, name = self._only_holder(self.find(file_name))
        return files.read(name)

    def _holders(self, full_name: str) -> Iterator[tuple[Place, str]]:
        """Yield the places with a file of this full name, and its path there."""
        # By the folders in the name: a thousand shards are not asked one by one.
        end = 0
        for _ in range(self._num_folders + 1):
            name = full_name[end:]
            for place in self._by_prefix.get(full_name[:end], ()):
                if name and place.files.has(name):
                    yield place, name
            end = full_name.find("/", end) + 1
            if not end:
                return

    def _only_holder(self, full_name: str) -> tuple[ImageFiles, str]:
        """Return the files of the place that holds a full name; of equal files, the first."""
        holders = list(self._holders(full_name))
        if not holders:
            raise ImageNameError(f"{full_name!r} in {self.path} is no ordinary file")
        (first, name), *others = holders
        for other, other_name in others:
            same_path = first.files.real_path(name) == other.files.real_path(other_name)
            if not same_path and first.files.read(name) != other.files.read(other_name):
                raise ImageNameError(
                    f"{full_name!r} is one file in {first.path} and another in {other.path}; a "
                    f"prefix tells them apart"
                )
        return first.files, name

    def _is_same(self, full_name: str, other: str) -> bool:
        try:
            if self.real_path(full_name) == self.real_path(other):
                return True
            return self.read(full_name) == self.read(other)
        except ImageNameError:
            return False


def _with_prefix(place: Place, prefix: str) -> Place:
    folders = plain_name(prefix)
    if not folders:
        return place
    return replace(place, prefix=f"{folders}/{place.prefix}", has_prefix=True)
