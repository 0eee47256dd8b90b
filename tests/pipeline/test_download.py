import contextlib
import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from urllib3.exceptions import HTTPError

from pipeline import download as module
from pipeline.download import check_free_space, download
from pipeline.settings import Download
from workspace.errors import StageError

CONTENT = bytes(range(256)) * 1000


@dataclass
class Remote:
    """What the server does; each test changes what it is about."""

    content: bytes = CONTENT
    etag: str | None = '"one"'
    honours_range: bool = True
    drop_after: list[int] = field(default_factory=list)
    """Bytes after which the connection of each coming answer is cut."""
    statuses: list[int] = field(default_factory=list)
    """Answers without content to give first."""
    requests: list[dict[str, str]] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    def answer(self, handler):
        self.requests.append(dict(handler.headers))
        if self.statuses:
            handler.send_response(self.statuses.pop(0))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start = self.start(handler)
        if start >= len(self.content) > 0:
            handler.send_response(416)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body)))
        if start:
            last = len(self.content) - 1
            handler.send_header("Content-Range", f"bytes {start}-{last}/{len(self.content)}")
        if self.etag:
            handler.send_header("ETag", self.etag)
        handler.end_headers()
        cut = self.drop_after.pop(0) if self.drop_after else len(body)
        handler.wfile.write(body[:cut])
        self.sent += len(body[:cut])
        handler.close_connection = True

    def start(self, handler):
        asked = handler.headers.get("Range")
        if not asked or not self.honours_range:
            return 0
        if handler.headers.get("If-Range", self.etag) != self.etag:
            return 0
        return int(asked.removeprefix("bytes=").removesuffix("-"))


@pytest.fixture
def remote(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    state = Remote()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            state.answer(self)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/data/train.bin"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def item(remote, *, content=CONTENT, hashed=True):
    sha256 = hashlib.sha256(content).hexdigest() if hashed else None
    return Download(url=remote.url, path="unused", bytes=len(content), sha256=sha256)


def starts(remote):
    return [headers.get("Range", "bytes=0-") for headers in remote.requests]


def stop_after(remote, folder, num_bytes, monkeypatch, **options):
    """Leave behind what a process leaves that is killed after some bytes."""
    receive = module._receive

    def receive_then_die(*arguments):
        with contextlib.suppress(HTTPError):
            receive(*arguments)
        raise KeyboardInterrupt

    remote.drop_after = [num_bytes]
    monkeypatch.setattr(module, "_receive", receive_then_die)
    with pytest.raises(KeyboardInterrupt):
        download(item(remote, **options), folder)
    monkeypatch.setattr(module, "_receive", receive)
    remote.requests.clear()
    remote.sent = 0


def test_a_file_arrives_whole_and_is_not_asked_for_twice(remote, tmp_path):
    path = download(item(remote), tmp_path)
    assert path == tmp_path / "train.bin"
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.bin"]
    assert download(item(remote), tmp_path) == path
    assert len(remote.requests) == 1


@pytest.mark.parametrize("hashed", [True, False])
def test_dropped_connections_cost_no_byte_twice(remote, tmp_path, hashed):
    remote.drop_after = [10_000, 1, 77_777]
    assert download(item(remote, hashed=hashed), tmp_path).read_bytes() == CONTENT
    assert remote.sent == len(CONTENT)
    assert starts(remote) == ["bytes=0-", "bytes=10000-", "bytes=10001-", "bytes=87778-"]
    assert all(headers["If-Range"] == '"one"' for headers in remote.requests[1:])


def test_another_process_continues_after_a_kill(remote, tmp_path, monkeypatch):
    stop_after(remote, tmp_path, 123_456, monkeypatch)
    assert download(item(remote), tmp_path).read_bytes() == CONTENT
    assert starts(remote) == ["bytes=123456-"]
    assert remote.sent == len(CONTENT) - 123_456


def test_a_file_changed_in_between_is_fetched_from_its_start(remote, tmp_path, monkeypatch):
    stop_after(remote, tmp_path, 5_000, monkeypatch, hashed=False)
    changed = CONTENT[::-1]
    remote.content, remote.etag = changed, '"two"'
    found = download(item(remote, content=changed, hashed=False), tmp_path)
    assert found.read_bytes() == changed


def test_a_change_is_seen_even_where_if_range_is_not_understood(remote, tmp_path, monkeypatch):
    stop_after(remote, tmp_path, 5_000, monkeypatch, hashed=False)
    changed = CONTENT[::-1]
    remote.content, remote.etag = changed, 'W/"two"'
    remote.start = lambda handler: 5_000 if "Range" in handler.headers else 0
    found = download(item(remote, content=changed, hashed=False), tmp_path)
    assert found.read_bytes() == changed


def test_a_server_without_ranges_makes_it_start_over(remote, tmp_path):
    remote.honours_range = False
    remote.drop_after = [100_000]
    assert download(item(remote), tmp_path).read_bytes() == CONTENT
    assert remote.sent == len(CONTENT) + 100_000


def test_without_version_and_hash_old_bytes_are_dropped(remote, tmp_path):
    remote.etag = None
    remote.drop_after = [100_000]
    assert download(item(remote, hashed=False), tmp_path).read_bytes() == CONTENT
    assert starts(remote) == ["bytes=0-", "bytes=0-"]


def test_a_hash_lets_it_continue_without_a_version(remote, tmp_path):
    remote.etag = None
    remote.drop_after = [100_000]
    assert download(item(remote), tmp_path).read_bytes() == CONTENT
    assert remote.sent == len(CONTENT)


def test_a_remainder_that_the_server_lacks_starts_the_download_over(remote, tmp_path, monkeypatch):
    stop_after(remote, tmp_path, 123_456, monkeypatch)
    remote.statuses = [416]
    assert download(item(remote), tmp_path).read_bytes() == CONTENT
    assert starts(remote) == ["bytes=123456-", "bytes=0-"]


def test_a_busy_server_is_asked_again_and_in_the_end_given_up(remote, tmp_path):
    remote.statuses = [503, 429]
    assert download(item(remote), tmp_path).read_bytes() == CONTENT
    remote.url += ".other"
    remote.statuses = [503] * 5
    with pytest.raises(StageError, match=r"gave up after 5 attempts without a byte: 503"):
        download(item(remote), tmp_path)


def test_an_unreachable_server_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)
    nowhere = Download(url="http://127.0.0.1:9/a.zip", path="unused", bytes=3)
    with pytest.raises(StageError, match=r"http://127\.0\.0\.1:9/a\.zip: gave up after 5"):
        download(nowhere, tmp_path)


def test_a_missing_file_is_not_asked_for_again(remote, tmp_path):
    remote.statuses = [404]
    with pytest.raises(StageError, match=r"train\.bin: the server answers 404"):
        download(item(remote), tmp_path)
    assert len(remote.requests) == 1


def test_a_file_of_another_size_is_refused_before_it_is_fetched(remote, tmp_path):
    remote.content = CONTENT + b"more"
    with pytest.raises(StageError, match=r"wanted 256000 bytes, the server offers 256004"):
        download(item(remote), tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_bytes_of_the_right_size_are_refused_and_deleted(remote, tmp_path):
    remote.content = CONTENT[::-1]
    with pytest.raises(StageError, match=r"wanted sha256 \w{64}, found \w{64}.*run again"):
        download(item(remote), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_replaced(remote, tmp_path):
    (tmp_path / "train.bin").write_bytes(b"x" * len(CONTENT))
    assert download(item(remote), tmp_path).read_bytes() == CONTENT


def test_too_little_space_is_refused_before_anything_starts(remote, tmp_path):
    huge = Download(url=remote.url, path="unused", bytes=10**18)
    with pytest.raises(StageError, match=r"909494\.7 TiB are still to be downloaded"):
        check_free_space((huge,), tmp_path)
    check_free_space((item(remote),), tmp_path)
    assert not remote.requests
