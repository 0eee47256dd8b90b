import dataclasses
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cache import layout
from cache.audit import audit
from cache.errors import (
    CorruptShardError,
    IncompleteStoreError,
    MissingImageError,
    PatchcacheError,
    SettingsError,
    SpecMismatchError,
)
from cache.id_lookup import IdLookup
from cache.mapping import FeatureMapping
from cache.remote.copies import RemoteFolder
from cache.remote.location import Location
from cache.shard import open_shard
from cache.store import FeatureStore


@pytest.fixture
def mapped(monkeypatch):
    """Names of the shards mapped so far."""
    names = []
    real = FeatureMapping.attach

    def attach(space, number, path, **where):
        names.append(path.name)
        return real(space, number, path, **where)

    monkeypatch.setattr(FeatureMapping, "attach", attach)
    return names


def wanted(built, image_ids):
    return built.features[np.searchsorted(built.image_ids, image_ids)]


def sample(built, count=200, seed=0):
    return np.random.default_rng(seed).choice(built.image_ids, count)


def assert_gathers(root, built):
    image_ids = sample(built)
    assert np.array_equal(FeatureStore(root).gather(image_ids), wanted(built, image_ids))


# What is read


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [0, 1, 2, 60, 500])
def test_gather_is_indexing_of_one_array(store, seed, count):
    image_ids = sample(store, count, seed)
    found = FeatureStore(store.root).gather(image_ids)
    assert found.dtype == np.float16
    assert found.flags.c_contiguous
    assert np.array_equal(found, wanted(store, image_ids))


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.int64, np.uint64])
def test_ids_may_come_as_any_integers(store, kind):
    image_ids = sample(store, 9)
    asked = image_ids.astype(kind) if kind not in (list, tuple) else kind(image_ids.tolist())
    found = FeatureStore(str(store.root)).gather(asked)
    assert np.array_equal(found, wanted(store, image_ids))


def test_an_owned_result_does_not_change_the_store(store):
    opened = FeatureStore(store.root)
    opened.gather(store.image_ids)[:] = 0
    assert np.array_equal(opened.gather(store.image_ids), store.features)


def test_out_is_filled_and_returned(store):
    image_ids = sample(store, 7)
    out = np.full((7, 4, 6), np.nan, np.float16)
    assert FeatureStore(store.root).gather(image_ids, out) is out
    assert np.array_equal(out, wanted(store, image_ids))
    part = np.zeros((10, 4, 6), np.float16)
    FeatureStore(store.root).gather(image_ids, out=part[2:9])
    assert np.array_equal(part[2:9], out)
    assert not part[:2].any()
    assert not part[9:].any()


@pytest.mark.parametrize(
    "out",
    [
        np.empty((6, 4, 6), np.float16),
        np.empty((7, 24), np.float16),
        np.empty((7, 4, 6), np.float32),
        np.empty((7, 4, 6), ">f2"),
        np.empty((14, 4, 6), np.float16)[::2],
        np.empty((7, 6, 4), np.float16).transpose(0, 2, 1),
        np.frombuffer(bytes(7 * 48), np.float16).reshape(7, 4, 6),
        np.frombuffer(bytearray(7 * 48 + 1), np.float16, 7 * 24, 1).reshape(7, 4, 6),
    ],
    ids=lambda out: f"{out.dtype.str}{out.shape}",
)
def test_an_out_that_does_not_fit_is_refused(store, out):
    with pytest.raises(ValueError, match=r"wanted float16 \(7, 4, 6\), C-contiguous"):
        FeatureStore(store.root).gather(store.image_ids[:7], out)


@pytest.mark.parametrize(
    "asked", [[1.5], [True, False], ["3"], [None], [[1, 2]], 5, [2**70], np.ones(3, np.float64)]
)
def test_ids_that_are_not_a_list_of_integers_are_refused(store, asked):
    with pytest.raises(ValueError, match="wanted integers"):
        FeatureStore(store.root).gather(asked)


def test_an_unsigned_id_is_not_taken_for_a_negative_one(store, monkeypatch):
    opened = FeatureStore(store.root)
    monkeypatch.setattr(opened, "_lookup", IdLookup(np.array([-(2**63), -1]), np.arange(2)))
    for asked in ([2**63], np.array([5, 2**64 - 1], np.uint64)):
        assert asked[-1] not in opened
        with pytest.raises(MissingImageError, match=f"{asked[-1]} is no id"):
            opened.gather(asked)


def test_missing_images_are_named_up_to_five(store):
    opened = FeatureStore(store.root)
    absent = [-(2**40), -1, 10**6, 10**6 + 1, 2**50, 2**62]
    for count in range(1, 7):
        asked = [int(store.image_ids[0]), *absent[:count]]
        with pytest.raises(MissingImageError, match=f"{count} of {count + 1} images") as caught:
            opened.gather(asked)
        text = str(caught.value)
        assert isinstance(caught.value, KeyError)
        assert all(str(id_) in text for id_ in absent[: min(count, 5)])
        assert (", ..." in text) == (count > 5)
        assert "\n" not in text


def test_a_missing_image_leaves_out_untouched(store):
    out = np.full((2, 4, 6), 7, np.float16)
    with pytest.raises(MissingImageError):
        FeatureStore(store.root).gather([int(store.image_ids[0]), -1], out)
    assert (out == 7).all()


def test_the_set_of_images_is_known(store):
    opened = FeatureStore(store.root)
    assert len(opened) == 60
    assert opened.image_ids.dtype == np.int64
    assert np.array_equal(opened.image_ids, store.image_ids)
    present = set(store.image_ids.tolist())
    probes = [*present, *(i + 1 for i in present), *(i - 1 for i in present), -1, 2**64]
    assert [i for i in probes if i in opened] == [i for i in probes if i in present]
    assert opened.contains(probes[:-1]).tolist() == [i in present for i in probes[:-1]]
    assert opened.contains([]).tolist() == []
    assert store.image_ids[3] in opened
    assert np.uint64(store.image_ids[3]) in opened
    with pytest.raises(ValueError, match="wanted integers"):
        opened.contains([1.5])
    assert "5" not in opened
    assert None not in opened
    assert 2**63 not in opened
    assert opened.spec == store.spec
    assert opened.fingerprint == store.spec.fingerprint


def test_ids_beyond_the_precision_of_float64_are_told_apart(tmp_path, build_store, monkeypatch):
    built = build_store(tmp_path / "big", 40)
    found = FeatureStore(built.root)
    big = built.image_ids + 2**62
    monkeypatch.setattr(found, "_lookup", IdLookup(big, np.arange(40)))
    assert all(np.uint64(i) in found and int(i) in found for i in big)
    assert not any(np.uint64(i + 1) in found for i in big if i + 1 not in big)


# Laziness, processes and threads


def test_no_shard_is_mapped_before_it_is_asked_for(store, mapped):
    opened = FeatureStore(store.root)
    assert (len(opened), opened.image_ids[0] in opened, mapped) == (60, True, [])
    assert len(store.names) > 5
    for image_id in store.image_ids:
        opened.gather([image_id])
        assert len(mapped) == len(set(mapped))
    assert sorted(mapped) == sorted(store.names)


def test_one_image_maps_one_shard(store, mapped):
    image_id = int(store.image_ids[17])
    FeatureStore(store.root).gather([image_id] * 5)
    assert mapped == [store.shard_of(image_id).name]


def test_hdf5_is_asked_on_opening_and_never_again(store, monkeypatch):
    opened = FeatureStore(store.root)
    monkeypatch.setattr(layout, "open_shard", None)
    assert np.array_equal(opened.gather(store.image_ids), store.features)


def gather_in_child(opened, image_ids, queue):
    queue.put(opened.gather(image_ids))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("used", [False, True])
def test_a_child_process_reads_the_same(store, method, used):
    opened = FeatureStore(store.root)
    if used:
        opened.gather(store.image_ids[::2])
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        jobs = [pool.apply_async(opened.gather, (sample(store, 50, n),)) for n in range(6)]
        for n, job in enumerate(jobs):
            assert np.array_equal(job.get(60), wanted(store, sample(store, 50, n)))
    assert np.array_equal(opened.gather(store.image_ids), store.features)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_goes_on_with_the_parents_mappings(store):
    opened = FeatureStore(store.root)
    opened.gather(store.image_ids)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    # Only mappings can give them now.
    shutil.rmtree(store.root)
    child = context.Process(target=gather_in_child, args=(opened, store.image_ids, queue))
    child.start()
    found = queue.get()
    child.join(60)
    assert child.exitcode == 0
    assert np.array_equal(found, store.features)


def test_a_pickled_store_holds_no_features(store):
    opened = FeatureStore(store.root)
    opened.gather(store.image_ids)
    text = pickle.dumps(opened)
    assert len(text) < 1000
    assert np.array_equal(pickle.loads(text).gather(store.image_ids), store.features)


def test_threads_read_the_same(store, mapped):
    opened = FeatureStore(store.root)

    def gather(seed):
        image_ids = sample(store, 300, seed)
        return np.array_equal(opened.gather(image_ids), wanted(store, image_ids))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(gather, range(64)))
    assert set(mapped) == set(store.names)


def test_a_relative_path_holds_when_the_folder_changes(store, monkeypatch):
    monkeypatch.chdir(store.root.parent)
    opened = FeatureStore(store.root.name)
    assert opened.root == store.root.name
    monkeypatch.chdir("/")
    assert np.array_equal(opened.gather(store.image_ids), store.features)
    assert np.array_equal(pickle.loads(pickle.dumps(opened)).image_ids, store.image_ids)


# Files that change under a reader


def test_a_shard_replaced_by_rename_keeps_its_old_data_for_a_reader(store):
    opened = FeatureStore(store.root)
    opened.gather(store.image_ids)
    for name in store.names:
        (store.root / "new").write_bytes(b"x")
        os.replace(store.root / "new", store.root / name)
    assert np.array_equal(opened.gather(store.image_ids), store.features)
    with pytest.raises(CorruptShardError):
        FeatureStore(store.root)


def test_a_shard_that_shrank_before_its_first_use_is_an_error_and_no_signal(store):
    opened = FeatureStore(store.root)
    for name in store.names:
        os.truncate(store.root / name, 5000)
    with pytest.raises(CorruptShardError, match="has 5000 bytes, had"):
        opened.gather(store.image_ids)


# What is refused


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def place_of(path, spec, name):
    """Where the first row of features, or its id, lies in a shard."""
    shard = open_shard(path, spec)
    if name == "features":
        return shard.offset
    return path.read_bytes().index(shard.image_ids[:1].tobytes())


@pytest.mark.parametrize("change", [lambda data: data + b"\0", lambda data: data[:-1]])
def test_a_shard_of_another_size_is_refused_on_opening(store, change):
    path = store.root / store.names[2]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorruptShardError, match=f"{store.names[2]}: has .* the index says"):
        FeatureStore(store.root)


def test_a_missing_shard_is_refused_on_opening(store):
    (store.root / store.names[2]).unlink()
    with pytest.raises(IncompleteStoreError, match=f"{store.names[2]}: missing.*dvc pull"):
        FeatureStore(store.root)


def test_a_shard_that_went_after_opening_is_missed_on_use(store):
    opened = FeatureStore(store.root)
    (store.root / store.names[2]).unlink()
    with pytest.raises(IncompleteStoreError, match=store.names[2]):
        opened.gather(store.image_ids)
    assert opened.verify().bad_files == [store.names[2]]


def of_equal_size(built):
    by_size = {}
    for name in built.names:
        by_size.setdefault((built.root / name).stat().st_size, []).append(name)
    return max(by_size.values(), key=len)[:2]


def test_swapped_shards_are_refused(tmp_path, build_store):
    built = build_store(tmp_path / "many", 200)
    first, second = (built.root / name for name in of_equal_size(built))
    opened = FeatureStore(built.root)
    first.rename(built.root / "x")
    second.rename(first)
    (built.root / "x").rename(second)
    with pytest.raises(CorruptShardError, match=r"not those in index\.parquet"):
        FeatureStore(built.root)
    assert sorted(opened.verify(deep=False).bad_files) == sorted([first.name, second.name])


def test_an_untouched_store_is_verified(store):
    for deep in (True, False):
        report = FeatureStore(store.root).verify(deep=deep)
        assert (report.ok, report.problems, report.bad_files) == (True, [], [])


def test_a_flipped_feature_is_found_by_the_deep_verification_alone(store):
    path = store.root / store.names[1]
    flip(path, place_of(path, store.spec, "features"))
    opened = FeatureStore(store.root)
    assert opened.verify(deep=False).ok
    report = opened.verify(deep=True)
    assert not report.ok
    assert report.bad_files == [path.name]
    assert len(report.problems) == 1
    assert str(path) in report.problems[0]


def test_a_flipped_id_is_refused(store):
    path = store.root / store.names[1]
    opened = FeatureStore(store.root)
    flip(path, place_of(path, store.spec, "image_id"))
    assert opened.verify(deep=False).bad_files == [path.name]
    with pytest.raises(CorruptShardError, match=path.name):
        FeatureStore(store.root)


def test_every_bad_shard_is_reported(store):
    for name in store.names[1:4]:
        path = store.root / name
        flip(path, place_of(path, store.spec, "features"))
    opened = FeatureStore(store.root)
    assert sorted(opened.verify().bad_files) == sorted(store.names[1:4])


def test_the_index_of_another_store_is_refused(store, tmp_path, build_store):
    other = build_store(tmp_path / "other", seed=1)
    shutil.copy(other.root / "index.parquet", store.root)
    with pytest.raises(IncompleteStoreError, match="missing"):
        FeatureStore(store.root)


def test_the_index_of_another_encoder_is_refused(store, tmp_path, build_store):
    spec = dataclasses.replace(store.spec, layer=-1)
    other = build_store(tmp_path / "other", spec=spec)
    shutil.copy(other.root / "index.parquet", store.root)
    with pytest.raises(SpecMismatchError, match=r"index.parquet: is of the encoder"):
        FeatureStore(store.root)


def test_a_shard_of_another_encoder_is_refused(store, tmp_path, build_store):
    other = build_store(tmp_path / "other", spec=dataclasses.replace(store.spec, layer=-1))
    # The spec in the shard has the same length, so that sizes do not tell.
    shutil.copy(other.root / other.names[0], store.root / store.names[0])
    with pytest.raises(SpecMismatchError, match="layer is -1, wanted -2"):
        FeatureStore(store.root).gather(store.image_ids)


@pytest.mark.parametrize("column", ["row", "row_xxh3", "image_id", "shard"])
def test_an_index_that_shuffles_rows_is_refused(store, column):
    """Never features under another image's id, whatever the index says."""
    path = store.root / "index.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    if column == "image_id":
        values[-1] += 1
    else:
        other = next(n for n, value in enumerate(values) if value != values[0])
        values[0], values[other] = values[other], values[0]
    place = table.column_names.index(column)
    field = table.schema.field(column)
    changed = table.set_column(place, field, pa.array(values, field.type))
    pq.write_table(changed, path)
    with pytest.raises(CorruptShardError, match=r"not those in index\.parquet|are not 0, 1, 2"):
        FeatureStore(store.root)


@pytest.mark.parametrize("row", [-1, 10**6, -(2**31)])
def test_a_row_out_of_its_shard_is_refused(store, row):
    path = store.root / "index.parquet"
    table = pq.read_table(path)
    values = pa.array([row, *table["row"].to_pylist()[1:]], pa.int32())
    pq.write_table(table.set_column(2, table.schema.field("row"), values), path)
    with pytest.raises(CorruptShardError):
        FeatureStore(store.root).gather(store.image_ids[:1])


def test_a_folder_that_is_no_store_says_so(tmp_path):
    for root in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(IncompleteStoreError, match=r"no whole store.*extract stage") as caught:
            FeatureStore(root)
        assert isinstance(caught.value, FileNotFoundError)


def test_a_missing_shard_is_refused_before_any_row_is_read(store, monkeypatch):
    """Its size, which bounds the rows, would be anything."""
    (store.root / store.names[2]).unlink()
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)
    with pytest.raises(IncompleteStoreError, match=f"{store.names[2]}: missing"):
        FeatureStore(store.root)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_a_folder_and_a_device_are_refused_without_waiting(store, number, make):
    path = store.root / ["spec.json", "index.parquet", store.names[0]][number]
    path.unlink()
    make(path)
    with pytest.raises(IncompleteStoreError, match=f"{path.name}: not an ordinary file"):
        FeatureStore(store.root)
    assert audit(Location(store.root), deep=True).bad_files == [path.name]


def test_a_file_in_the_place_of_a_folder_is_no_store(store):
    with pytest.raises(IncompleteStoreError, match="no whole store"):
        FeatureStore(store.root / "spec.json")


@pytest.mark.parametrize("name", ["spec.json", "index.parquet"])
def test_a_store_without_a_part_is_refused(store, name):
    (store.root / name).unlink()
    with pytest.raises(IncompleteStoreError, match=name):
        FeatureStore(store.root)


# Other file systems


@pytest.mark.parametrize("end", ["", "/"])
def test_a_file_url_reads_the_same(store, end):
    assert_gathers(store.root.as_uri() + end, store)


@pytest.fixture
def in_memory(store):
    files = fsspec.filesystem("memory")
    url = f"memory://{store.root.parent.name}/features"
    for path in store.root.iterdir():
        files.pipe(f"{url}/{path.name}", path.read_bytes())
    yield url
    files.rm(url, recursive=True)


def test_a_store_in_memory_reads_the_same_and_verifies(store, in_memory):
    assert_gathers(in_memory, store)
    assert FeatureStore(in_memory).verify().ok
    again = pickle.loads(pickle.dumps(FeatureStore(in_memory)))
    assert np.array_equal(again.gather(store.image_ids), store.features)


def test_a_remote_store_copies_only_the_shards_it_reads(store, in_memory, mapped):
    files = fsspec.filesystem("memory")
    unread = store.names[3:]
    for name in unread:
        files.rm(f"{in_memory}/{name}")
    opened = FeatureStore(in_memory)
    ids = open_shard(store.root / store.names[0], store.spec).image_ids
    assert np.array_equal(opened.gather(ids), wanted(store, ids))
    with pytest.raises(IncompleteStoreError, match="|".join(unread)):
        opened.gather(store.image_ids)


def test_a_url_without_a_store_says_so(tmp_path):
    for url in (f"memory://{tmp_path.name}/nothing", (tmp_path / "nothing").as_uri()):
        with pytest.raises(IncompleteStoreError, match=r"spec\.json: missing"):
            FeatureStore(url)


@pytest.mark.parametrize("url", ["nowhere://store", "zip://x::nowhere://y"])
def test_a_url_of_no_known_kind_is_a_wrong_call(url):
    with pytest.raises(SettingsError, match="cannot be read here"):
        FeatureStore(url)


def test_a_server_that_does_not_tell_sizes_is_said(in_memory, monkeypatch):
    monkeypatch.setattr(RemoteFolder, "_listed", {})
    monkeypatch.setattr(MemoryFileSystem, "size", lambda files, path: None)
    with pytest.raises(IncompleteStoreError, match=r"spec\.json: .* of unknown size"):
        FeatureStore(in_memory)


class Connected(MemoryFileSystem):
    """Refuses, as those with connections do, to work in a forked child of its process."""

    protocol = "connected"

    def __init__(self, **options):
        super().__init__(**options)
        self.owner = os.getpid()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("connected://", "memory://"))

    def get_file(self, *arguments, **options):
        if os.getpid() != self.owner:
            raise RuntimeError("This class is not fork-safe")
        super().get_file(*arguments, **options)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_makes_connections_of_its_own(store, in_memory):
    fsspec.register_implementation("connected", Connected, clobber=True)
    opened = FeatureStore(in_memory.replace("memory://", "connected://"))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=gather_in_child, args=(opened, store.image_ids, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert np.array_equal(queue.get(), store.features)


# Stores that lack shards


def test_a_partial_store_holds_the_images_of_its_shards_and_names_the_others(store):
    lacking = [store.names[1], store.names[4]]
    gone = np.concatenate([open_shard(store.root / n, store.spec).image_ids for n in lacking])
    for name in lacking:
        (store.root / name).unlink()
    with pytest.raises(IncompleteStoreError, match=f"{min(lacking)}: missing"):
        FeatureStore(store.root)
    opened = FeatureStore(store.root, partial=True)
    here = np.setdiff1d(store.image_ids, gone)
    assert opened.missing_shards == tuple(sorted(lacking))
    assert np.array_equal(opened.image_ids, here)
    assert np.array_equal(opened.gather(here[::-1]), wanted(store, here[::-1]))
    assert int(gone[0]) not in opened
    with pytest.raises(MissingImageError, match=f"shards that are not here: {lacking[0]}\\."):
        opened.gather([int(here[0]), int(gone[0])])
    with pytest.raises(MissingImageError, match="Index and extract"):
        opened.gather([-1])
    assert opened.verify().ok
    assert pickle.loads(pickle.dumps(opened)).missing_shards == opened.missing_shards


def test_a_whole_store_opens_as_a_partial_one_too(store):
    opened = FeatureStore(store.root, partial=True)
    assert opened.missing_shards == ()
    assert np.array_equal(opened.gather(store.image_ids), store.features)


def test_a_partial_store_behind_a_url_holds_what_is_there(store, in_memory):
    fsspec.filesystem("memory").rm(f"{in_memory}/{store.names[0]}")
    opened = FeatureStore(in_memory, partial=True)
    assert opened.missing_shards == (store.names[0],)
    assert np.array_equal(opened.gather(opened.image_ids), wanted(store, opened.image_ids))


def test_images_know_their_shard(store):
    opened = FeatureStore(store.root)
    asked = sample(store, 30)
    names = [sorted(store.names)[number] for number in opened.shards_of(asked)]
    assert names == [store.shard_of(image_id).name for image_id in asked]
    with pytest.raises(MissingImageError):
        opened.shards_of([-1])


# How it shows itself


def test_a_store_says_what_it_is(store):
    (store.root / store.names[1]).unlink()
    text = repr(FeatureStore(store.root, partial=True))
    assert text.startswith(f"<FeatureStore {str(store.root)!r}: ")
    for part in (f"{len(store.names) - 1} shards (1 missing)", "4 x 6 float16"):
        assert part in text
    assert f"encoder {store.spec.fingerprint[:12]}>" in text


def test_no_line_about_a_store_says_its_path_twice_or_speaks_of_fetching(store):
    """A local store was not fetched, as far as anybody knows."""
    changes = [
        lambda root: (root / "spec.json").unlink(),
        lambda root: (root / "spec.json").write_bytes(b"x"),
        lambda root: (root / "index.parquet").write_bytes(b"x"),
        lambda root: (root / store.names[1]).write_bytes(b"x"),
        lambda root: (root / store.names[1]).unlink(),
        lambda root: (root / store.names[1]).write_bytes(
            bytes((root / store.names[1]).stat().st_size)
        ),
    ]
    for number, change in enumerate(changes):
        root = store.root.with_name(f"changed{number}")
        shutil.copytree(store.root, root)
        change(root)
        with pytest.raises(PatchcacheError) as caught:
            FeatureStore(root)
        assert str(caught.value).count(str(root)) == 1
        for line in audit(Location(root), deep=True).problems:
            assert line.count(str(root)) == 1
            assert "etch" not in line
            assert "dvc pull" in line
