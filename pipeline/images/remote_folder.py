"""The image files below a folder behind an fsspec URL."""

from collections.abc import Sequence

from cache.remote.urls import filesystem_of
from pipeline.images.byte_file import over_network
from pipeline.images.names import (
    MAX_IMAGE_BYTES,
    ImageNameError,
    by_base_name,
    check_size,
    is_visible,
    reading_image,
)
from workspace.errors import StageError


class RemoteImageFolder:
    """The image files below a folder, listed once; the list is kept where this is pickled."""

    def __init__(self, url: str, *, key: str) -> None:
        """List the folder; errors name the settings key.

        Raises:
            StageError: The folder is empty, or the server does not list it.
        """
        self.path = url.rstrip("/")
        filesystem, folder = filesystem_of(self.path)
        with reading_image(lambda reason: StageError(f"{key}: {url}: {reason}."), f"{key}: {url}"):
            found = over_network(lambda: filesystem.find(folder, detail=True), url)
            root = folder.rstrip("/") + "/"
            self._sizes: dict[str, int | None] = {
                str(path).removeprefix(root): info.get("size") for path, info in found.items()
            }
        if not self._sizes:
            raise StageError(f"{key}: {url} is an empty folder, wanted images in it.")
        self._names: dict[str, list[str]] | None = None

    def has(self, full_name: str) -> bool:
        """Whether a file of this name exists."""
        return full_name in self._sizes

    def names(self, base_name: str) -> Sequence[str]:
        """Return the full names of all files with this base name, in all folders."""
        if self._names is None:
            self._names = by_base_name(self._sizes)
        return self._names.get(base_name, ())

    def all_names(self) -> list[str]:
        """Return the full names of all files, but for hidden ones, sorted."""
        return sorted(filter(is_visible, self._sizes))

    def real_path(self, full_name: str) -> str:
        """Return a file's URL."""
        return f"{self.path}/{full_name}"

    def read(self, full_name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            ImageNameError: The file has vanished, or is too large.
            StageError: The network failed.
        """
        size = self._sizes[full_name]
        # One byte more than a file may have shows a file that is too large.
        wanted = MAX_IMAGE_BYTES + 1 if size is None else size
        check_size(full_name, size or 0)
        filesystem, folder = filesystem_of(self.path)
        path, where = f"{folder.rstrip('/')}/{full_name}", self.real_path(full_name)

        def fetch() -> bytes:
            with filesystem.open(path, "rb", cache_type="none") as file:
                return bytes(file.read(wanted))

        with reading_image(lambda reason: ImageNameError(f"{where}: {reason}"), where):
            data = over_network(fetch, where)
        check_size(full_name, len(data))
        return data

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_names": None}
