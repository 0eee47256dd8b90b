"""Ranges over plain connections, and what goes to the file system of the URL instead."""

import gc
import socket
import sys
import threading
import time
from http.client import BadStatusLine

import fsspec
import numpy as np
import pytest
from s3fs import S3FileSystem
from urllib3.exceptions import ReadTimeoutError, SSLError

from cache.errors import UnreachableStoreError
from cache.remote import direct, network, threads
from cache.remote.copies import RemoteFolder
from cache.store import FeatureStore

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def fetched(monkeypatch):
    """Ranges that were read over plain connections."""
    found = []
    real = direct._read

    def read(address, start, stop, most_bytes):
        found.append((address, start, stop))
        return real(address, start, stop, most_bytes)

    monkeypatch.setattr(direct, "_read", read)
    return found


@pytest.fixture
def by_file_system(monkeypatch):
    found = []
    real = S3FileSystem._cat_file

    async def cat_file(files, path, **options):
        found.append(path)
        return await real(files, path, **options)

    monkeypatch.setattr(S3FileSystem, "_cat_file", cat_file)
    # An instance keeps the methods that it was made with.
    S3FileSystem.clear_instance_cache()
    return found


def assert_right(url, built):
    assert np.array_equal(FeatureStore(url).gather(built.image_ids), built.features)


def test_s3_and_the_web_are_read_over_plain_connections(
    s3_store, server, wide, fetched, by_file_system
):
    assert_right(s3_store, wide)
    assert any("Signature" in address for address, _, _ in fetched)
    assert by_file_system == []


def test_an_address_is_signed_once_in_a_while(s3_store, wide, monkeypatch):
    signed = []
    real = S3FileSystem.sign
    monkeypatch.setattr(
        S3FileSystem, "sign", lambda files, path, **o: signed.append(path) or real(files, path, **o)
    )
    folder = RemoteFolder(s3_store)
    name = wide.names[0]
    size = (wide.root / name).stat().st_size
    for _ in range(3):
        assert folder.read(name, 10, 20, size)[1] == (wide.root / name).read_bytes()[10:20]
    assert len(signed) == 1
    monkeypatch.setattr(direct, "RENEW_SECONDS", 0.0)
    folder.read(name, 10, 20, size)
    assert len(signed) == 2


def refuse(*arguments, **options):
    raise NotImplementedError


REASONS = {
    "no signature": lambda patch: patch.setattr(S3FileSystem, "sign", refuse),
    "a signature that is refused": lambda patch: patch.setattr(
        direct, "_read", lambda *arguments: (_ for _ in ()).throw(direct.StatusError(403))
    ),
    "a proxy": lambda patch: (
        patch.setattr("urllib.request.getproxies", lambda: {"http": "http://proxy"}),
        patch.setattr("urllib.request.proxy_bypass", lambda host: False),
    ),
    "another certificate authority": lambda patch: patch.setattr(
        direct, "_read", lambda *arguments: (_ for _ in ()).throw(SSLError("unknown issuer"))
    ),
    "no urllib3": lambda patch: patch.setitem(sys.modules, "urllib3", None),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_a_plain_request_does_not_get_the_file_system_gets(
    s3_store, wide, monkeypatch, by_file_system, reason
):
    with monkeypatch.context() as patch:
        REASONS[reason](patch)
        assert_right(s3_store, wide)
    assert by_file_system


def test_more_bytes_than_asked_for_are_not_taken(server, wide):
    name = wide.names[0]
    server.fail(name, "whole")
    with pytest.raises(ConnectionError, match="bytes instead of 100 were to come"):
        direct._read(f"{server.url}/{name}", 0, 10, most_bytes=100)


def test_an_answer_to_another_request_is_not_taken(server, wide):
    name = wide.names[0]
    server.fail(name, "range", "bytes 0-9/99")
    with pytest.raises(ConnectionError, match="in place of bytes 10-19"):
        direct._read(f"{server.url}/{name}", 10, 20, most_bytes=100)


def test_a_status_is_told_at_once_whenever_the_server_wants_to_be_asked_again(server, wide):
    name = wide.names[0]
    server.fail(name, "later", 429)
    with pytest.raises(direct.StatusError, match="429"):
        direct._read(f"{server.url}/{name}", 10, 20, most_bytes=100)


def test_a_server_that_sends_a_byte_now_and_then_is_not_waited_for(server, wide, monkeypatch):
    monkeypatch.setattr(network, "READ_TIMEOUT", 0.3)
    name = wide.names[0]
    server.fail(name, "drip", 0.05)
    started = time.monotonic()
    with pytest.raises(ReadTimeoutError) as caught:
        direct._read(f"{server.url}/{name}", 0, 1000, most_bytes=1000)
    assert time.monotonic() - started < 5
    assert network.fault_of(caught.value).reason == "no answer in time"


def test_a_file_system_that_gets_a_byte_now_and_then_is_not_waited_for(server, wide, monkeypatch):
    monkeypatch.setattr(direct, "_can_reach", lambda address: False)
    monkeypatch.setattr(network, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(network, "LEAST_RATE", 1e6)
    name = wide.names[0]
    folder = RemoteFolder(server.url)
    server.fail(name, "drip", 0.05)
    with pytest.raises(UnreachableStoreError, match="no answer in time"):
        folder.read(name, 0, 1000, (wide.root / name).stat().st_size)


def test_what_does_not_speak_http_is_called_so(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            connection.sendall(b"\x8f\xff\x01 \xc3 garbage\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(BadStatusLine) as caught:
            direct._read(f"http://127.0.0.1:{listener.getsockname()[1]}/x", 0, 9, most_bytes=9)
        thread.join(10)
    assert network.fault_of(caught.value).reason == "the server does not speak HTTP"


def test_a_file_system_without_ranges_does_not_read_ahead(wide):
    files = fsspec.filesystem("memory")
    for path in wide.root.iterdir():
        files.pipe(f"/direct/{path.name}", path.read_bytes())
    assert_right("memory://direct", wide)
    files.rm("/direct", recursive=True)


# Threads


def test_urgent_calls_overtake_others():
    pool, order, go = threads.PriorityThreads(1), [], threading.Event()
    pool.submit(threads.GATHER, go.wait, 10)
    calls = [(threads.PREFETCH, 1), (threads.PREFETCH, 2), (threads.GATHER, 3)]
    futures = [pool.submit(urgency, order.append, number) for urgency, number in calls]
    go.set()
    for future in futures:
        future.result(10)
    assert order == [3, 1, 2]


def test_a_check_begins_when_no_request_is_left(monkeypatch):
    monkeypatch.setattr(threads, "_of_process", {})
    order, go = [], threading.Event()
    running = threads.submit(threads.GATHER, go.wait, 10)
    check = threads.submit(threads.CHECK, order.append, threads.CHECK)
    later = [threads.submit(kind, order.append, kind) for kind in (threads.WHOLE_SHARD, 1, 0)]
    for future in later:
        future.result(10)
    go.set()
    check.result(10)
    assert running.result(10)
    assert order[-1] == threads.CHECK


def test_an_error_is_that_of_the_future():
    with pytest.raises(ZeroDivisionError):
        threads.submit(threads.GATHER, lambda: 1 / 0).result(10)


def test_a_store_that_nobody_uses_goes_at_once_though_shards_are_queued(server, wide, monkeypatch):
    monkeypatch.setattr(threads, "_of_process", {})
    monkeypatch.setattr(threads, "ROW_THREADS", 2)
    monkeypatch.setattr(threads, "SHARD_THREADS", 2)
    released = threading.Event()
    for name in wide.names:
        server.fail(name, "stall", released)
    opened = FeatureStore(server.url)
    opened.read_ahead(range(opened.num_shards))
    before = sum(server.requests["GET", name] for name in wide.names)
    del opened
    gc.collect()
    released.set()
    for urgency in (threads.PREFETCH, threads.WHOLE_SHARD):
        threads.submit(urgency, lambda: None).result(30)
    asked = sum(server.requests["GET", name] for name in wide.names)
    assert asked - before <= 4 * (2 + 2) < 2 * len(wide.names)
