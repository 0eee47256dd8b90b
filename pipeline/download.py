"""Downloads one file over HTTP so that a broken connection or a kill costs nothing.

The bytes so far lie in `<name>.partial`, and beside them what the server said about the file's
version: they are continued only while that stays the same. A file gets its own name when size and
hash are right.
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
"""Attempts in a row that bring no byte, after which the download is given up."""

FIRST_PAUSE_S = 1.0
"""Pause after the first of them; each further one is twice as long."""

TIMEOUT_S = (10, 60)
"""To connect, and between two packets."""

_RETRIED = (408, 416, 425, 429, 500, 502, 503, 504)
"""Answers that another attempt can change."""


class _RetryError(Exception):
    """An attempt failed in a way that another attempt may not."""


@dataclass(frozen=True)
class _Partial:
    """The bytes received so far and the version of the file they are of."""

    path: Path

    @property
    def version_path(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> dict[str, str]:
        try:
            with reading_foreign_file(StageError, self.version_path):
                found = dict(json.loads(self.version_path.read_text(encoding="utf-8")))
        except StageError:
            return {}
        return {name: value for name, value in found.items() if isinstance(value, str)}

    def restart(self, version: dict[str, str]) -> None:
        self.remove()
        write_json(self.version_path, version)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.version_path.unlink(missing_ok=True)


def download(item: Download, folder: Path) -> Path:
    """Bring a file into a folder, unless it is there; continue where an earlier call stopped.

    Args:
        item: What to download.
        folder: Where finished and partial files lie between calls.

    Returns:
        The finished file, of the published size and hash.

    Raises:
        StageError: The server has no such file or another one, or cannot be reached.
    """
    path = local_path(item, folder)
    if path.exists() and problem(path, item) is None:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = _Partial(path.with_name(path.name + ".partial"))
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
    """Return where `download` puts a file: the last part of its address, in `folder`."""
    return folder / PurePosixPath(urlsplit(item.url).path).name


def problem(path: Path, item: Download) -> str | None:
    """Say how a file differs from what is published, or return None if it does not."""
    size = path.stat().st_size
    if size != item.bytes:
        return f"wanted {item.bytes} bytes, found {size}"
    if item.sha256 is not None and (found := sha256_of(path)) != item.sha256:
        return f"wanted sha256 {item.sha256}, found {found}"
    return None


def check_free_space(items: tuple[Download, ...], folder: Path) -> None:
    """Refuse to start what cannot be finished.

    Raises:
        StageError: The files that are not in `folder` yet need more than its disk has free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(_missing_bytes(local_path(item, folder), item) for item in items)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise StageError(
            f"fetch.files: {human_size(missing)} are still to be downloaded to {folder}, "
            f"{human_size(missing - free)} more than is free there. Free some space, or work in a "
            f"folder on another disk."
        )


def _missing_bytes(path: Path, item: Download) -> int:
    if path.exists():
        return 0
    return max(0, item.bytes - _Partial(path.with_name(path.name + ".partial")).size())


def _receive_all(item: Download, partial: _Partial) -> None:
    fruitless = 0
    with requests.Session() as session, _bar(item, partial) as bar:
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


def _bar(item: Download, partial: _Partial) -> "tqdm[NoReturn]":
    return tqdm(
        desc=f"fetch {local_path(item, Path()).name}",
        total=item.bytes,
        initial=partial.size(),
        unit="B",
        unit_scale=True,
        disable=None,
    )


def _receive(
    session: requests.Session, item: Download, partial: _Partial, bar: "tqdm[NoReturn]"
) -> None:
    """Make one request and append what it brings."""
    headers = _range_headers(item, partial)
    with session.get(item.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        _accept(response, item, partial)
        with path_in_errors(partial.path), partial.path.open("ab") as file:
            bar.n = file.tell()
            # Not iter_content, which throws away the part of a chunk that came before a break.
            while chunk := response.raw.read1(CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > item.bytes:
                    break


def _range_headers(item: Download, partial: _Partial) -> dict[str, str]:
    # Compressed on the way, the offsets would be those of other bytes.
    headers = {"Accept-Encoding": "identity"}
    version, size = partial.version(), partial.size()
    if size and not version and item.sha256 is None:
        # Nothing could tell whether old and new bytes are of the same file.
        partial.remove()
    elif size:
        headers["Range"] = f"bytes={size}-"
        # A weak ETag says nothing about bytes, so a server must not honour it here.
        validator = version.get("ETag", "W/")
        if validator.startswith("W/"):
            validator = version.get("Last-Modified", "")
        if validator:
            headers["If-Range"] = validator
    return headers


def _accept(response: requests.Response, item: Download, partial: _Partial) -> None:
    """Make the partial file ready to append this answer, or refuse the answer."""
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
        # An answer in parts may leave out headers that the whole had.
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
    """Return the first byte's position and the size of the whole, if the server knows it."""
    found = re.fullmatch(
        r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip()
    )
    if found is None:
        raise _RetryError("an answer in parts without a usable Content-Range")
    return int(found[1]), None if found[2] == "*" else found[2]


def _refuse_status(response: requests.Response, item: Download, partial: _Partial) -> None:
    if response.status_code == requests.codes.requested_range_not_satisfiable:
        # The server's file is shorter than what is here: not the same file.
        partial.remove()
    status = f"{response.status_code} {response.reason}"
    if response.status_code in _RETRIED:
        raise _RetryError(status)
    raise StageError(
        f"{item.url}: the server answers {status}. Check the address in fetch.files, and whether "
        f"this machine may reach it."
    )
