"""Rows and shards of remote stores: right under every fault, fetched once, kept on this machine."""

import contextlib
import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cache.errors import (
    CorruptShardError,
    IncompleteStoreError,
    PatchcacheError,
    SettingsError,
    UnreachableStoreError,
)
from cache.files.atomic import sha256_of
from cache.remote import network, row_ranges, threads
from cache.remote.cache_folder import FOLDER_VARIABLE, GIGABYTES_VARIABLE, CacheFolder
from cache.remote.row_states import PENDING, UNKNOWN
from cache.shard import open_shard
from cache.store import FeatureStore
from cache.store_index import INDEX_FILE, StoreIndex
from tests.cache.conftest import write_store
from tests.cache.remote.fault_server import FaultServer

pytestmark = pytest.mark.usefixtures("no_waiting")

ROOT = Path(__file__).parents[3]

LIMIT = 30
"""Seconds within which anything here must happen."""


def wanted(built, image_ids):
    return built.features[np.searchsorted(built.image_ids, image_ids)]


def assert_epoch(opened, built, seed=0, size=7):
    """Gather all rows in a random order, and compare them bit by bit."""
    order = np.random.default_rng(seed).permutation(built.image_ids)
    for start in range(0, len(order), size):
        ids = order[start : start + size]
        found = opened.gather(ids)
        assert np.array_equal(found.view(np.uint16), wanted(built, ids).view(np.uint16))


def until(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def feature_bytes(built):
    return built.features.nbytes


def served(server):
    return sum(num_bytes for name, num_bytes in server.served if name.endswith(".h5"))


def structure_bytes(built):
    """Bytes that are requested of all shards before any row: both ends of each."""
    index = StoreIndex.read(built.root / INDEX_FILE, built.spec)
    row = built.features[0].nbytes
    return sum(
        2 * (file.num_bytes - len(rows) * row)
        for file, rows in zip(index.shards, index.by_shard, strict=True)
    )


def disk_bytes(folder):
    total = 0
    for path in folder.iterdir():
        # A shard may be renamed or deleted meanwhile.
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def is_complete(folder, built):
    """Whether a cache folder holds the files of the store, and nothing unfinished."""
    found = {path.stem: sha256_of(path) for path in folder.glob("*.h5")}
    assert all(name == sha256 for name, sha256 in found.items())
    shards = {sha256_of(built.root / name) for name in built.names}
    return found.keys() == shards and not list(folder.glob("*.part"))


def shard_ids(opened):
    """The ids of the images of the largest shard."""
    largest = np.argmax(opened._layout.num_rows)
    return opened.image_ids[opened.shards_of(opened.image_ids) == largest]


@pytest.fixture
def long(wide, tmp_path):
    """A store with some forty rows in a shard: most of them lie far from both ends."""
    return write_store(tmp_path / "long", num_images=80, seed=0, spec=wide.spec, shard_rows=40)


# A server that works


def test_a_store_in_s3_is_gathered_bit_for_bit_and_verified(s3_store, wide, cache_dir):
    opened = FeatureStore(s3_store)
    assert_epoch(opened, wide)
    until(lambda: is_complete(cache_dir, wide))
    assert opened.verify().ok
    assert_epoch(pickle.loads(pickle.dumps(opened)), wide)


def test_a_pickled_store_keeps_its_cache(server, wide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = FeatureStore(server.url, cache_dir="shards", cache_bytes=10**7)
    state = pickle.dumps(opened)
    monkeypatch.chdir("/")
    again = pickle.loads(state)
    assert (again._remote._cache.path, again._remote._cache.limit) == (tmp_path / "shards", 10**7)
    assert_epoch(again, wide)
    assert list((tmp_path / "shards").glob("*.h5*"))


def test_what_s3_lacks_is_one_line(s3, s3_server):
    with pytest.raises(IncompleteStoreError, match=r"spec\.json: missing"):
        FeatureStore(f"{s3}/elsewhere")
    with pytest.raises(IncompleteStoreError, match=r"spec\.json: missing"):
        FeatureStore("s3://no-such-bucket-here/features")


def test_an_epoch_in_a_random_order_fetches_each_row_once(server, wide):
    assert_epoch(FeatureStore(server.url), wide, size=3)
    assert served(server) <= feature_bytes(wide) + structure_bytes(wide)


def test_neighbours_are_one_request(server, wide):
    name = max(wide.names, key=lambda name: (wide.root / name).stat().st_size)
    ids = open_shard(wide.root / name, wide.spec).image_ids
    opened = FeatureStore(server.url)
    opened.gather(ids[[1]])
    before = len(server.served)
    # The row between them comes along, since it is near and missing.
    opened.gather(ids[[4, 2]])
    assert [size for _, size in server.served[before:]] == [3 * wide.features[0].nbytes]
    opened.gather(ids[[3]])
    assert len(server.served) == before + 1


def test_a_request_has_at_most_so_many_bytes(server, wide, monkeypatch):
    row = wide.features[0].nbytes
    monkeypatch.setattr(row_ranges, "REQUEST_BYTES", 2 * row)
    assert np.array_equal(FeatureStore(server.url).gather(wide.image_ids), wide.features)
    rows = [size for name, size in server.served if name.endswith(".h5") and size % row == 0]
    assert set(rows) <= {row, 2 * row}
    assert len(rows) > 6


@pytest.mark.parametrize("how", ["gather", "prefetch", "read_ahead"])
def test_a_second_store_and_a_second_epoch_ask_for_no_features(server, wide, cache_dir, how):
    opened = FeatureStore(server.url)
    if how == "prefetch":
        opened.prefetch_rows(wide.image_ids)
    if how == "read_ahead":
        opened.read_ahead(range(opened.num_shards))
    if how == "gather":
        opened.gather(wide.image_ids)
    until(lambda: is_complete(cache_dir, wide))
    before = served(server)
    assert before <= feature_bytes(wide) + structure_bytes(wide)
    assert_epoch(opened, wide)
    assert opened._all_mapped
    assert_epoch(FeatureStore(server.url), wide)
    assert served(server) == before


def test_reading_ahead_does_not_wait_and_a_gather_waits_for_its_rows_only(server, wide):
    opened = FeatureStore(server.url)
    first, last = sorted(wide.names)[0], sorted(wide.names)[-1]
    released = threading.Event()
    server.fail(last, "stall", released, times=1)
    opened.read_ahead(range(opened.num_shards))
    opened.prefetch_rows(wide.image_ids[:4])
    ids = open_shard(wide.root / first, wide.spec).image_ids
    assert np.array_equal(opened.gather(ids), wanted(wide, ids))
    released.set()
    assert_epoch(opened, wide)


def test_gathers_take_no_single_rows_out_of_shards_that_are_read_ahead(long, monkeypatch):
    server = FaultServer(long.root)
    monkeypatch.setattr(row_ranges, "GAP_BYTES", 0)
    monkeypatch.setattr(threads, "_of_process", {})
    monkeypatch.setattr(threads, "SHARD_THREADS", 1)
    opened = FeatureStore(server.url)
    requests_before, released = len(server.served), threading.Event()
    threads.submit(threads.WHOLE_SHARD, released.wait, LIMIT)
    opened.read_ahead(range(opened.num_shards))
    assert_epoch(opened, long)
    released.set()
    server.stop()
    # Both ends of each shard, and one request for all of its rows.
    assert len(server.served) - requests_before <= 3 * opened.num_shards


def test_a_damaged_row_is_an_error_of_those_who_ask_for_it(long, monkeypatch):
    local = FeatureStore(long.root)
    ids = shard_ids(local)
    largest = int(local.shards_of(ids[:1])[0])
    path = long.root / local._layout.shards[largest].name
    data = bytearray(path.read_bytes())
    data[local._layout.offset_of(largest) + 6 * long.features[0].nbytes] ^= 1
    path.write_bytes(data)
    server = FaultServer(long.root)
    monkeypatch.setattr(threads, "_of_process", {})
    monkeypatch.setattr(threads, "SHARD_THREADS", 1)
    opened, released = FeatureStore(server.url), threading.Event()
    threads.submit(threads.GATHER_SHARD, released.wait, LIMIT)
    opened.read_ahead([largest])
    threading.Timer(0.2, released.set).start()
    assert np.array_equal(opened.gather(ids[5:6]), wanted(long, ids[5:6]))
    with pytest.raises(CorruptShardError, match="1 rows have another hash"):
        opened.gather(ids[6:7])
    server.stop()


def test_a_row_that_failed_in_the_request_of_others_is_requested_again(long, monkeypatch):
    """The row is on its way for a prefetch that fails, while a gather meets a damaged neighbour."""
    server = FaultServer(long.root)
    opened = FeatureStore(server.url)
    ids = shard_ids(opened)[[20, 25]]
    (mine, of_others), states = opened._rows_of(ids), opened._remote._states
    real, calls = opened._remote._fetch, []

    def fetch(run):
        calls.append(run)
        real(run)
        if run.start == mine:
            raise CorruptShardError("a row that nobody has asked for")

    def give_up():
        with states.changed:
            states.of_row[of_others] = UNKNOWN
            states.changed.notify_all()

    monkeypatch.setattr(opened._remote, "_fetch", fetch)
    states.of_row[of_others] = PENDING
    threading.Timer(0.3, give_up).start()
    assert np.array_equal(opened.gather(ids), wanted(long, ids))
    assert [run.start for run in calls] == [mine, of_others]
    server.stop()


def test_the_check_of_a_shard_that_was_begun_again_refuses_nothing(long, cache_dir):
    """The check was queued when all rows were here, and comes late."""
    server = FaultServer(long.root)
    opened = FeatureStore(server.url)
    ids = shard_ids(opened)
    largest = int(opened.shards_of(ids[:1])[0])
    opened._remote._complete(largest)
    opened.gather(ids[len(ids) // 2 :][:1])
    (part,) = cache_dir.glob("*.part")
    opened._remote._complete(largest)
    assert part.exists()
    assert not opened._remote._num_refusals
    assert_epoch(opened, long)
    server.stop()


def test_rows_can_be_fetched_ahead_after_an_outage(server, wide):
    opened = FeatureStore(server.url)
    for name in wide.names:
        server.fail(name, "status", 500)
    opened.read_ahead(range(opened.num_shards))
    threads.submit(threads.CHECK, lambda: None).result(LIMIT)
    server.faults.clear()
    before = served(server)
    opened.prefetch_rows(wide.image_ids)
    until(lambda: served(server) - before >= feature_bytes(wide))


def test_a_local_store_has_nothing_to_fetch(wide):
    opened = FeatureStore(wide.root)
    assert not opened.is_remote
    opened.prefetch_rows([-1])


# Faults

CURED = [
    ("status", 500, 3),
    ("status", 503, 3),
    ("reset", None, 3),
    ("cut", None, 3),
    ("short", None, 3),
    ("slice", 4096, 2),
    ("flip", 20, 2),
    ("flip", -3000, 2),
    ("flip", 9000, 2),
    ("delay", 0.05, 10**6),
    ("whole", None, 10**6),
    ("whole", None, 1),
]


@pytest.mark.parametrize("way", ["rows", "shards"])
@pytest.mark.parametrize("fault", CURED, ids=str)
def test_a_fault_that_passes_changes_no_bit(server, wide, cache_dir, fault, way):
    kind, argument, times = fault
    for name in wide.names[:3]:
        server.fail(name, kind, argument, times)
    opened = FeatureStore(server.url)
    if way == "shards":
        opened.read_ahead(range(opened.num_shards))
    # A flip between rows is found when the shard is whole, which is then fetched again.
    until(lambda: assert_epoch(opened, wide) or is_complete(cache_dir, wide))


STAYING = [
    ("status", 500, UnreachableStoreError, "the server answers 500"),
    ("status", 404, IncompleteStoreError, "missing, so this is no whole store"),
    ("status", 403, UnreachableStoreError, "access is refused: 403"),
    ("reset", None, UnreachableStoreError, "the connection was lost"),
    ("cut", None, UnreachableStoreError, "the connection was lost"),
    ("short", None, UnreachableStoreError, "the connection was lost: .* bytes came"),
]


@pytest.mark.parametrize("fault", STAYING, ids=str)
@pytest.mark.parametrize("opened_before", [False, True])
def test_a_fault_that_stays_is_one_line(server, wide, fault, opened_before):
    kind, argument, error, text = fault
    name = wide.names[2]
    ids = open_shard(wide.root / name, wide.spec).image_ids
    opened = FeatureStore(server.url)
    if opened_before:
        opened.gather(ids[:1])
    server.fail(name, kind, argument)
    with pytest.raises(error, match=f"^{server.url}/{name}: .*{text}") as caught:
        opened.gather(ids)
    assert "\n" not in str(caught.value)
    others = np.setdiff1d(wide.image_ids, ids)
    assert np.array_equal(opened.gather(others), wanted(wide, others))
    # And when the server is well again.
    server.fail(name, kind, argument, times=0)
    assert_epoch(opened, wide)


@pytest.mark.parametrize("kind", ["flip", "slice"])
def test_bytes_that_stay_wrong_are_refused_in_one_line(server, wide, kind):
    name = wide.names[2]
    ids = open_shard(wide.root / name, wide.spec).image_ids
    opened = FeatureStore(server.url)
    opened.gather(ids[:1])
    server.fail(name, kind, 100)
    with pytest.raises(CorruptShardError, match=f"^{server.url}/{name}: .* rows have another hash"):
        opened.gather(ids[1:])


def test_a_flipped_byte_anywhere_is_never_gathered_nor_kept(server, wide, cache_dir):
    name = wide.names[1]
    path = wide.root / name
    ids, right = open_shard(path, wide.spec).image_ids, path.read_bytes()
    refused = 0
    for place in range(0, len(right), 2111):
        for old in cache_dir.iterdir():
            old.unlink(missing_ok=True)
        path.write_bytes(right[:place] + bytes([right[place] ^ 1]) + right[place + 1 :])
        opened = FeatureStore(server.url)
        try:
            for _ in range(5):
                assert np.array_equal(opened.gather(ids), wanted(wide, ids))
        except CorruptShardError:
            refused += 1
        assert not list(cache_dir.glob("*.h5"))
    assert refused > 10


def test_a_shard_that_is_damaged_between_its_rows_is_refused_with_both_hashes(server, wide):
    path = wide.root / wide.names[1]
    opened, shard = FeatureStore(server.url), open_shard(path, wide.spec)
    right, data = sha256_of(path), bytearray(path.read_bytes())
    data[shard.offset - 1] ^= 1
    path.write_bytes(data)

    def refuses():
        with contextlib.suppress(CorruptShardError):
            assert np.array_equal(opened.gather(shard.image_ids), wanted(wide, shard.image_ids))
            return False
        return True

    until(refuses)
    with pytest.raises(CorruptShardError, match=f"^{server.url}/{path.name}") as caught:
        opened.gather(shard.image_ids)
    assert right in str(caught.value)
    assert sha256_of(path) in str(caught.value)


def test_a_server_that_ignores_ranges_sends_each_shard_few_times(server, wide):
    for name in wide.names:
        server.fail(name, "whole")
    assert_epoch(FeatureStore(server.url), wide)
    assert {server.requests["GET", name] for name in wide.names} == {1}


# What is on this machine


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_byte_that_flips_on_this_disk_is_never_gathered(server, wide, cache_dir, unfinished):
    first = FeatureStore(server.url)
    first.gather(wide.image_ids[::2] if unfinished else wide.image_ids)
    if not unfinished:
        until(lambda: is_complete(cache_dir, wide))
    for path in [*cache_dir.glob("*.h5"), *cache_dir.glob("*.part")]:
        # A part can become a whole shard meanwhile.
        with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
            data = file.read()
            file.seek(len(data) // 2)
            file.write(bytes([data[len(data) // 2] ^ 1]))
    opened = FeatureStore(server.url)
    until(lambda: assert_epoch(opened, wide) or is_complete(cache_dir, wide))


def test_files_that_a_crash_left_without_their_bytes_are_fetched_again(server, wide, cache_dir):
    FeatureStore(server.url).gather(wide.image_ids[::2])
    for number, path in enumerate(sorted(cache_dir.glob("*.part"))):
        with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
            size = file.seek(0, 2)
            file.truncate(0)
            file.truncate(size if number % 2 else 0)
    assert_epoch(FeatureStore(server.url), wide)


def test_the_limit_holds_and_what_was_deleted_comes_back_right(server, wide, cache_dir):
    limit = 4 * 80_000
    opened = FeatureStore(server.url, cache_bytes=limit)
    for seed in range(3):
        assert_epoch(opened, wide, seed=seed, size=2)
        until(lambda: disk_bytes(cache_dir) <= limit)
    assert not opened._all_mapped
    opened.read_ahead(range(opened.num_shards))
    opened.prefetch_rows(wide.image_ids)
    assert_epoch(opened, wide)
    # A deleted file that is mapped would still take space.
    with Path("/proc/self/maps").open() as maps:
        assert not [line for line in maps if str(cache_dir) in line and "(deleted)" in line]


def test_rows_that_would_drive_each_other_out_are_not_fetched_before_they_are_gathered(
    server, wide
):
    row = wide.features[0].nbytes
    opened = FeatureStore(server.url, cache_bytes=20 * row)
    before = served(server)
    opened.prefetch_rows(wide.image_ids)
    threads.submit(threads.PREFETCH, lambda: None).result(LIMIT)
    assert served(server) == before
    opened.prefetch_rows(wide.image_ids[:8])
    until(lambda: served(server) > before)
    assert_epoch(opened, wide)


def test_a_limit_below_one_batch_is_exceeded_by_that_batch_only(server, wide, cache_dir):
    opened = FeatureStore(server.url, cache_bytes=1)
    for _ in range(2):
        assert np.array_equal(opened.gather(wide.image_ids), wide.features)
    opened.gather(wide.image_ids[:1])
    assert len(list(cache_dir.glob("*.h5*"))) <= len(wide.names)


def test_threads_read_right_rows_while_shards_are_deleted(server, wide):
    opened = FeatureStore(server.url, cache_bytes=3 * 80_000)
    failed = []

    def read(seed):
        try:
            assert_epoch(opened, wide, seed=seed, size=2)
        except BaseException as error:
            failed.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(2 * LIMIT)
    assert not failed
    assert not any(reader.is_alive() for reader in readers)


def test_stores_that_together_use_more_than_the_limit_wait_for_each_other(server, wide):
    failed = []

    def read(opened):
        try:
            for _ in range(3):
                assert np.array_equal(opened.gather(wide.image_ids), wide.features)
        except BaseException as error:
            failed.append(error)

    stores = [FeatureStore(server.url, cache_bytes=1) for _ in range(4)]
    readers = [threading.Thread(target=read, args=(opened,)) for opened in stores]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(2 * LIMIT)
    assert not failed
    assert not any(reader.is_alive() for reader in readers)


def test_another_process_may_delete_what_is_read(server, wide, cache_dir):
    opened = FeatureStore(server.url)
    opened.gather(wide.image_ids[::2])
    for path in cache_dir.glob("*.part"):
        path.unlink(missing_ok=True)
    assert_epoch(opened, wide)
    assert_epoch(FeatureStore(server.url), wide)


def test_the_folder_may_be_deleted_at_any_time(server, wide, cache_dir):
    opened = FeatureStore(server.url)
    for ids in np.array_split(wide.image_ids, 8):
        shutil.rmtree(cache_dir, ignore_errors=True)
        assert np.array_equal(opened.gather(ids), wanted(wide, ids))
    assert_epoch(opened, wide)


@contextlib.contextmanager
def failing_writes(monkeypatch, number, times):
    """Let so many writes of rows fail with a system error."""
    left, real = [number] * times, CacheFolder.note_rows

    def note_rows(*arguments):
        if left:
            code = left.pop()
            raise OSError(code, os.strerror(code))
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CacheFolder, "note_rows", note_rows)
        yield


def test_a_full_disk_is_relieved_of_shards_that_are_not_in_use(
    server, wide, cache_dir, monkeypatch
):
    opened = FeatureStore(server.url)
    shard = [open_shard(wide.root / name, wide.spec) for name in wide.names[:2]]
    opened.gather(shard[0].image_ids)
    with failing_writes(monkeypatch, errno.ENOSPC, 1):
        opened.gather(shard[1].image_ids[:1])
    assert not list(cache_dir.glob(f"{sha256_of(shard[0].path)}*"))
    assert_epoch(opened, wide)


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [
        (errno.ENOSPC, OSError, f"No space left on device, .* bytes .*{GIGABYTES_VARIABLE}"),
        (errno.EROFS, SettingsError, f"cannot be written .*{FOLDER_VARIABLE}"),
    ],
)
def test_a_folder_that_takes_no_bytes_is_one_line(
    server, wide, cache_dir, monkeypatch, number, error, text
):
    opened = FeatureStore(server.url)
    with (
        failing_writes(monkeypatch, number, 10**6),
        pytest.raises(error, match=f"{cache_dir}.*{text}|{text}.*{cache_dir}") as caught,
    ):
        opened.gather(wide.image_ids)
    assert "\n" not in str(caught.value)
    assert_epoch(opened, wide)


def test_a_folder_with_all_bytes_may_be_read_only(server, wide, cache_dir, monkeypatch):
    opened = FeatureStore(server.url)
    opened.gather(wide.image_ids)
    until(lambda: is_complete(cache_dir, wide))

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert_epoch(FeatureStore(server.url), wide)


# Processes

READ = """
import sys, numpy as np
from cache import FeatureStore
store = FeatureStore(sys.argv[1])
rng = np.random.default_rng(int(sys.argv[3]))
found = np.empty((len(store), store.spec.patches, store.spec.width), np.float16)
for places in np.array_split(rng.permutation(len(store)), 20):
    found[places] = store.gather(store.image_ids[places])
    print("batch", flush=True)
np.save(sys.argv[2], found)
"""


def start(server, target, seed=0):
    return subprocess.Popen(
        [sys.executable, "-c", READ, server.url, str(target), str(seed)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow("starts processes")
def test_two_processes_share_the_folder(server, wide, cache_dir, tmp_path):
    readers = [start(server, tmp_path / f"{seed}.npy", seed) for seed in range(2)]
    for seed, reader in enumerate(readers):
        _, said = reader.communicate(timeout=2 * LIMIT)
        assert reader.returncode == 0, said
        assert said == ""
        assert np.array_equal(np.load(tmp_path / f"{seed}.npy"), wide.features)
    before = served(server)
    opened = FeatureStore(server.url)
    assert_epoch(opened, wide)
    assert served(server) == before
    until(lambda: is_complete(cache_dir, wide))


@pytest.mark.slow("starts processes")
def test_what_a_killed_process_fetched_is_not_fetched_again(server, wide, tmp_path):
    for name in wide.names:
        server.fail(name, "delay", 0.02)
    reader = start(server, tmp_path / "killed.npy")
    for _ in range(5):
        assert reader.stdout.readline() == "batch\n"
    reader.send_signal(signal.SIGKILL)
    reader.communicate(timeout=LIMIT)
    time.sleep(0.1)
    num_answers, before = len(server.served), served(server)
    assert_epoch(FeatureStore(server.url), wide)
    row = wide.features[0].nbytes
    # Of the batches that were read, not a row; an answer on its way at the kill may be lost.
    later = sum(size for name, size in server.served[num_answers:] if size % row == 0)
    assert later <= feature_bytes(wide) - 4 * 4 * row
    assert before > 5 * row


def gather_in_child(opened, image_ids, sender):
    sender.send_bytes(opened.gather(image_ids).tobytes())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_fetches_for_itself(server, wide):
    """Also what a thread of its parent was about to fetch."""
    opened = FeatureStore(server.url)
    largest = int(np.argmax(opened._layout.num_rows))
    opened.gather(wide.image_ids[opened.shards_of(wide.image_ids) != largest])
    released, num_answers = threading.Event(), len(server.served)
    server.fail(opened._layout.shards[largest].name, "stall", released, times=1)
    opened.read_ahead([largest])
    until(lambda: len(server.served) > num_answers)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=gather_in_child, args=(opened, wide.image_ids, sender))
    child.start()
    has_come = receiver.poll(LIMIT)
    released.set()
    if not has_come:
        child.kill()
    assert has_come
    assert receiver.recv_bytes() == wide.features.tobytes()
    child.join(LIMIT)
    assert child.exitcode == 0
    assert_epoch(opened, wide)


def outcome_of(code, url):
    """Return the exit code and stderr of a program in an interpreter of its own."""
    command = [sys.executable, "-c", code, url]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    return done.returncode, done.stderr


def test_an_interpreter_ends_while_shards_are_on_their_way(server, wide):
    released = threading.Event()
    for name in wide.names:
        server.fail(name, "stall", released)
    code = (
        "import sys, time; from cache import FeatureStore; s = FeatureStore(sys.argv[1]);"
        "s.read_ahead(range(s.num_shards)); time.sleep(0.2)"
    )
    found = outcome_of(code, server.url)
    released.set()
    assert found == (0, "")


IMPORTS = """
import sys, threading
from cache import FeatureStore

class Watch:
    found = []

    def find_spec(self, name, path=None, target=None):
        if threading.current_thread().name == "patchcache-remote":
            self.found.append(name)

sys.meta_path.insert(0, Watch())
store = FeatureStore(sys.argv[1])
store.gather(store.image_ids[:9])
store.prefetch_rows(store.image_ids)
store.gather(store.image_ids)
print(*Watch.found, file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["server", "s3_store"])
def test_threads_import_nothing_since_a_fork_would_leave_the_lock_to_the_child(request, kind):
    url = getattr(request.getfixturevalue(kind), "url", request.getfixturevalue(kind))
    assert outcome_of(IMPORTS, url) == (0, "\n")


EXIT = """
import sys, threading, time, h5py
from h5py._objects import phil
from cache import FeatureStore
from cache.remote import shards

inside, real = threading.Event(), shards.open_shard

def open_shard(*arguments):
    with phil:
        inside.set()
        time.sleep(0.3)
        return real(*arguments)

shards.open_shard = open_shard
left = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
store = FeatureStore(sys.argv[1])
store.read_ahead(range(store.num_shards))
assert inside.wait(20)
"""
"""At the end threads are within HDF5, whose lock `left` needs to be closed."""


def test_an_interpreter_ends_while_shards_are_opened(server, wide):
    assert outcome_of(EXIT, server.url) == (0, "")


def test_an_outage_ends_with_one_line(server, wide, monkeypatch):
    opened = FeatureStore(server.url)
    opened.gather(wide.image_ids[:3])
    server.stop()
    monkeypatch.setattr(server, "stop", lambda: None)
    assert np.array_equal(opened.gather(wide.image_ids[:3]), wide.features[:3])
    with pytest.raises(UnreachableStoreError, match=r"refuses connections") as caught:
        opened.gather(wide.image_ids)
    assert isinstance(caught.value, PatchcacheError)
    assert "\n" not in str(caught.value)


def test_requests_back_off(server, wide, monkeypatch):
    monkeypatch.setattr(network, "BACK_OFF", (0.05, 0.1, 0.2))
    opened = FeatureStore(server.url)
    server.fail(wide.names[0], "status", 503, times=2)
    started = time.monotonic()
    opened.gather(open_shard(wide.root / wide.names[0], wide.spec).image_ids)
    assert time.monotonic() - started >= 0.15
