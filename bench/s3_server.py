"""A server of the S3 protocol on this machine, so that reading over a network can be measured.

A folder is served as one bucket, by a process of its own: GET with ranges, HEAD and listings, with
any signature. Files go from the page cache to the socket (sendfile), so that several gigabytes a
second take little of the processors that the clients need. A thread answers each connection: it
waits before the first byte of an answer, and sends no faster than it is told. Only the standard
library is imported, so that the process starts within a tenth of a second.
"""

import contextlib
import email.utils
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bench"
"""The name of the bucket."""
MOST_KEYS = 1000
"""In one page of a listing, as with S3."""
PIECE_BYTES = 1 << 17
"""Sent at a time where the rate is limited: 1.5 ms of 90 MB/s."""
STOP_SECONDS = 5.0
"""How long the process may take to end or to answer."""
RANGE = re.compile(r"bytes=(\d*)-(\d*)")
ACCESS = {
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Environment of a client besides the address; the server takes any login."""


@dataclass(frozen=True)
class Network:
    """What lies between a server and its clients."""

    latency_s: float = 0.0
    """Seconds before the first byte of each answer."""
    connection_bytes_per_second: float | None = None
    """Most that one connection carries; None is no limit."""


@dataclass(frozen=True)
class Served:
    """What a server has done since it started."""

    requests: int
    body_bytes: int
    """Of all answers, without their headers."""
    connections: int
    cpu_seconds: float


class Server:
    """A running server, as seen from the process that started it."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self._process = process
        self.url = f"http://127.0.0.1:{port}"
        """Of the endpoint; the bucket is `BUCKET`."""

    @property
    def process_id(self) -> int:
        """Of the server's process."""
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which clients of AWS's own and of Apache's libraries find the server."""
        return ACCESS | {"AWS_ENDPOINT_URL": self.url, "AWS_ALLOW_HTTP": "true"}

    def served(self) -> Served:
        """Ask the server what it has done."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("served\n")
        self._process.stdin.flush()
        return Served(**json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def serving(folder: Path, network: Network) -> Iterator[Server]:
    """Serve a folder as the bucket `BUCKET` until the block ends.

    Args:
        folder: Its files are the objects; their paths are the keys.
        network: Latency and rate of the answers.

    Raises:
        RuntimeError: The process does not start.
    """
    # A command, not a fork: a server that inherits the client's threads and locks could hang.
    program = "import json, sys; from bench.s3_server import run; run(**json.loads(sys.argv[1]))"
    arguments = json.dumps({"folder": str(folder.absolute()), "network": asdict(network)})
    process = subprocess.Popen(
        [sys.executable, "-c", program, arguments],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline()
            if not port:
                raise RuntimeError("the server of the S3 protocol does not start")
            yield Server(process, int(port))
        finally:
            process.kill()
            process.wait(STOP_SECONDS)


def run(folder: str, network: Mapping[str, float | None]) -> None:
    """Serve a folder until standard input ends, and answer each of its lines with the counts."""
    counts = _Counts()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    threading.Thread(
        target=_accept,
        args=(listener, Path(folder), Network(**network), counts),  # type: ignore[arg-type]
        daemon=True,
    ).start()
    print(listener.getsockname()[1], flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(counts.served())), flush=True)


@dataclass
class _Counts:
    requests: int = 0
    body_bytes: int = 0
    connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *, requests: int = 0, body_bytes: int = 0, connections: int = 0) -> None:
        with self.lock:
            self.requests += requests
            self.body_bytes += body_bytes
            self.connections += connections

    def served(self) -> Served:
        with self.lock:
            return Served(self.requests, self.body_bytes, self.connections, time.process_time())


def _accept(listener: socket.socket, folder: Path, network: Network, counts: _Counts) -> None:
    while True:
        connection, _ = listener.accept()
        counts.add(connections=1)
        answering = _Connection(connection, folder, network, counts)
        threading.Thread(target=answering.answer_all, daemon=True).start()


@dataclass(frozen=True)
class _Answer:
    status: HTTPStatus
    headers: Mapping[str, str | int] = field(default_factory=dict)
    body: bytes = b""
    path: Path | None = None
    """File whose bytes `start` to `start` + Content-Length are the body."""
    start: int = 0


class _Connection:
    """Answers one request after the other."""

    def __init__(
        self, connection: socket.socket, folder: Path, network: Network, counts: _Counts
    ) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._folder, self._network = connection, folder, network
        self._counts, self._received = counts, b""

    def answer_all(self) -> None:
        """Answer until the client closes the connection."""
        with self._socket, contextlib.suppress(OSError):
            while head := self._next_head():
                method, target, headers = _parsed(head)
                started = time.perf_counter()
                answer = answer_to(self._folder, method, target, headers.get("range"))
                time.sleep(max(0.0, started + self._network.latency_s - time.perf_counter()))
                self._send(answer, with_body=method != "HEAD")

    def _next_head(self) -> bytes | None:
        """Return a request up to its empty line; requests with a body are not understood."""
        while b"\r\n\r\n" not in self._received:
            piece = self._socket.recv(1 << 16)
            if not piece:
                return None
            self._received += piece
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        return head

    def _send(self, answer: _Answer, *, with_body: bool) -> None:
        length = int(answer.headers.get("Content-Length", len(answer.body)))
        headers = {
            "Content-Length": length,
            "Date": email.utils.formatdate(usegmt=True),
            "x-amz-request-id": "benchmark",
            **answer.headers,
        }
        lines = [f"HTTP/1.1 {answer.status.value} {answer.status.phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        has_file = with_body and answer.path is not None and length > 0
        head = "\r\n".join([*lines, "", ""]).encode() + (answer.body if with_body else b"")
        self._socket.sendall(head, socket.MSG_MORE if has_file else 0)
        if has_file and answer.path is not None:
            self._send_file(answer.path, answer.start, length)
        self._counts.add(requests=1, body_bytes=length if with_body else 0)

    def _send_file(self, path: Path, offset: int, length: int) -> None:
        rate, started, sent = self._network.connection_bytes_per_second, time.perf_counter(), 0
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while sent < length:
                piece = min(length - sent, PIECE_BYTES if rate else length)
                if rate:
                    # When a connection of that rate would have its last byte.
                    due = started + (sent + piece) / rate
                    time.sleep(max(0.0, due - time.perf_counter()))
                done = os.sendfile(self._socket.fileno(), descriptor, offset + sent, piece)
                if not done:
                    raise OSError(f"{path} became shorter")
                sent += done
        finally:
            os.close(descriptor)


def _parsed(head: bytes) -> tuple[str, str, dict[str, str]]:
    request, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = request.split(" ", 2)
    pairs = (line.partition(":") for line in lines)
    return method, target, {name.lower(): value.strip() for name, _, value in pairs}


def answer_to(folder: Path, method: str, target: str, byte_range: str | None) -> _Answer:
    """Return the answer to a request, by the path of the bucket.

    Args:
        folder: Of the bucket.
        method: GET or HEAD; others are refused.
        target: Path and query of the request.
        byte_range: The header Range, if any.
    """
    parts = urlsplit(target)
    bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
    query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
    if method not in ("GET", "HEAD"):
        return _refusal(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented")
    if bucket != BUCKET:
        return _refusal(HTTPStatus.NOT_FOUND, "NoSuchBucket")
    if not key:
        return _listing(folder, query) if "list-type" in query else _xml("LocationConstraint", "")
    return _object(folder / key, byte_range)


def _object(path: Path, byte_range: str | None) -> _Answer:
    if not path.is_file():
        return _refusal(HTTPStatus.NOT_FOUND, "NoSuchKey")
    status = path.stat()
    headers: dict[str, str | int] = {
        "Accept-Ranges": "bytes",
        "Content-Type": "binary/octet-stream",
        "ETag": f'"{_etag(status)}"',
        "Last-Modified": email.utils.formatdate(status.st_mtime, usegmt=True),
    }
    if byte_range is None or not (asked := RANGE.fullmatch(byte_range)):
        return _Answer(
            HTTPStatus.OK, headers | {"Content-Length": status.st_size}, path=path, start=0
        )
    first, last = asked.groups()
    start = int(first) if first else max(0, status.st_size - int(last or 0))
    stop = min(status.st_size, int(last) + 1) if first and last else status.st_size
    if start >= stop:
        return _refusal(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "InvalidRange")
    headers |= {
        "Content-Length": stop - start,
        "Content-Range": f"bytes {start}-{stop - 1}/{status.st_size}",
    }
    return _Answer(HTTPStatus.PARTIAL_CONTENT, headers, path=path, start=start)


def _etag(status: os.stat_result) -> str:
    return f"{status.st_size:016x}{status.st_mtime_ns:016x}"


def _listing(folder: Path, query: Mapping[str, str]) -> _Answer:
    """Return a page of ListObjectsV2; the token of the next page is the last name of this one."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token", query.get("start-after", ""))
    most = min(MOST_KEYS, int(query.get("max-keys", MOST_KEYS)))
    names = [name for name in _names(folder, prefix, delimiter) if name > after]
    shown, is_cut = names[:most], len(names) > most
    token = f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>" if is_cut else ""
    encode = quote if query.get("encoding-type") == "url" else escape
    entries = "".join(_entry(folder, name, delimiter, encode(name)) for name in shown)
    return _xml(
        "ListBucketResult",
        f"<Name>{BUCKET}</Name><Prefix>{encode(prefix)}</Prefix><KeyCount>{len(shown)}</KeyCount>"
        f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(is_cut).lower()}</IsTruncated>"
        f"{'<EncodingType>url</EncodingType>' if encode is quote else ''}{token}{entries}",
    )


def _names(folder: Path, prefix: str, delimiter: str) -> list[str]:
    """Return the keys with a prefix, those with a delimiter after it cut there; sorted."""
    names = set()
    for path in folder.rglob("*"):
        key = path.relative_to(folder).as_posix()
        if path.is_file() and key.startswith(prefix):
            head, found, _ = key[len(prefix) :].partition(delimiter or "\0")
            names.add(prefix + head + found)
    return sorted(names)


def _entry(folder: Path, name: str, delimiter: str, encoded: str) -> str:
    if delimiter and name.endswith(delimiter):
        return f"<CommonPrefixes><Prefix>{encoded}</Prefix></CommonPrefixes>"
    status = (folder / name).stat()
    modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
    return (
        f"<Contents><Key>{encoded}</Key><LastModified>{modified}</LastModified>"
        f"<ETag>&quot;{_etag(status)}&quot;</ETag><Size>{status.st_size}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
    )


def _xml(name: str, inside: str, status: HTTPStatus = HTTPStatus.OK) -> _Answer:
    # Clients look for the parts of an error outside of any namespace.
    is_error = status >= HTTPStatus.BAD_REQUEST
    opening = name if is_error else f'{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<{opening}>{inside}</{name}>'
    return _Answer(status, {"Content-Type": "application/xml"}, body.encode())


def _refusal(status: HTTPStatus, code: str) -> _Answer:
    return _xml("Error", f"<Code>{code}</Code><Message>{status.phrase}</Message>", status)
