"""`python -m cache.push`, as a user calls it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache.errors import CorruptShardError
from cache.remote import claim
from cache.remote.claim import CLAIM_FILE
from cache.remote.upload import upload
from cache.store import FeatureStore
from cache.verify import verify

ROOT = Path(__file__).parents[2]


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "cache.push", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line_of(process, code):
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, ""), errors
    assert re.fullmatch(r"error: [^\n]+\n", errors), errors
    return errors


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/shared/features"


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(claim, "SETTLE_SECONDS", 0.0)


def push(root, url):
    print(upload(root, url))


@pytest.mark.usefixtures("_quick")
def test_a_push_says_what_was_sent_and_what_was_deleted(store, url, tmp_path, build_store, capsys):
    push(store.root, url)
    size = r"\d+\.\d KiB"
    assert re.fullmatch(
        rf"{url}: 60 images in 23 shards, 23 files sent \({size}\)\n", capsys.readouterr().out
    )
    push(store.root, url)
    assert capsys.readouterr().out == f"{url}: 60 images in 23 shards, 0 files sent (0 bytes)\n"
    push(build_store(tmp_path / "other", 15, seed=1).root, url)
    assert capsys.readouterr().out.endswith(", 23 old files deleted\n")


@pytest.mark.usefixtures("_quick")
def test_a_shard_that_was_damaged_there_is_deleted_by_repair_and_sent_again(store, url, capsys):
    push(store.root, url)
    path = Path(url.removeprefix("file://")) / store.names[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"deleted: 1\. Push the store there again"):
        verify(url, deep=True, repair=True)
    assert not path.exists()
    push(store.root, url)
    assert "1 files sent" in capsys.readouterr().out.splitlines()[-1]
    assert FeatureStore(url).verify().ok


def test_a_folder_without_a_store_ends_with_one_line(tmp_path, url):
    assert "no such folder" in line_of(start(tmp_path / "nothing", url), 1)


@pytest.mark.parametrize("url", ["https://a/b", "folder", "hf://datasets/me/photos"])
def test_a_url_that_cannot_be_written_is_a_bad_call(store, url):
    assert f"error: {url}: " in line_of(start(store.root, url), 2)


def test_a_call_without_a_url_is_a_bad_call(store):
    process = start(store.root)
    assert "url" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


@pytest.mark.slow("waits for a server")
def test_a_server_that_is_not_there_ends_with_one_line(store):
    login = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_MAX_ATTEMPTS": "1"}
    process = start(store.root, "s3://a/b", AWS_ENDPOINT_URL="http://127.0.0.1:9", **login)
    assert "s3://a/b/writing.json: " in line_of(process, 1)


@pytest.mark.slow("waits for a writer to claim its place")
def test_an_interrupted_push_ends_at_once_and_gives_its_claim_back(store, url):
    process = start(store.root, url)
    path = Path(url.removeprefix("file://")) / CLAIM_FILE
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in line_of(process, 130)
    assert '"writer":""' in path.read_text()
