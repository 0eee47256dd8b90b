"""Publishing to a URL: no reader ever opens half a store, and only what is missing is sent."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from cache.errors import (
    CacheError,
    CorruptShardError,
    IncompleteStoreError,
    SettingsError,
    UnreachableStoreError,
)
from cache.files.atomic import sha256_of
from cache.remote import claim, destination, network
from cache.remote.claim import CLAIM_FILE
from cache.remote.origin import ORIGIN_FILE, origin_json
from cache.remote.upload import in_parallel, try_to_write, upload
from cache.shard import open_shard, write_shard
from cache.store import FeatureStore
from cache.store_index import INDEX_FILE, PROBE_FILE, StoreIndex
from cache.verify import verify
from tests.cache.conftest import random_rows, write_table
from tests.cache.remote.shared_bucket import One, Stopped, Two, new_bucket

ROOT = Path(__file__).parents[3]
URL, SAME_URL = "one://bucket/features", "two://bucket/features"
SHARD = re.compile(r"[0-9a-f]{16}\.h5")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(network, "BACK_OFF", (0.0, 0.0, 0.0))
    set_times(monkeypatch, poll=0.02, settle=0.0, expiry=0.2)


def set_times(monkeypatch, poll, settle, expiry):
    monkeypatch.setattr(claim, "POLL_SECONDS", poll)
    monkeypatch.setattr(claim, "SETTLE_SECONDS", settle)
    monkeypatch.setattr(claim, "EXPIRY_SECONDS", expiry)


@pytest.fixture(params=["object store", "folders"])
def bucket(request):
    """An empty bucket, where a put replaces an object, or a file is renamed."""
    if request.param == "folders":
        return new_bucket(in_halves=True)
    return request.getfixturevalue("objects")


@pytest.fixture
def objects(monkeypatch):
    monkeypatch.setattr(destination, "OBJECT_STORES", ("one", "two"))
    return new_bucket()


@pytest.fixture
def small(tmp_path, build_store):
    return build_store(tmp_path / "small", 15)


def add_probe(built, content):
    path = built.root / PROBE_FILE
    path.write_bytes(content)
    index = StoreIndex.read(built.root / INDEX_FILE, built.spec)
    dataclasses.replace(index, probe_sha256=sha256_of(path)).write(built.root / INDEX_FILE)


def encoded_again(built, folder):
    """The same images and spec, with other features: the names of the shards stay."""
    shutil.copytree(built.root, folder)
    shards = []
    for name in built.names:
        ids = open_shard(built.root / name, built.spec).image_ids
        write_shard(folder / name, built.spec, ids, random_rows(len(ids), seed=9))
        shards.append(open_shard(folder / name, built.spec))
    write_table(folder, built.spec, shards)
    store = FeatureStore(folder)
    return dataclasses.replace(built, root=folder, features=store.gather(store.image_ids))


def read_whole(url):
    """What a reader finds: ids and features of a store without a problem, or None for no store."""
    try:
        store = FeatureStore(url)
    except IncompleteStoreError:
        return None
    report = store.verify()
    assert report.ok, report.problems
    return store.image_ids.tolist(), store.gather(store.image_ids).tobytes()


def content_of(built):
    return built.image_ids.tolist(), built.features.tobytes()


def shards_put(action):
    """The names of the shards that an action puts."""
    names = []

    def note(kind, path):
        name = path.rpartition("/")[2]
        if kind in ("put", "rename") and SHARD.fullmatch(name):
            names.append(name)

    One.after = note
    try:
        action()
    finally:
        One.after = None
    return sorted(names)


# What is there afterwards


def test_the_files_are_those_of_the_store_and_no_other_is_left(small, bucket):
    add_probe(small, b"probe")
    done = upload(small.root, URL)
    assert bucket.names() == {path.name for path in small.root.iterdir()}
    for path in small.root.iterdir():
        assert bucket.store[f"/bucket/features/{path.name}"].getvalue() == path.read_bytes()
    assert (done.num_images, done.num_shards) == (15, len(small.names))
    assert (done.num_sent, done.num_deleted) == (len(small.names) + 1, 0)
    assert read_whole(URL) == content_of(small)


def test_a_store_in_s3_is_the_same_store(s3, small):
    upload(small.root, f"{s3}/a/features")
    assert read_whole(f"{s3}/a/features") == content_of(small)
    upload(small.root, s3)
    assert read_whole(s3) == content_of(small)


def test_a_store_in_a_folder_is_the_same_store(small, tmp_path):
    url = f"file://{tmp_path}/new/features"
    upload(small.root, url)
    assert {path.name for path in (tmp_path / "new/features").iterdir()} == {
        path.name for path in small.root.iterdir()
    }
    assert read_whole(url) == content_of(small)


def test_a_store_behind_a_url_can_be_published_elsewhere(small, bucket):
    upload(small.root, URL)
    upload(URL, "one://bucket/copy")
    assert read_whole("one://bucket/copy") == content_of(small)


def test_a_second_time_nothing_is_sent(small, bucket):
    upload(small.root, URL)
    assert shards_put(lambda: upload(small.root, URL)) == []


def test_of_a_store_that_has_grown_only_the_new_shards_are_sent(small, bucket, tmp_path):
    kept = sorted(small.names)[1:]
    fewer = tmp_path / "fewer"
    shutil.copytree(small.root, fewer)
    shards = [open_shard(fewer / name, small.spec) for name in small.names if name in kept]
    write_table(fewer, small.spec, shards)
    upload(fewer, URL)
    assert shards_put(lambda: upload(small.root, URL)) == sorted(small.names)[:1]
    assert upload(fewer, URL).num_deleted == 1
    assert len(bucket.names() & set(small.names)) == len(kept)


def test_files_that_no_store_has_stay(small, bucket):
    files = fsspec.filesystem("one")
    for name in ("README.md", "0123456789abcdef.txt", "photo.h5", ".photo.h5.partial"):
        files.pipe_file(f"/bucket/features/{name}", b"mine")
    files.pipe_file("/bucket/features/0123456789abcdef.h5", b"of a former store")
    files.pipe_file(f"/bucket/features/.0123456789abcdef.h5.{'a' * 32}.partial", b"of a killed one")
    assert upload(small.root, URL).num_deleted == 2
    assert {"README.md", "0123456789abcdef.txt", "photo.h5", ".photo.h5.partial"} < bucket.names()


def test_a_shard_that_was_cut_or_lost_is_sent_again(small, bucket):
    upload(small.root, URL)
    cut, lost, *_ = sorted(small.names)
    files = fsspec.filesystem("one")
    files.pipe_file(f"/bucket/features/{cut}", b"half")
    files.rm_file(f"/bucket/features/{lost}")
    assert shards_put(lambda: upload(small.root, URL)) == [cut, lost]
    assert read_whole(URL) == content_of(small)


def test_a_file_of_the_right_size_is_not_trusted_without_a_hash(small, bucket):
    name = small.names[0]
    size = (small.root / name).stat().st_size
    fsspec.filesystem("one").pipe_file(f"/bucket/features/{name}", bytes(size))
    upload(small.root, URL)
    assert read_whole(URL) == content_of(small)


@pytest.mark.parametrize("name", [INDEX_FILE, "spec.json"])
def test_a_damaged_store_is_replaced(small, bucket, name):
    upload(small.root, URL)
    fsspec.filesystem("one").pipe_file(f"/bucket/features/{name}", b"{}")
    upload(small.root, URL)
    assert read_whole(URL) == content_of(small)


def test_the_index_of_another_program_is_left_alone(small, bucket):
    fsspec.filesystem("one").pipe_file(f"/bucket/features/{INDEX_FILE}", b"PAR1")
    with pytest.raises(CacheError, match=f"{URL}: holds an index.parquet and no spec.json"):
        upload(small.root, URL)
    assert bucket.store[f"/bucket/features/{INDEX_FILE}"].getvalue() == b"PAR1"


# What a reader sees meanwhile


@pytest.fixture(params=["other images", "another encoder", "encoded again", "another probe"])
def replacement(request, small, tmp_path, build_store):
    """A store that replaces `small`, and whether there is no store for a moment."""
    if request.param == "other images":
        return build_store(tmp_path / "new", 15, seed=1), False
    if request.param == "another encoder":
        spec = dataclasses.replace(small.spec, model="other")
        return build_store(tmp_path / "new", 15, spec=spec), True
    if request.param == "encoded again":
        return encoded_again(small, tmp_path / "new"), True
    add_probe(small, b"probe")
    made = build_store(tmp_path / "new", 15, seed=1)
    add_probe(made, b"other")
    return made, True


def test_a_reader_sees_the_old_store_or_the_new_one_at_every_moment(bucket, small, replacement):
    new, is_withdrawn = replacement
    upload(small.root, URL)
    seen = []
    watching = threading.Lock()

    def look(kind, path):
        if kind in ("half", "put", "rename", "delete"):
            with watching:
                seen.append(read_whole(SAME_URL))

    One.after = look
    upload(new.root, URL)
    states = [key for key, _ in itertools.groupby(seen)]
    assert states == [content_of(small), *[None] * is_withdrawn, content_of(new)]
    assert len(seen) > 2 * len(new.names)


def test_a_reader_of_a_new_place_sees_no_store_until_it_is_whole(bucket, small):
    seen = []
    watching = threading.Lock()

    def look(kind, path):
        if kind in ("half", "put", "rename"):
            with watching:
                seen.append(read_whole(SAME_URL))

    One.after = look
    upload(small.root, URL)
    assert [key for key, _ in itertools.groupby(seen)] == [None, content_of(small)]


def test_a_reader_of_the_old_index_gets_a_line_for_a_shard_that_was_deleted(
    objects, small, tmp_path, build_store
):
    upload(small.root, URL)
    reader = FeatureStore(SAME_URL)
    upload(build_store(tmp_path / "new", 15, seed=1).root, URL)
    with pytest.raises(IncompleteStoreError, match=r"\.h5: missing, so this is no whole store"):
        reader.gather(small.image_ids)


# Damage and faults


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_is_refused_and_the_old_store_stays(bucket, small, tmp_path, build_store):
    upload(small.root, URL)
    new = build_store(tmp_path / "new", 15, seed=1)
    path = new.root / sorted(new.names)[-1]
    damage(path)
    with pytest.raises(CorruptShardError, match=f"{path}: its sha256 is not the one"):
        upload(new.root, URL)
    assert read_whole(URL) == content_of(small)


def test_a_damaged_shard_of_the_same_name_leaves_the_old_store_too(bucket, small, tmp_path):
    upload(small.root, URL)
    again = encoded_again(small, tmp_path / "again")
    path = again.root / sorted(again.names)[-1]
    damage(path)
    with pytest.raises(CorruptShardError, match=f"{path}: its sha256 is not the one"):
        upload(again.root, URL)
    assert read_whole(URL) == content_of(small)


def test_a_store_that_is_published_again_during_a_push_is_not_sent_by_halves(
    bucket, small, tmp_path, build_store, monkeypatch
):
    new, confirm = build_store(tmp_path / "new", 30, seed=1), claim.Claim.__enter__

    def publish_and_enter(self):
        for path in new.root.iterdir():
            shutil.copy(path, small.root)
        return confirm(self)

    monkeypatch.setattr(claim.Claim, "__enter__", publish_and_enter)
    with pytest.raises(CacheError, match="another store was published there"):
        upload(small.root, URL)
    assert INDEX_FILE not in bucket.names()


def test_somebody_elses_origin_is_left_alone(tmp_path, small, bucket):
    there = tmp_path / "there"
    there.mkdir()
    mine = there / ORIGIN_FILE
    mine.write_text('{"mine": "thesis"}')
    with pytest.raises(CacheError, match=f"{ORIGIN_FILE}: is no part of a store"):
        upload(small.root, f"file://{there}")
    assert mine.read_text() == '{"mine": "thesis"}'
    assert not list(there.glob("*.h5"))
    destination.Destination(URL).put(ORIGIN_FILE, b"{}")
    upload(small.root, URL)
    assert destination.Destination(URL).read(ORIGIN_FILE) == b"{}"
    assert read_whole(URL) == content_of(small)


def test_a_renewal_on_its_way_does_not_outlast_the_push(bucket, small, monkeypatch):
    monkeypatch.setattr(claim, "RENEW_SECONDS", 0.0)
    monkeypatch.setattr(claim, "POLL_SECONDS", 0.01)
    put, renewing = destination.Destination.put, threading.Event()

    def put_slowly(self, name, content):
        if name == CLAIM_FILE and threading.current_thread() is not threading.main_thread():
            renewing.set()
            time.sleep(0.3)
        elif name == INDEX_FILE:
            assert renewing.wait(10)
        put(self, name, content)

    monkeypatch.setattr(destination.Destination, "put", put_slowly)
    upload(small.root, URL)
    time.sleep(0.5)
    assert CLAIM_FILE not in bucket.names()


def test_a_folder_that_was_read_from_elsewhere_becomes_a_store(tmp_path, small):
    there = tmp_path / "there"
    there.mkdir()
    (there / ORIGIN_FILE).write_bytes(origin_json("http://127.0.0.1:9/gone"))
    upload(small.root, f"file://{there}")
    assert read_whole(there) == content_of(small)


def test_a_store_that_is_not_whole_is_refused_before_anything_is_written(bucket, small):
    (small.root / small.names[0]).unlink()
    with pytest.raises(IncompleteStoreError, match=r"\.h5: missing"):
        upload(small.root, URL)
    assert bucket.names() == set()


def failing(error, times, names=SHARD):
    """A fault of every put of a file, so often."""
    left = {}

    def fail(kind, path):
        name = path.rpartition("/")[2].removeprefix(".").partition(".h5.")[0]
        name += ".h5" * (len(name) == 16)
        if kind == "put" and names.fullmatch(name):
            left[name] = left.get(name, times) - 1
            if left[name] >= 0:
                raise error

    return fail


def test_puts_that_fail_twice_succeed_in_the_end(bucket, small):
    One.before = failing(ConnectionResetError("reset"), 2)
    upload(small.root, URL)
    assert read_whole(SAME_URL) == content_of(small)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConnectionResetError("reset"), r"{url}/\w+\.h5: the connection was lost: .* \(4 attem"),
        (PermissionError(errno.EACCES, "Forbidden"), r"{url}/\w+\.h5: access is refused: Forb"),
        (FileNotFoundError("bucket"), r"{url}/\w+\.h5: there is no such bucket or folder"),
        (NotImplementedError(), r"{url}/\w+\.h5: files there can only be read"),
        (RuntimeError("quota"), r"{url}/\w+\.h5: cannot be written: quota"),
    ],
)
def test_puts_that_always_fail_are_one_line_and_the_old_store_stays(
    objects, small, tmp_path, build_store, error, line
):
    upload(small.root, URL)
    One.before = failing(error, 10**6)
    with pytest.raises(UnreachableStoreError, match=line.format(url=URL)) as caught:
        upload(build_store(tmp_path / "new", 15, seed=1).root, URL)
    assert "\n" not in str(caught.value)
    One.before = None
    assert read_whole(URL) == content_of(small)
    assert b'"writer":""' in bucket_file(objects, CLAIM_FILE)


def bucket_file(bucket, name):
    return bucket.store[f"/bucket/features/{name}"].getvalue()


def test_a_full_disk_names_the_file(objects, small):
    One.before = failing(OSError(errno.ENOSPC, "No space left on device"), 10**6)
    with pytest.raises(OSError, match=rf"No space left on device: '{URL}/\w+\.h5'"):
        upload(small.root, URL)


def test_a_file_that_vanishes_after_it_was_sent_keeps_the_index_away(objects, small):
    name = small.names[0]

    def lose(kind, path):
        if kind == "put" and path.endswith("spec.json"):
            fsspec.filesystem("two").rm_file(f"/bucket/features/{name}")

    One.after = lose
    with pytest.raises(IncompleteStoreError, match=rf"not there, or of another size: 1.* {name}"):
        upload(small.root, URL)
    assert INDEX_FILE not in objects.names()


def test_an_index_that_is_not_ours_is_one_line(objects, small):
    def replace(kind, path):
        if kind == "put" and path.endswith(INDEX_FILE):
            fsspec.filesystem("two").pipe_file(f"/bucket/features/{INDEX_FILE}", b"other")

    One.after = replace
    with pytest.raises(CacheError, match=f"{INDEX_FILE}: is not the one that was just written"):
        upload(small.root, URL)


# A writer that ends before its time


def test_what_was_sent_before_an_error_is_not_sent_again(bucket, small):
    last = sorted(small.names)[-1]
    One.before = failing(PermissionError("no"), 10**6, re.compile(last))
    with pytest.raises(UnreachableStoreError):
        upload(small.root, URL)
    One.before = None
    there = bucket.names() & set(small.names)
    assert there
    try_to_write(URL)
    assert shards_put(lambda: upload(small.root, URL)) == sorted(set(small.names) - there)
    assert read_whole(URL) == content_of(small)
    assert CLAIM_FILE not in bucket.names()


def test_a_shard_of_other_features_that_was_sent_before_is_sent_again(objects, small, tmp_path):
    again = encoded_again(small, tmp_path / "again")
    One.before = failing(PermissionError("no"), 10**6, re.compile("spec.json"))
    with pytest.raises(UnreachableStoreError):
        upload(again.root, URL)
    One.before = None
    assert shards_put(lambda: upload(small.root, URL)) == sorted(small.names)
    assert read_whole(URL) == content_of(small)


def test_what_a_killed_writer_has_replaced_is_not_taken_for_what_was_there_before(
    objects, small, tmp_path
):
    """Two encoders of the same images are stopped in turn, the second before it can say so."""
    again = encoded_again(small, tmp_path / "again")
    One.before = failing(PermissionError("no"), 10**6, re.compile("spec.json"))
    with pytest.raises(UnreachableStoreError):
        upload(again.root, URL)
    killed = threading.Event()

    def kill(kind, path):
        if kind == "put" and path.endswith("spec.json"):
            killed.set()
        if killed.is_set():
            raise PermissionError("killed")

    One.before = kill
    with pytest.raises(UnreachableStoreError):
        upload(small.root, URL)
    assert b'"writer":""' not in bucket_file(objects, CLAIM_FILE)
    upload(again.root, SAME_URL)
    assert read_whole(SAME_URL) == content_of(again)


WRITER = """
import sys, time
from cache.remote import claim, destination, upload
claim.POLL_SECONDS, claim.SETTLE_SECONDS, claim.RENEW_SECONDS = 0.05, 0.1, 0.1
upload.NUM_THREADS = 1
put = destination.Destination.put
def slow(self, name, content):
    put(self, name, content)
    if name.endswith(".h5"):
        time.sleep(0.3)
destination.Destination.put = slow
upload.upload(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow("kills a process that writes to a server")
def test_a_killed_writer_is_taken_over_and_only_missing_shards_are_sent(
    s3, store, monkeypatch, capsys
):
    set_times(monkeypatch, poll=0.1, settle=0.2, expiry=1.0)
    url = f"{s3}/features"
    files = fsspec.filesystem("s3")
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.root), url],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )

    def recorded():
        files.invalidate_cache()
        path = f"{url}/{CLAIM_FILE}"
        return json.loads(files.cat_file(path))["sent"] if files.exists(path) else {}

    deadline = time.monotonic() + 60
    while len(recorded()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.wait(10)
    kept = recorded()
    assert 3 <= len(kept) < len(store.names)
    assert upload(store.root, url).num_sent == len(store.names) - len(kept)
    assert "began to write there at" in capsys.readouterr().out
    assert read_whole(url) == content_of(store)


# Two writers


def test_a_second_writer_is_told_who_writes_and_since_when(objects, small, monkeypatch):
    monkeypatch.setattr(claim, "RENEW_SECONDS", 0.0)
    seen = []

    def start(kind, path):
        if kind == "put" and path.endswith("spec.json"):
            with pytest.raises(CacheError) as caught:
                upload(small.root, SAME_URL)
            seen.append(str(caught.value))

    One.after = start
    upload(small.root, URL)
    assert re.fullmatch(
        rf"{SAME_URL}: process {os.getpid()} on \S+ has been writing a store there since "
        r"20\S+\+00:00\. Wait until it has ended, or stop it; then run the same command again\.",
        seen[0],
    )
    assert read_whole(URL) == content_of(small)


@pytest.mark.parametrize("number", range(1, 11))
def test_a_writer_that_slept_too_long_stops_and_the_other_store_is_whole(
    objects, small, tmp_path, build_store, monkeypatch, number
):
    """It sleeps after each of its changes in turn; the other one takes over and ends."""
    set_times(monkeypatch, poll=0.01, settle=0.02, expiry=0.1)
    upload(build_store(tmp_path / "old", 15, seed=2).root, URL)
    other = build_store(tmp_path / "other", 15, seed=1)
    stopped = Stopped(One, number, lambda: upload(other.root, SAME_URL))
    with contextlib.suppress(CacheError):
        upload(small.root, URL)
    assert stopped.has_happened
    assert read_whole(SAME_URL) == content_of(other)


@pytest.mark.parametrize("number", range(1, 6))
def test_puts_of_a_sleeper_that_land_late_are_never_read_and_can_be_repaired(
    objects, small, tmp_path, monkeypatch, number
):
    """Both stores have shards of the same names, with other features."""
    set_times(monkeypatch, poll=0.01, settle=0.02, expiry=0.1)
    other = encoded_again(small, tmp_path / "other")
    stopped = Stopped(One, number, lambda: upload(other.root, SAME_URL))
    with contextlib.suppress(CacheError):
        upload(small.root, URL)
    assert stopped.has_happened
    if not FeatureStore(SAME_URL).verify().ok:
        with pytest.raises(CorruptShardError):
            verify(SAME_URL, deep=True, repair=True)
        upload(other.root, SAME_URL)
    assert read_whole(SAME_URL) == content_of(other)


def test_an_index_of_a_sleeper_that_lands_late_ends_in_an_error_and_can_be_repaired(
    objects, small, tmp_path, build_store, monkeypatch
):
    set_times(monkeypatch, poll=0.01, settle=0.02, expiry=0.1)
    other = build_store(tmp_path / "other", 15, seed=1)

    def sleep(kind, path):
        if kind == "put" and path.endswith(INDEX_FILE):
            upload(other.root, SAME_URL)

    One.before = sleep
    with pytest.raises(CacheError, match=f"{URL}: {CLAIM_FILE}, the claim .* Run the same command"):
        upload(small.root, URL)
    One.before = None
    with pytest.raises(IncompleteStoreError, match=r"\.h5: missing"):
        FeatureStore(SAME_URL).gather(small.image_ids)
    upload(small.root, URL)
    assert read_whole(URL) == content_of(small)


@pytest.mark.slow("lets many pairs of writers race")
@pytest.mark.parametrize("kind", ["same", "other images", "encoded again"])
def test_two_writers_at_once_end_in_one_whole_store(
    objects, small, tmp_path, build_store, monkeypatch, kind
):
    set_times(monkeypatch, poll=0.1, settle=0.5, expiry=5.0)
    other = {
        "same": lambda: small,
        "other images": lambda: build_store(tmp_path / "other", 15, seed=1),
        "encoded again": lambda: encoded_again(small, tmp_path / "other"),
    }[kind]()
    outcomes = {}

    def write(number, built, scheme):
        time.sleep(random.Random(f"{number} {scheme}").random() * 0.1)
        try:
            upload(built.root, f"{scheme}://bucket/{number}/features")
            outcomes[number, scheme] = "whole"
        except CacheError as error:
            outcomes[number, scheme] = str(error)

    latencies = random.Random(kind)
    One.latency = Two.latency = lambda: latencies.random() * 0.02
    threads = [
        threading.Thread(target=write, args=(number, built, scheme))
        for number in range(10)
        for built, scheme in ((small, "one"), (other, "two"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    One.latency = Two.latency = None
    assert len(outcomes) == len(threads)
    for number in range(10):
        ends = [outcomes[number, scheme] for scheme in ("one", "two")]
        assert "whole" in ends
        assert all("\n" not in end for end in ends)
        found = read_whole(f"one://bucket/{number}/features")
        winners = [built for built, end in zip((small, other), ends, strict=True) if end == "whole"]
        assert found in [content_of(built) for built in winners]


def test_a_claim_that_is_none_is_refused(objects, small):
    for data in (b"[1]", b"{", b"\xff", b'{"writer": 3}', b'{"writer":"","sent":[]}'):
        fsspec.filesystem("one").pipe_file(f"/bucket/features/{CLAIM_FILE}", data)
        with pytest.raises(CacheError, match=f"{CLAIM_FILE}: is not the claim"):
            upload(small.root, URL)


# Where a store can be published


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("data/features", "is no URL"),
        ("https://a/b", "can only be read"),
        ("github://a@b/c", "can only be read"),
        ("simplecache::s3://a/b", "can only be read"),
        ("hf://datasets/me/photos", "hf upload"),
        ("nothing://a/b", "cannot be"),
    ],
)
def test_a_url_that_cannot_be_written_is_refused(small, url, text):
    for refused in (lambda: upload(small.root, url), lambda: try_to_write(url)):
        with pytest.raises(SettingsError, match=f"^{re.escape(url)}: .*{text}"):
            refused()


def test_a_bucket_that_is_not_there_is_one_line_and_is_not_made(s3, small):
    with pytest.raises(UnreachableStoreError, match=r"s3://no-such-bucket/\S+: there is no such"):
        upload(small.root, "s3://no-such-bucket/features")
    assert not fsspec.filesystem("s3").exists("s3://no-such-bucket")


def test_a_check_of_a_url_leaves_nothing(bucket):
    try_to_write(URL)
    assert bucket.names() == set()


def test_no_item_begins_after_an_error():
    begun, done = [], []

    def act(item):
        begun.append(item)
        if item == 3:
            raise ValueError
        time.sleep(0.01)

    with pytest.raises(ValueError, match=r"^$"):
        done.extend(in_parallel(act, range(1000)))
    assert sorted(done) == sorted(set(begun) - {3})
    assert len(begun) < 100
    assert sorted(in_parallel(str, range(50))) == list(range(50))
    assert list(in_parallel(str, [])) == []
