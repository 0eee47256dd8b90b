"""Stores behind a web server with faults: never wrong bytes, and an error of one line."""

import dataclasses
import functools
import multiprocessing
import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cache.audit import audit
from cache.errors import (
    CorruptShardError,
    IncompleteStoreError,
    PatchcacheError,
    SpecMismatchError,
    UnreachableStoreError,
)
from cache.files.atomic import sha256_of
from cache.inspect import inspect
from cache.remote import network
from cache.remote.copies import BoundedFile
from cache.remote.location import Location
from cache.spec import Spec
from cache.store import FeatureStore
from cache.store_index import INDEX_FILE, PROBE_FILE, StoreIndex
from cache.verify import verify
from tests.cache.remote.fault_server import FaultServer


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(network, "BACK_OFF", (0.0, 0.0, 0.0))


@pytest.fixture
def server(store):
    running = FaultServer(store.root)
    yield running
    running.stop()


@pytest.fixture
def with_probe(store):
    """The store with a probe, of whatever bytes."""
    path = store.root / PROBE_FILE
    path.write_bytes(b"probe" * 100)
    table = StoreIndex.read(store.root / INDEX_FILE, store.spec)
    dataclasses.replace(table, probe_sha256=sha256_of(path)).write(store.root / INDEX_FILE)


def gathers(url, store):
    return np.array_equal(FeatureStore(url).gather(store.image_ids), store.features)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


FILES = ["spec.json", INDEX_FILE, "shard"]


def named(store, name):
    return store.names[1] if name == "shard" else name


# Wrong bytes


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [20, 300, -10, -600])
def test_bytes_that_are_flipped_on_their_way_are_fetched_again(store, server, name, place, times):
    server.fail(named(store, name), "flip", place, times)
    assert gathers(server.url, store)
    if name != "shard":
        assert server.requests["GET", name] == times + 1


def test_a_shard_that_was_changed_on_the_server_is_refused_with_both_hashes(store, server):
    path = store.root / store.names[1]
    wanted = sha256_of(path)
    flip(path, -1)
    report = FeatureStore(server.url).verify()
    assert report.bad_files == [path.name]
    line = report.problems[0]
    assert all(text in line for text in (f"{server.url}/{path.name}", wanted, sha256_of(path)))
    assert line.count(path.name) == 1
    assert server.requests["GET", path.name] == 3


def test_a_store_in_any_file_system_is_held_against_its_hashes(store):
    files = fsspec.filesystem("memory")
    for path in store.root.iterdir():
        files.pipe(f"/changed/{path.name}", path.read_bytes())
    opened = FeatureStore("memory://changed")
    as_file = FeatureStore(store.root.as_uri())
    flip(store.root / store.names[2], -1)
    files.pipe(f"/changed/{store.names[2]}", (store.root / store.names[2]).read_bytes())
    for changed in (opened, as_file):
        with pytest.raises(
            CorruptShardError, match=f"{changed.root}/{store.names[2]}: its row hashes"
        ):
            changed.gather(store.image_ids)
    files.rm("/changed", recursive=True)


def test_an_index_that_was_changed_is_refused_with_both_hashes(store, server):
    flip(store.root / INDEX_FILE, 100)
    with pytest.raises(CorruptShardError, match=f"/{INDEX_FILE}: its sha256 is .* carries"):
        FeatureStore(server.url)


def test_a_file_in_the_place_of_the_spec_is_not_called_missing(store, server):
    (store.root / "spec.json").write_text("[]")
    with pytest.raises(IncompleteStoreError, match=f"^{server.url}/spec.json: not the JSON"):
        FeatureStore(server.url)


def test_a_spec_that_was_changed_is_refused_with_both_fingerprints(store, server):
    path = store.root / "spec.json"
    path.write_bytes(path.read_bytes().replace(b'"layer":-2', b'"layer":-1'))
    with pytest.raises(SpecMismatchError, match=f"{server.url}/spec.json: fingerprint is .* give"):
        FeatureStore(server.url)


@pytest.mark.usefixtures("with_probe")
def test_a_probe_is_held_against_its_hash(store, server):
    server.fail(PROBE_FILE, "flip", 3, times=2)
    assert FeatureStore(server.url).verify().ok
    server.fail(PROBE_FILE, "flip", 3)
    report = FeatureStore(server.url).verify()
    assert report.bad_files == [PROBE_FILE]
    assert f"{server.url}/{PROBE_FILE}: its sha256 is" in report.problems[0]


def test_a_shard_of_another_size_is_refused_before_it_is_copied(store, server):
    path = store.root / store.names[1]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CorruptShardError, match=f"{server.url}/{path.name}: has .* the index says"):
        FeatureStore(server.url)
    assert server.requests["GET", path.name] == 0


def test_an_error_about_a_copy_names_the_file_of_the_server(store, server):
    """A shard that is no shard, though its index agrees with it."""
    path = store.root / store.names[1]
    path.write_bytes(b"x" * path.stat().st_size)
    table = StoreIndex.read(store.root / INDEX_FILE, store.spec)
    shards = [
        dataclasses.replace(shard, sha256=sha256_of(store.root / shard.name))
        for shard in table.shards
    ]
    dataclasses.replace(table, shards=tuple(shards)).write(store.root / INDEX_FILE)
    with pytest.raises(CorruptShardError, match=f"^{server.url}/{path.name}: HDF5") as caught:
        gathers(server.url, store)
    assert "patchcache-" not in str(caught.value)
    report = audit(Location(server.url), deep=True)
    assert report.bad_files == [path.name]
    assert "patchcache-" not in report.problems[0]
    assert "dvc pull" not in report.problems[0]
    assert "Push the store there again." in report.problems[0]


# Faults of the network


TEMPORARY = [
    ("status", 500),
    ("status", 502),
    ("status", 503),
    ("status", 429),
    ("cut", None),
    ("reset", None),
]


@pytest.mark.parametrize("fault", TEMPORARY, ids=str)
@pytest.mark.parametrize("name", FILES)
def test_a_fault_that_passes_is_overcome(store, server, name, fault):
    # Each request of a size takes two answers, a HEAD and a GET.
    server.fail(named(store, name), *fault, times=3)
    assert gathers(server.url, store)


PERMANENT = [
    (("status", 500), UnreachableStoreError, "the server answers 500 Internal Server Error"),
    (("status", 403), UnreachableStoreError, "access is refused: 403 Forbidden"),
    (("status", 401), UnreachableStoreError, "access is refused: 401 Unauthorized"),
    (("status", 400), UnreachableStoreError, "the server answers 400 Bad Request"),
    (("status", 404), IncompleteStoreError, "missing, so this is no whole store"),
    (("cut", None), UnreachableStoreError, "the connection was lost"),
    (("reset", None), UnreachableStoreError, "the connection was lost"),
]


@pytest.mark.parametrize(("fault", "error", "reason"), PERMANENT, ids=str)
@pytest.mark.parametrize("name", FILES)
def test_a_fault_that_stays_is_one_line_that_says_what_it_is(
    store, server, name, fault, error, reason
):
    server.fail(named(store, name), *fault)
    with pytest.raises(
        PatchcacheError, match=f"^{server.url}/{named(store, name)}: ({reason})"
    ) as caught:
        gathers(server.url, store)
    assert type(caught.value) is error
    line = one_line(caught)
    assert ("missing" in line) == (error is IncompleteStoreError)
    assert line.count(server.url) == 1
    assert "dvc pull" not in line


@pytest.mark.parametrize("status", [403, 404])
def test_nobody_asks_again_for_what_is_refused_or_missing(store, server, status):
    server.fail("spec.json", "status", status)
    with pytest.raises(PatchcacheError):
        FeatureStore(server.url)
    assert server.requests["HEAD", "spec.json"] == 1


def test_a_server_that_is_not_there_is_said(store, server):
    opened = FeatureStore(server.url)
    server.stop()
    for use in (lambda: FeatureStore(server.url), lambda: opened.gather(store.image_ids)):
        with pytest.raises(UnreachableStoreError, match="refuses connections"):
            use()
    server.stop = lambda: None


def test_a_host_that_does_not_exist_is_said():
    with pytest.raises(UnreachableStoreError, match=r"spec\.json: the host is not found"):
        FeatureStore("http://nowhere.invalid/features")


def test_a_server_that_says_nothing_more_is_given_up(store, server, monkeypatch):
    monkeypatch.setattr(network, "READ_TIMEOUT", 0.1)
    done = threading.Event()
    server.fail(store.names[1], "stall", done)
    with pytest.raises(UnreachableStoreError, match="no answer in time"):
        gathers(server.url, store)
    server.fail(store.names[1], "stall", done, times=1)
    assert gathers(server.url, store)
    done.set()


def test_an_unreachable_server_is_a_failure_of_the_system_too():
    assert issubclass(UnreachableStoreError, ConnectionError)


@pytest.mark.parametrize(("fault", "error", "reason"), PERMANENT[:4], ids=str)
def test_a_fault_of_the_network_is_no_damage(store, server, fault, error, reason):
    server.fail(store.names[1], *fault)
    report = audit(Location(server.url), deep=True)
    assert not report.ok
    assert report.bad_files == []
    assert [reason in problem for problem in report.problems] == [True]
    server.fail(INDEX_FILE, *fault)
    assert audit(Location(server.url), deep=True).bad_files == []


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (("status", 403), "No file is known to be damaged; each problem says what to do."),
        (
            ("flip", 3),
            "Delete damaged files there, by --repair if it can be written. Push the store there "
            "again.",
        ),
    ],
)
def test_verify_of_a_server_says_what_can_be_done_there(store, server, fault, advice):
    server.fail(store.names[1], *fault)
    with pytest.raises(CorruptShardError) as caught:
        verify(server.url, deep=True, repair=False)
    assert str(caught.value) == f"{server.url}: problems: 1, files deleted: 0. {advice}"


def test_a_server_that_was_given_up_is_asked_once_a_file(store, server):
    for name in store.names:
        server.fail(name, "status", 500)
    location = Location(server.url)
    Spec.read(location.path("spec.json"))
    assert len(audit(location, deep=True).problems) == len(store.names)
    asked = sum(server.requests["HEAD", name] for name in store.names)
    # The threads that began together retried.
    assert asked < 4 * len(store.names)


# What else there is


def test_a_remote_store_is_inspected(store, server, capsys):
    (store.root / store.names[1]).unlink()
    inspect(server.url)
    shown = capsys.readouterr().out
    assert f"{server.url}: {len(store.image_ids)} images" not in shown
    assert store.names[1] in shown


def test_each_file_is_asked_for_its_size_once(store, server):
    assert gathers(server.url, store)
    assert {server.requests["HEAD", name] for name in store.names} == {1}


def gather_in_child(opened, image_ids, queue):
    queue.put(opened.gather(image_ids))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_fetches_for_itself(store, server, method):
    opened = FeatureStore(server.url)
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=gather_in_child, args=(opened, store.image_ids, queue))
    child.start()
    assert np.array_equal(queue.get(), store.features)
    child.join(60)
    assert child.exitcode == 0
    assert np.array_equal(opened.gather(store.image_ids), store.features)


@pytest.mark.parametrize("folder", ["with space", "näme", "50%", "a%20b", "a#b"])
def test_a_file_url_is_decoded(store, tmp_path, folder):
    place = tmp_path / folder / "features"
    shutil.copytree(store.root, place)
    assert gathers(place.as_uri(), store)
    # As fsspec takes it.
    assert gathers(f"file://{place}", store)


def test_a_full_disk_here_is_no_fault_of_the_network(store, server, monkeypatch):
    opened = FeatureStore(server.url)
    real = network.attempt

    def full(action, url, folder, **options):
        def fails():
            raise OSError(28, "No space left on device", str(folder / "x"))

        return real(fails, url, folder, **options)

    monkeypatch.setattr("cache.remote.copies.attempt", full)
    with pytest.raises(OSError, match="No space left") as caught:
        opened.gather(store.image_ids)
    assert not isinstance(caught.value, PatchcacheError)


@pytest.mark.parametrize("opens_paths", [False, True])
def test_a_file_system_may_write_into_a_file_or_open_its_path(store, opens_paths):
    files = fsspec.filesystem("memory")
    for path in store.root.iterdir():
        files.pipe(f"/both/{path.name}", path.read_bytes())
    location = Location("memory://both")

    def get_file(path, target, **options):
        with open(target, "wb") as file:  # noqa: PTH123
            file.write(files.cat_file(path))

    if opens_paths:
        location.remote._files()
        filesystem, folder = location.remote._files()
        opener = type("Opener", (), {})()
        opener.size, opener.ls, opener.get_file = filesystem.size, filesystem.ls, get_file
        location.remote._files = functools.partial(tuple, (opener, folder))
    assert audit(location, deep=True).ok
    for name in store.names:
        files.pipe(f"/both/{name}", b"x" * (store.root / name).stat().st_size)
    report = audit(Location("memory://both"), deep=True)
    assert sorted(report.bad_files) == sorted(store.names)
    files.rm("/both", recursive=True)


@pytest.mark.parametrize("buffered", [0, 50, 100])
def test_more_bytes_than_there_may_be_are_refused(tmp_path, buffered):
    with BoundedFile(tmp_path / "file", 100) as target:
        target.write(b"x" * buffered)
        target.write(b"x" * (100 - buffered))
        with pytest.raises(CorruptShardError, match="more than 100 bytes came"):
            target.write(b"x")
    assert (tmp_path / "file").stat().st_size == 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file():
    target = BoundedFile(Path("/dev/full"), 1 << 30)
    with pytest.raises(OSError, match=r"No space left.*'/dev/full'"):
        target.write(b"x" * (1 << 20))
    target.close()
