"""`encoder.stream`: the workspace's store reads its shards from the URL of an external store."""

import numpy as np
import pytest

from cache import CacheError, FeatureStore, SettingsError, UnreachableStoreError
from cache.remote import network
from tests.cache.remote.fault_server import FaultServer
from tests.pipeline.test_external import row_of, write_rows
from workspace.errors import StageError


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(network, "BACK_OFF", (0.0, 0.0, 0.0))


@pytest.fixture
def mine(tmp_path):
    return tmp_path / "workspace" / "mine"


@pytest.fixture
def server(mine):
    running = FaultServer(mine)
    yield running
    running.stop()


@pytest.fixture
def workspace(make_workspace, mine, server):
    encoder = {"model": "external", "pretrained": server.url, "stream": True}
    made = make_workspace(encoder=encoder)
    made.write()
    write_rows(mine, made.images)
    return made


def shards_fetched(server):
    return {name for kind, name in server.requests if kind == "GET" and name.endswith(".h5")}


def test_no_shard_is_copied_and_the_features_are_those_of_the_url(workspace, mine, server):
    report = workspace.run()
    assert workspace.store_bytes().keys() == {"spec.json", "index.parquet", "origin.json"}
    for name in ("spec.json", "index.parquet"):
        assert workspace.store_bytes()[name] == (mine / name).read_bytes()
    assert shards_fetched(server) == set()
    assert (report["images"], report["shards"]) == (30, len(list(mine.glob("*.h5"))))
    store = FeatureStore(workspace.features)
    assert np.array_equal(store.gather(store.image_ids), [row_of(i) for i in store.image_ids])
    assert store.verify().ok


def test_a_probe_is_copied(workspace, mine, wanted):
    for path in mine.iterdir():
        path.unlink()
    for name, data in wanted.items():
        (mine / name).write_bytes(data)
    workspace.run()
    assert workspace.store_bytes()["probe.safetensors"] == wanted["probe.safetensors"]
    assert FeatureStore(workspace.features).verify().ok


def test_copying_and_streaming_replace_each_other(workspace, mine):
    workspace.run()
    workspace.encoder["stream"] = False
    workspace.run()
    assert workspace.store_bytes() == {path.name: path.read_bytes() for path in mine.iterdir()}
    workspace.encoder["stream"] = True
    workspace.run()
    assert workspace.store_bytes().keys() == {"spec.json", "index.parquet", "origin.json"}


def test_a_store_that_lacks_a_shard_is_refused(workspace, mine):
    name = min(path.name for path in mine.glob("*.h5"))
    (mine / name).unlink()
    with pytest.raises(StageError, match=rf"lacks 1 of its \d+ shards: {name}"):
        workspace.run()
    assert not workspace.features.exists()


def test_images_of_other_files_are_refused(workspace, jpeg):
    workspace.images[min(workspace.images)] = jpeg(10**7)
    with pytest.raises(StageError, match="has features of other files"):
        workspace.run()
    assert not workspace.features.exists()


def test_an_index_that_was_changed_is_refused(workspace, mine):
    path = mine / "index.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="its sha256 is"):
        workspace.run()


def test_a_server_that_is_gone_is_one_line(workspace, server):
    workspace.run()
    server.fail("spec.json", "status", 500)
    with pytest.raises(UnreachableStoreError, match="the server answers 500"):
        workspace.run()
    assert FeatureStore(workspace.features).verify().ok


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"pretrained": "mine"}, "encoder: stream is true, wanted model external and a URL"),
        ({"model": "tiny-vit.json"}, "encoder: stream is true, wanted model external and a URL"),
        ({"pretrained": "file:///mine"}, r"encoder: file:///mine: .* set encoder\.stream: false\."),
    ],
)
def test_what_cannot_be_streamed_is_refused(workspace, changes, line):
    workspace.encoder |= changes
    with pytest.raises(SettingsError, match=line):
        workspace.run()
    assert not list(workspace.root.glob("data/features/*"))
