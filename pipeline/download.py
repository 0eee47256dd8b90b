"""Downloads a file over HTTP, so that neither a broken connection nor a kill loses received bytes.

The received bytes are in `<name>.partial`, beside what the server said about the file's version:
the download continues only while the version stays the same. The file gets its own name once its
size and hash are right.
"""

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn
from urllib.parse import urlsplit

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from cache.files.atomic import CHUNK_BYTES, path_in_errors, sha256_of, write_json
from cache.files.foreign import reading_foreign_file
from cache.texts import human_size
from pipeline.settings import Download
from workspace.errors import StageError

MAX_FRUITLESS_ATTEMPTS = 5
"""Consecutive attempts without a single byte after which the download fails."""

FIRST_PAUSE_S = 1.0
"""Pause after the first such attempt, doubled after each further one."""

TIMEOUT_S = (10, 60)
"""Seconds to connect, and between two packets."""

_RETRIED = (408, 416, 425, 429, 500, 502, 503, 504)
"""Status codes that another attempt may change."""


class _RetryError(Exception):
    """A failure that another attempt may not meet."""


@dataclass(frozen=True)
class _Partial:
    """The received bytes and the version of their file."""

    path: Path

    @property
    def version_path(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> dict[str, str]:
        try:
            with reading_foreign_file(StageError, self.version_path):
                version = dict(json.loads(self.version_path.read_text(encoding="utf-8")))
        except StageError:
            return {}
        return {name: value for name, value in version.items() if isinstance(value, str)}

    def restart(self, version: dict[str, str]) -> None:
        self.remove()
        write_json(self.version_path, version)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.version_path.unlink(missing_ok=True)


def download(item: Download, folder: Path) -> Path:
    """Download a file into a folder unless it exists; continue a partial download.

    Args:
        item: Address, size and hash of the file.
        folder: Holds finished and partial files between calls.

    Returns:
        The path of the finished file.

    Raises:
        StageError: The server cannot be reached, or has no such file or another one.
    """
    path = local_path(item, folder)
    if path.exists() and problem(path, item) is None:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    _receive_all(item, partial)
    if found := problem(partial.path, item):
        partial.remove()
        raise StageError(
            f"{item.url}: {found}. The download was deleted: run again to repeat it, or correct "
            f"this file's entry in fetch.files."
        )
    partial.path.replace(path)
    partial.remove()
    return path


def local_path(item: Download, folder: Path) -> Path:
    """Return the path of a finished file: the last part of its address, in `folder`."""
    return folder / PurePosixPath(urlsplit(item.url).path).name


def _partial(path: Path) -> _Partial:
    return _Partial(path.with_name(path.name + ".partial"))


def problem(path: Path, item: Download) -> str | None:
    """Return how a file differs from the published size or hash; None if it does not."""
    size = path.stat().st_size
    if size != item.bytes:
        return f"wanted {item.bytes} bytes, found {size}"
    if item.sha256 is not None and (found := sha256_of(path)) != item.sha256:
        return f"wanted sha256 {item.sha256}, found {found}"
    return None


def check_free_space(items: tuple[Download, ...], folder: Path) -> None:
    """Refuse downloads that do not fit on the disk of `folder`.

    Raises:
        StageError: The bytes still to be received are more than the disk has free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {local_path(item, folder): item for item in items}
    missing = sum(
        max(0, item.bytes - _partial(path).size())
        for path, item in paths.items()
        if not path.exists()
    )
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise StageError(
            f"fetch.files: {human_size(missing)} are still to be downloaded to {folder}, "
            f"{human_size(missing - free)} more than is free there. Free some space, or work in a "
            f"folder on another disk."
        )


def _receive_all(item: Download, partial: _Partial) -> None:
    fruitless = 0
    bar: tqdm[NoReturn] = tqdm(
        desc=f"fetch {local_path(item, Path()).name}",
        total=item.bytes,
        initial=partial.size(),
        unit="B",
        unit_scale=True,
        disable=None,
    )
    with requests.Session() as session, bar:
        while (before := partial.size()) < item.bytes:
            try:
                _receive(session, item, partial, bar)
                reason = "the connection ended early"
            except (requests.RequestException, HTTPError, _RetryError) as error:
                reason = str(error)
            if partial.size() > before:
                fruitless = 0
                continue
            fruitless += 1
            if fruitless == MAX_FRUITLESS_ATTEMPTS:
                raise StageError(
                    f"{item.url}: gave up after {fruitless} attempts without a byte: {reason}. "
                    f"What has arrived is kept: run again to continue."
                )
            time.sleep(FIRST_PAUSE_S * 2 ** (fruitless - 1))


def _receive(
    session: requests.Session, item: Download, partial: _Partial, bar: "tqdm[NoReturn]"
) -> None:
    """Send one request and append the bytes of its answer."""
    headers = _range_headers(item, partial)
    with session.get(item.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        _accept(response, item, partial)
        with path_in_errors(partial.path), partial.path.open("ab") as file:
            bar.n = file.tell()
            # Not iter_content, which drops the start of a chunk when the connection breaks.
            while chunk := response.raw.read1(CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > item.bytes:
                    break


def _range_headers(item: Download, partial: _Partial) -> dict[str, str]:
    # Compression would shift the offsets.
    headers = {"Accept-Encoding": "identity"}
    version, size = partial.version(), partial.size()
    if size and not version and item.sha256 is None:
        # Nothing could tell whether old and new bytes are of the same file.
        partial.remove()
    elif size:
        headers["Range"] = f"bytes={size}-"
        # A weak ETag does not identify bytes, so a server must not accept it here.
        validator = version.get("ETag", "W/")
        if validator.startswith("W/"):
            validator = version.get("Last-Modified", "")
        if validator:
            headers["If-Range"] = validator
    return headers


def _accept(response: requests.Response, item: Download, partial: _Partial) -> None:
    """Prepare the partial file for appending this answer, or refuse the answer."""
    version = {
        name: response.headers[name]
        for name in ("ETag", "Last-Modified")
        if name in response.headers
    }
    if response.status_code == requests.codes.ok:
        partial.restart(version)
        offered = response.headers.get("Content-Length")
    elif response.status_code == requests.codes.partial_content:
        start, offered = _content_range(response)
        # A partial answer may leave out headers of the whole.
        changed = any(version.get(name, old) != old for name, old in partial.version().items())
        if changed or start != partial.size():
            partial.remove()
            raise _RetryError("the file changed on the server during the download")
    else:
        _refuse_status(response, item, partial)
    if offered is not None and offered != str(item.bytes):
        partial.remove()
        raise StageError(
            f"{item.url}: wanted {item.bytes} bytes, the server offers {offered}. Another version "
            f"of the file? Then correct its entry in fetch.files."
        )


def _content_range(response: requests.Response) -> tuple[int, str | None]:
    """Return the position of the first byte, and the size of the whole file if it is stated."""
    found = re.fullmatch(
        r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip()
    )
    if found is None:
        raise _RetryError("an answer in parts without a usable Content-Range")
    return int(found[1]), None if found[2] == "*" else found[2]


def _refuse_status(response: requests.Response, item: Download, partial: _Partial) -> NoReturn:
    if response.status_code == requests.codes.requested_range_not_satisfiable:
        # The server's file is shorter than the received bytes, so it is another file.
        partial.remove()
    status = f"{response.status_code} {response.reason}"
    if response.status_code in _RETRIED:
        raise _RetryError(status)
    raise StageError(
        f"{item.url}: the server answers {status}. Check the address in fetch.files, and whether "
        f"this machine may reach it."
    )
