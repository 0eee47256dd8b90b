"""`extract.to`: the finished store is published to a URL as well, and a URL that cannot be written
is refused before anything is encoded."""

import subprocess
import sys

import pytest

from cache import CacheError, FeatureStore, SettingsError, UnreachableStoreError
from cache.remote import claim, network
from cache.remote.upload import try_to_write
from pipeline.settings import ExtractSettings
from tests.pipeline.test_external import write_rows


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(network, "BACK_OFF", (0.0, 0.0, 0.0))
    monkeypatch.setattr(claim, "SETTLE_SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "bucket" / "features"


@pytest.fixture
def workspace(make_workspace, folder):
    return make_workspace(extract={"to": f"file://{folder}"})


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_published_store_is_that_of_the_workspace(workspace, folder, wanted, capsys):
    workspace.run()
    assert bytes_of(folder) == workspace.store_bytes() == wanted
    shards = len(list(folder.glob("*.h5")))
    assert f"extract: file://{folder}: 30 images in {shards} shards" in capsys.readouterr().out


def test_a_store_that_was_taken_is_published_too(workspace, folder):
    workspace.encoder = {**workspace.encoder, "model": "external", "pretrained": "mine"}
    workspace.write()
    write_rows(workspace.root / "mine", workspace.images)
    workspace.run()
    assert bytes_of(folder) == bytes_of(workspace.root / "mine")


def test_only_the_changed_shards_are_sent_later(workspace, folder, jpeg, capsys):
    workspace.run()
    workspace.images[min(workspace.images)] = jpeg(10**7)
    workspace.run()
    assert ", 1 files sent (" in capsys.readouterr().out
    assert bytes_of(folder) == workspace.store_bytes()


def test_another_encoder_replaces_the_published_store(workspace, folder):
    workspace.run()
    workspace.encoder["layer"] = -1
    workspace.run()
    assert bytes_of(folder) == workspace.store_bytes()


REFUSED = [
    ("https://example.org/features", SettingsError, "can only be read"),
    ("hf://datasets/me/photos", SettingsError, "hf upload"),
    ("data/copy", SettingsError, "is no URL"),
    ("file:///proc/features", UnreachableStoreError, "file:///proc/features/writing.json: "),
]


@pytest.mark.parametrize(("url", "error", "line"), REFUSED)
def test_a_url_that_cannot_be_written_is_refused_before_encoding(workspace, url, error, line):
    workspace.extract["to"] = url
    with pytest.raises(error, match=line) as caught:
        workspace.run()
    assert "\n" not in str(caught.value)
    assert not list(workspace.finished.glob("*.h5"))
    assert not workspace.features.exists()


@pytest.mark.parametrize(("url", "line"), [(url, line) for url, _, line in REFUSED[:3]])
def test_reading_the_settings_refuses_a_url_that_cannot_be_written(url, line):
    with pytest.raises(ValueError, match=rf"^to: {url}: .*{line}"):
        ExtractSettings(workers=0, engine="local", shard_rows=1, max_failure_rate=0, to=url)


def test_settings_without_a_url_do_not_load_file_systems():
    code = """
import sys
from pipeline.settings import ExtractSettings
ExtractSettings(workers=0, engine="local", shard_rows=1, max_failure_rate=0)
sys.exit("fsspec" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_place_where_another_one_writes_is_refused_before_encoding(
    workspace, folder, monkeypatch
):
    for name, seconds in (("POLL", 0.01), ("RENEW", 0.0), ("EXPIRY", 5.0)):
        monkeypatch.setattr(claim, f"{name}_SECONDS", seconds)
    with (
        claim.Claim(claim.Destination(f"file://{folder}")),
        pytest.raises(CacheError, match="has been writing a store there since"),
    ):
        workspace.run()
    assert not list(workspace.finished.glob("*.h5"))
    try_to_write(f"file://{folder}")


def test_after_a_fault_the_store_is_here_and_the_next_run_sends_the_rest(
    workspace, folder, wanted, monkeypatch
):
    put = claim.Destination.put

    def fail(self, name, content):
        if name == "spec.json":
            raise UnreachableStoreError("the network is gone")
        put(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(claim.Destination, "put", fail)
        with pytest.raises(UnreachableStoreError, match="the network is gone"):
            workspace.run()
    assert workspace.store_bytes() == wanted
    assert not (folder / "index.parquet").exists()
    report = workspace.run()
    assert report["shards_encoded"] == 0
    assert bytes_of(folder) == wanted


def test_without_a_url_nothing_is_published(make_workspace, folder):
    workspace = make_workspace()
    workspace.run()
    assert len(FeatureStore(workspace.features)) == 30
    assert not folder.exists()
