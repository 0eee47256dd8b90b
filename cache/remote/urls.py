"""URLs of files: what is one, which kinds there are, and the file system behind each."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from ..errors import SettingsError, UnreachableStoreError
from ..texts import one_line
from . import network

URL = re.compile(r"[A-Za-z][\w+.-]*:")

WEB = ("http://", "https://")

HUB = "hf://"

BUCKET = f"{HUB}buckets/"

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf")
"""Schemes of servers whose puts replace an object in one step."""

SERVERS = (*OBJECT_STORES, "http", "https")
"""Schemes of servers; `file` and chains of file systems lead to files of this machine."""

LOCAL = ("file", "local")
"""Schemes of folders of this machine."""

READ_ONLY = frozenset({"http", "https", "data", "git", "github", "tar", "zip", "reference"})
"""Schemes of URLs that cannot be written."""


def is_url(path: str | Path) -> bool:
    """Whether a path is an fsspec URL."""
    return isinstance(path, str) and "://" in path and bool(URL.match(path))


def check_writable(url: str) -> None:
    """Refuse a URL of a kind that cannot be written; nothing is requested.

    Raises:
        SettingsError: Says what can be written instead.
    """
    scheme = url.partition("://")[0].lower()
    wanted = (
        "Wanted a URL that can be written, such as s3://bucket/folder, gs://bucket/folder, "
        "hf://buckets/owner/name or file:///mnt/folder."
    )
    if not is_url(url):
        raise SettingsError(f"{url}: is no URL. {wanted}")
    if scheme == "hf" and not url.startswith(BUCKET):
        raise SettingsError(
            f"{url}: a repository of the Hub is written in commits, by `hf upload`; name a bucket "
            f"({BUCKET}owner/name)."
        )
    if scheme in READ_ONLY or "::" in url:
        raise SettingsError(f"{url}: can only be read. {wanted}")


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it; nothing is requested yet.

    Raises:
        SettingsError: A URL of a kind that cannot be read here.
        UnreachableStoreError: A server that is contacted at once, as by ftp://, does not answer.
    """
    # Without the slashes at its end it would be a local path.
    url = f"{url}//" if url.endswith(":") else url
    _check_host(url)
    try:
        found: tuple[fsspec.AbstractFileSystem, str] = fsspec.core.url_to_fs(
            _decoded(url), **_options(url)
        )
    except (ValueError, ImportError, TypeError, AttributeError) as error:
        raise SettingsError(f"{url}: cannot be read here: {one_line(error)}") from None
    except OSError as error:
        fault = network.fault_of(error)
        raise UnreachableStoreError(f"{url}: {fault.reason}. {fault.remedy}") from None
    return found


def _check_host(url: str) -> None:
    kind, _, place = url.partition("://")
    if kind.lower() in LOCAL and not place.strip("/"):
        raise SettingsError(f"{url}: names no folder.")
    if url.partition("://")[0].lower() not in SERVERS:
        return
    try:
        parts = urlsplit(url)
        is_named = bool(parts.hostname if url.startswith(WEB) and parts.port != 0 else parts.netloc)
    except ValueError as error:
        raise SettingsError(f"{url}: is no address: {one_line(error)}.") from None
    if not is_named:
        raise SettingsError(f"{url}: names no bucket or host.")


def _options(url: str) -> dict[str, Any]:
    if url.startswith(HUB):
        # A cached file system would repeat its old listing, and a refusal after the login.
        return {"skip_instance_cache": True}
    if not url.startswith(WEB):
        return {}
    from aiohttp import ClientTimeout

    # In place of aiohttp's five minutes for a whole file.
    timeout = ClientTimeout(
        total=None, sock_connect=network.READ_TIMEOUT, sock_read=network.READ_TIMEOUT
    )
    return {"client_kwargs": {"timeout": timeout}}


def _decoded(url: str) -> str:
    """Return a URL as its file system takes it: that of `file` takes no `%20` for a space."""
    if not url.startswith("file://"):
        return url
    path = url.removeprefix("file://")
    # An existing folder can have such signs in its name.
    return url if Path(path).exists() else f"file://{unquote(path)}"
