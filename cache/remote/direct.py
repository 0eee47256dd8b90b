"""Requests ranges of files over plain HTTP connections, without the file system of the URL.

A file system that signs addresses (S3, Google, Azure) makes one for each file, and a web server's
file has one. Threads then read with urllib3: its processor time for a byte is less than half of
that of the asynchronous clients. If a direct request is refused, fsspec makes it.
"""

import contextlib
import importlib
import io
import os
import threading
import time
import urllib.request
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import fsspec

from . import network
from .threads import ROW_THREADS, SHARD_THREADS
from .urls import WEB

if TYPE_CHECKING:
    import urllib3

SIGNED_SECONDS = 3600
"""How long a signed address is asked to hold."""

RENEW_SECONDS = 300.0
"""Age at which an address is signed again, by the credentials of that time."""

MAX_REDIRECTS = 5


class StatusError(Exception):
    """An answer that is an HTTP error; `network.fault_of` reads its status."""

    def __init__(self, status: int) -> None:
        """Keep the status."""
        super().__init__(f"status {status}")
        self.status = status


class DirectRequests:
    """Ranges of the files of one folder, as long as its server gives them to such requests."""

    def __init__(self, url: str) -> None:
        """Request nothing yet."""
        self._is_web = url.startswith(WEB)
        self._is_usable = True
        self._signed: dict[str, tuple[float, str]] = {}
        # An import of a thread, at a fork, leaves the child a lock that nobody unlocks.
        importlib.import_module("encodings.idna")
        with contextlib.suppress(ImportError):
            importlib.import_module("urllib3")

    def read(
        self, files: fsspec.AbstractFileSystem, path: str, start: int, stop: int, most_bytes: int
    ) -> bytes | None:
        """Request a range of a file.

        Args:
            files: File system of the folder.
            path: Of the file, in it.
            start: First byte.
            stop: The byte after the last.
            most_bytes: Most bytes to take from a server that ignores ranges.

        Returns:
            The bytes; None if the request must go through fsspec.

        Raises:
            StatusError: The server refuses the range.
            Exception: Of urllib3.
        """
        address = self._address(files, path)
        if address is None:
            return None
        from urllib3.exceptions import SSLError

        try:
            return _read(address, start, stop, most_bytes)
        except SSLError:
            # The file system can have certificates of its own, as by AWS_CA_BUNDLE.
            self._is_usable = False
            return None
        except StatusError as error:
            if error.status in (400, *network.REFUSALS):
                # A signature that the server does not take, or a login that only `files` has.
                self._is_usable = False
                return None
            raise

    def _address(self, files: fsspec.AbstractFileSystem, path: str) -> str | None:
        if not self._is_usable:
            return None
        now = time.monotonic()
        signed, address = self._signed.get(path, (-RENEW_SECONDS, ""))
        if now - signed >= RENEW_SECONDS:
            try:
                address = path if self._is_web else files.sign(path, expiration=SIGNED_SECONDS)
                self._is_usable = _can_reach(address)
            except Exception:
                # No signatures in this file system, or no credentials for them.
                self._is_usable = False
            self._signed[path] = now, address
        return address if self._is_usable else None


def _can_reach(address: str) -> bool:
    """Whether urllib3 is here, and no proxy is set for an address."""
    try:
        import urllib3  # noqa: F401
    except ImportError:
        return False
    parts = urlsplit(address)
    host = parts.hostname or ""
    proxied = parts.scheme in urllib.request.getproxies()
    return f"{parts.scheme}://" in WEB and not (proxied and not urllib.request.proxy_bypass(host))


def _read(address: str, start: int, stop: int, most_bytes: int) -> bytes:
    from urllib3.exceptions import MaxRetryError, ProtocolError
    from urllib3.util import Retry

    retries = Retry(
        connect=0,
        read=0,
        status=0,
        other=0,
        redirect=MAX_REDIRECTS,
        respect_retry_after_header=False,
    )
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    try:
        response = _connections().request(
            "GET",
            address,
            headers=headers,
            preload_content=False,
            retries=retries,
            timeout=network.READ_TIMEOUT,
        )
    except MaxRetryError as error:
        reason = error.reason or error
        if isinstance(reason, ProtocolError) and isinstance(
            reason.args[-1], OSError | HTTPException
        ):
            reason = reason.args[-1]
        # Its cause says what the system answered.
        raise reason from reason.__cause__
    try:
        if response.status not in (200, 206):
            raise StatusError(response.status)
        came = response.headers.get("Content-Range", "")
        if came and not came.startswith(f"bytes {start}-{stop - 1}/"):
            raise ConnectionError(f"{came!r} came in place of bytes {start}-{stop - 1}")
        most = stop - start if response.status == 206 else most_bytes
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > most:
            raise ConnectionError(f"{length} bytes instead of {most} were to come")
        # With a length that is right, `read` without an amount makes no copy.
        data = response.read(None if length.isdecimal() else most + 1, decode_content=False)
        response.release_conn()
        return data
    finally:
        # No effect on a connection that was given back.
        response.close()


class TimedReader(io.RawIOBase):
    """Bytes of a socket; those of a server that sends too few in a second end with an error."""

    def __init__(self, reader: io.RawIOBase) -> None:
        """Begin to count."""
        self._reader, self._began, self._num_bytes = reader, time.monotonic(), 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, target: Any) -> int:
        """Read what is there, at least a byte but at the end.

        Raises:
            TimeoutError: The server is too slow, or silent.
        """
        most = network.longest(self._num_bytes)
        if time.monotonic() - self._began > most:
            raise TimeoutError(f"{self._num_bytes} bytes in {most:.0f} seconds")
        count: int = self._reader.readinto(target) or 0
        self._num_bytes += count
        return count

    def close(self) -> None:
        """Close the socket's reader."""
        self._reader.close()
        super().close()


class TimedResponse(HTTPResponse):
    """A response whose head and body are read by a `TimedReader`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Read nothing yet."""
        super().__init__(*arguments, **options)
        self.fp = io.BufferedReader(TimedReader(self.fp.detach()))


_pools: dict[int, Any] = {}

_opening = threading.Lock()


def _timed(kind: Any) -> type:
    return type("TimedConnection", (kind.ConnectionCls,), {"response_class": TimedResponse})


def _connections() -> "urllib3.PoolManager":
    """Return the connections of this process; a forked child makes its own."""
    import urllib3

    with _opening:
        if os.getpid() not in _pools:
            pool = urllib3.PoolManager(maxsize=ROW_THREADS + SHARD_THREADS)
            pool.pool_classes_by_scheme = {
                scheme: type("TimedPool", (kind,), {"ConnectionCls": _timed(kind)})
                for scheme, kind in pool.pool_classes_by_scheme.items()
            }
            _pools[os.getpid()] = pool
    found: urllib3.PoolManager = _pools[os.getpid()]
    return found


def _after_fork() -> None:
    global _opening
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
