"""A folder whose shards are at a URL: the same store, held by the index of the folder."""

import json
import pickle
import shutil

import numpy as np
import pytest

from cache.errors import CorruptShardError, IncompleteStoreError, SettingsError
from cache.inspect import inspect
from cache.publish import publish_copy, publish_origin
from cache.remote import claim, network
from cache.remote.location import Location
from cache.remote.origin import ORIGIN_FILE, origin_json, read_origin
from cache.remote.upload import upload
from cache.shard import open_shard
from cache.store import FeatureStore
from cache.store_index import INDEX_FILE, StoreIndex
from cache.verify import verify
from cache.write import write_store
from tests.cache.remote.fault_server import FaultServer


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(network, "BACK_OFF", (0.0, 0.0, 0.0))
    monkeypatch.setattr(claim, "SETTLE_SECONDS", 0.0)


@pytest.fixture
def server(store):
    running = FaultServer(store.root)
    yield running
    running.stop()


def publish(root, url):
    root.mkdir(exist_ok=True)
    source = Location(url)
    publish_origin(root, source, StoreIndex.read(source.path(INDEX_FILE), source.read_spec()))
    return root


@pytest.fixture
def folder(tmp_path, server):
    """A folder with spec and index of the store, and the URL of its shards."""
    return publish(tmp_path / "streamed", server.url)


def test_the_folder_has_no_shard_and_gives_the_same_features(store, server, folder):
    assert {p.name for p in folder.iterdir()} == {"spec.json", INDEX_FILE, ORIGIN_FILE}
    assert (folder / ORIGIN_FILE).read_bytes() == f'{{"url":"{server.url}"}}\n'.encode()
    opened = FeatureStore(folder)
    assert not [name for kind, name in server.requests if kind == "GET" and name.endswith(".h5")]
    assert np.array_equal(opened.gather(store.image_ids), store.features)
    again = pickle.loads(pickle.dumps(FeatureStore(folder)))
    assert np.array_equal(again.gather(store.image_ids[:3]), store.features[:3])


def test_shards_are_read_from_s3(store, s3, tmp_path):
    upload(store.root, f"{s3}/features")
    opened = FeatureStore(publish(tmp_path / "streamed", f"{s3}/features"))
    assert np.array_equal(opened.gather(store.image_ids), store.features)


def test_another_store_at_the_url_is_never_read_for_the_one_that_was_published(store, folder):
    path = store.root / store.names[1]
    data = bytearray(path.read_bytes())
    data[open_shard(path, store.spec).offset] ^= 1
    path.write_bytes(data)
    opened = FeatureStore(folder)
    with pytest.raises(CorruptShardError, match="then run the extract stage"):
        opened.gather(store.image_ids)


def test_a_shard_that_is_gone_is_a_line_that_names_the_url(store, folder, server):
    (store.root / store.names[1]).unlink()
    with pytest.raises(IncompleteStoreError, match=f"^{server.url}/{store.names[1]}: missing"):
        FeatureStore(folder).gather(store.image_ids)


@pytest.mark.parametrize("name", ["spec.json", INDEX_FILE])
def test_spec_and_index_are_those_of_the_folder(folder, name):
    (folder / name).unlink()
    with pytest.raises(IncompleteStoreError, match=rf"^{folder}/{name}: missing.*dvc pull"):
        FeatureStore(folder)


def test_it_is_verified_and_inspected_with_the_shards_of_the_url(store, folder, server, capsys):
    verify(str(folder), deep=True, repair=False)
    inspect(str(folder))
    assert f"shards at    {server.url}\n" in capsys.readouterr().out
    path = store.root / store.names[1]
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptShardError, match=f"Push the store to {server.url} again"):
        verify(str(folder), deep=True, repair=False)
    with pytest.raises(SettingsError, match=f"its shards are at {server.url}. Repair"):
        verify(str(folder), deep=True, repair=True)


def test_it_is_pushed_with_all_shards_and_without_the_origin(store, folder, tmp_path):
    upload(folder, f"file://{tmp_path}/pushed")
    names = {path.name for path in (tmp_path / "pushed").iterdir()}
    assert names == {"spec.json", INDEX_FILE, *store.names}


def test_shards_and_origin_replace_each_other(store, folder, tmp_path, build_store, server):
    other = build_store(tmp_path / "other", 15, seed=1)
    source = Location(other.root)
    index = StoreIndex.read(other.root / INDEX_FILE, other.spec)
    publish_copy(folder, source, index)
    assert not (folder / ORIGIN_FILE).exists()
    assert np.array_equal(FeatureStore(folder).gather(other.image_ids), other.features)
    publish(folder, server.url)
    row = np.ones((store.spec.patches, store.spec.width), np.float16)
    written = write_store(folder, store.spec, [(1, 2, row)])
    assert written.origin is None
    assert np.array_equal(written.gather([1]), [row])
    publish(folder, server.url)
    assert not list(folder.glob("*.h5"))
    assert np.array_equal(FeatureStore(folder).gather(store.image_ids), store.features)


def test_an_origin_behind_a_url_means_nothing(store, server):
    (store.root / ORIGIN_FILE).write_bytes(origin_json("https://example.org/another"))
    opened = FeatureStore(server.url)
    assert opened.origin is None
    assert np.array_equal(opened.gather(store.image_ids), store.features)
    assert not [name for _, name in server.requests if name == ORIGIN_FILE]


REFUSED = [
    "file:///etc",
    "local:///etc",
    "/etc",
    "s3://",
    "memory://x",
    "ssh://host/x",
    "simplecache::s3://a/b",
    "s3://a::file:///etc",
    "filecache::file:///etc",
    "zip://x::https://a/b",
    "s3://a\nb",
    "s3://a/\x1b[2J",
]


@pytest.mark.parametrize("url", REFUSED)
def test_an_origin_of_another_kind_is_refused_without_a_request(store, url):
    (store.root / ORIGIN_FILE).write_text(json.dumps({"url": url}))
    with pytest.raises(IncompleteStoreError, match=rf"^{store.root}/{ORIGIN_FILE}: wanted") as e:
        FeatureStore(store.root)
    assert str(e.value).isprintable()
    with pytest.raises(SettingsError, match="shards are read directly from"):
        origin_json(url)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"url": 3}',
        b'{"url": "s3://a/b", "more": 1}',
        b"[" * 60_000,
        b'{"url": "s3://a/' + b"b" * 10**6 + b'"}',
    ],
)
def test_an_origin_that_is_damaged_is_one_line(store, data):
    (store.root / ORIGIN_FILE).write_bytes(data)
    with pytest.raises(IncompleteStoreError, match="wanted one URL") as caught:
        FeatureStore(store.root)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_pipe_in_the_place_of_the_origin_is_not_waited_for(store):
    import os

    os.mkfifo(store.root / ORIGIN_FILE)
    assert read_origin(store.root) is None
    shutil.rmtree(store.root)
    assert read_origin(store.root) is None


def test_a_password_in_the_url_is_not_shown(tmp_path, server, capsys):
    url = server.url.replace("://", "://user:secret@")
    inspect(str(publish(tmp_path / "streamed", url)))
    inspect(url)
    print(FeatureStore(url))
    output = capsys.readouterr().out
    assert output.count("user:***@") == 3
    assert "secret" not in output
