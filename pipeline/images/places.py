"""Opens the places of images: folders, zips, tar shards and parquet tables, here or behind a URL.

A path may be a pattern, of which every match is a place. What a file is follows from its first
bytes, or else from its name.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol
from urllib.parse import unquote

from cache.files.atomic import check_ordinary
from cache.remote.urls import WEB, filesystem_of, is_url
from pipeline.images.byte_file import ByteFile, LocalFile, RemoteFile, over_network
from pipeline.images.folder import ImageFolder
from pipeline.images.names import reading_image
from pipeline.images.parquet_file import GroupCache, ImageParquet
from pipeline.images.remote_folder import RemoteImageFolder
from pipeline.images.tar_file import BLOCK, ImageTar
from pipeline.images.zip_file import REMEDY, ImageZip
from pipeline.input_paths import matches
from workspace.errors import StageError
from workspace.paths import RAW

Kind = Literal["zip", "tar", "parquet"]

SIGNATURES: dict[bytes, Kind] = {b"PK\3\4": "zip", b"PK\5\6": "zip", b"PAR1": "parquet"}

TAR_SIGNATURE, TAR_SIGNATURE_START = b"ustar", 257

COMPRESSIONS = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
"""The command that unpacks a file, by the file's first bytes."""

COPY = "Copy the files to this machine, or pack them into tar shards and name each."


class ImageFiles(Protocol):
    """The files in one place. A copy in another process opens the place anew."""

    def has(self, name: str) -> bool:
        """Whether a file has exactly this path."""

    def names(self, base_name: str) -> Sequence[str]:
        """Return the paths of all files with this base name, in all folders, sorted."""

    def all_names(self) -> Sequence[str]:
        """Return the paths of all files in a fixed order, but for hidden ones.

        Raises:
            StageError: A part of the place cannot be listed.
        """

    def real_path(self, name: str) -> str:
        """Return a file's place with all links resolved, the same for every name of the file.

        Raises:
            ImageNameError: The settings do not allow a link out of the folder.
        """

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            ImageNameError: The file cannot be read, or is too large.
            StageError: The disk, the network or the machine failed.
        """


@dataclass(frozen=True)
class Place:
    """The files of one place."""

    path: str
    """Path or URL, for error texts."""
    prefix: str
    """What stands before a file's path in its full name: empty, or folders that end in `/`."""
    files: ImageFiles
    has_prefix: bool = False
    """Whether the settings give a prefix."""


def open_places(path: str, key: str, follow_links: bool) -> list[Place]:
    """Open the place of a path, or the places that match a pattern, sorted.

    Args:
        path: A folder, zip, tar or parquet table, a pattern of these, or the URL of either.
        key: The settings key that names the path, for error texts.
        follow_links: Whether links in a folder may lead out of it.

    Raises:
        StageError: The path does not exist, matches nothing, is empty, or cannot be read.
    """
    cache = GroupCache()
    return [_open(address, key, follow_links, cache) for address in addresses(path, key)]


def _open(address: str | Path, key: str, follow_links: bool, cache: GroupCache) -> Place:
    if isinstance(address, Path) and address.is_dir():
        return Place(str(address), "", ImageFolder(address, key=key, follow_links=follow_links))
    if isinstance(address, str) and is_remote_folder(address, key):
        return Place(address, "", RemoteImageFolder(address, key=key))
    file = file_at(address)
    kind = kind_of(file, key)
    if kind == "zip":
        return Place(file.address, "", ImageZip(file, key=key))
    if kind == "tar":
        return Place(file.address, stem_of(file) + "/", ImageTar(file, key=key))
    return Place(file.address, stem_of(file) + "/", ImageParquet(file, key=key, cache=cache))


def stem_of(file: ByteFile) -> str:
    """Return the name of a shard or table without its suffix, which its files' names begin with."""
    return PurePosixPath(file.name).stem


def addresses(path: str, key: str) -> list[str | Path]:
    """Return the local path or the URL that a path means, or all that match it, sorted.

    Raises:
        StageError: The path does not exist, or nothing matches it.
    """
    if path.startswith("file://"):
        local = path.removeprefix("file://")
        path = local if Path(local).exists() else unquote(local)
    if is_url(path):
        return list(_urls(path, key))
    found = matches(path)
    for each in found:
        _check_ordinary(each, key)
    if found and (len(found) > 1 or found[0].exists()):
        return list(found)
    if glob.has_magic(path):
        raise _no_match(path, key)
    raise StageError(
        f"{key}: {path} does not exist. Name a folder, a zip, a tar or a parquet table of images; "
        f"the stage fetch makes what is below {RAW}."
    )


def _check_ordinary(path: Path, key: str) -> None:
    check_ordinary(path, lambda why: StageError(f"{key}: {path}: {why}. {REMEDY}"))


def _no_match(path: str, key: str) -> StageError:
    return StageError(
        f"{key}: no file matches the pattern {path}. Name files that exist; `*` stands for any "
        f"part of a name, but not for `/`."
    )


def _urls(url: str, key: str) -> list[str]:
    """Return a URL, or the URLs that match a pattern."""
    # A question mark begins the query of a URL.
    if not any(sign in url for sign in "*["):
        return [url]
    if url.startswith(WEB):
        raise StageError(
            f"{key}: {url}: a web server does not list its files, so a pattern cannot be matched "
            f"there. Name each file."
        )
    filesystem, pattern = filesystem_of(url)
    found = over_network(lambda: filesystem.glob(pattern), url)
    if not found:
        raise _no_match(url, key)
    return sorted(filesystem.unstrip_protocol(name) for name in found)


def is_remote_folder(url: str, key: str) -> bool:
    """Whether a URL is that of a folder.

    Raises:
        StageError: Nothing is there, the server fails, or it is a folder on a web server.
    """
    if url.startswith(WEB):
        if url.endswith("/"):
            raise _web_folder(url, key)
        return False
    filesystem, path = filesystem_of(url)
    with reading_image(lambda reason: StageError(f"{key}: {url}: {reason}. {REMEDY}"), url):
        found = over_network(lambda: filesystem.info(path), url)
    return bool(found["type"] == "directory")


def _web_folder(url: str, key: str) -> StageError:
    return StageError(
        f"{key}: {url} is a folder on a web server, which does not list its files. {COPY}"
    )


def file_at(address: str | Path) -> ByteFile:
    """Return the file of a local path or a URL."""
    return LocalFile(address) if isinstance(address, Path) else RemoteFile(address)


def kind_of(file: ByteFile, key: str) -> Kind:
    """Return what a file is by its first bytes or, if these are unknown, by its name.

    Raises:
        StageError: The file cannot be read, or is compressed as a whole.
    """
    with reading_image(
        lambda reason: StageError(f"{key}: {file.address}: {reason}. {REMEDY}"),
        f"{key}: {file.address}",
    ):
        start = file.read_at(0, BLOCK)
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature):
            return kind
    for signature, command in COMPRESSIONS.items():
        if start.startswith(signature):
            raise StageError(
                f"{key}: {file.address} is compressed as a whole, so its files cannot be read one "
                f"by one. Unpack it once with {command}, and name the .tar."
            )
    if start[TAR_SIGNATURE_START:].startswith(TAR_SIGNATURE):
        return "tar"
    if file.address.startswith(WEB) and start.lstrip().startswith(b"<"):
        raise _web_folder(file.address, key)
    suffix = PurePosixPath(file.name).suffix.lower()
    return {".tar": "tar", ".parquet": "parquet"}.get(suffix, "zip")  # type: ignore[return-value]
