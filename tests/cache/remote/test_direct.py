"""Ranges over plain connections, and what goes to the file system of the URL instead."""

import gc
import sys
import threading

import fsspec
import numpy as np
import pytest
from s3fs import S3FileSystem

from cache.remote import direct, threads
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


def test_an_error_is_that_of_the_future():
    with pytest.raises(ZeroDivisionError):
        threads.submit(threads.GATHER, lambda: 1 / 0).result(10)


def test_a_store_that_nobody_uses_goes_at_once_though_shards_are_queued(server, wide):
    released = threading.Event()
    for name in wide.names:
        server.fail(name, "stall", released)
    opened = FeatureStore(server.url)
    opened.read_ahead(range(opened.num_shards))
    before = sum(server.requests["GET", name] for name in wide.names)
    del opened
    gc.collect()
    released.set()
    threads.submit(threads.WHOLE_SHARD, lambda: None).result(30)
    asked = sum(server.requests["GET", name] for name in wide.names)
    assert asked - before <= 4 * threads.SHARD_THREADS < 4 * len(wide.names)
