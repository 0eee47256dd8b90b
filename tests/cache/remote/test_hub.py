"""Stores on the Hugging Face Hub, which a server on this machine plays.

The Hub's own client reads them, in processes of their own: it takes the Hub's address and the
login from the environment when it is imported.
"""

import http.client
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import botocore.exceptions
import h5py
import huggingface_hub.errors
import numpy as np
import pytest

import cache
from cache.card import write_card
from cache.card_text import CardSettings
from cache.remote.network import NAMED_FAULTS
from tests.cache.remote.played_hub import COMMIT, TOKEN, PlayedHub, Repository

pytestmark = pytest.mark.slow("starts processes that read from a server")

GATHER = """
import sys, numpy as np
from cache import FeatureStore
store = FeatureStore(sys.argv[1])
np.save(sys.argv[2], store.gather(store.image_ids))
assert store.verify().ok
"""

LOG_IN_LATER = """
import os, sys
from cache import FeatureStore, UnreachableStoreError
try:
    FeatureStore(sys.argv[1])
except UnreachableStoreError:
    os.environ["HF_TOKEN"] = sys.argv[2]
print(len(FeatureStore(sys.argv[1])))
"""

GROWN = """
import shutil, sys
from cache import FeatureStore
print(len(FeatureStore(sys.argv[1])))
shutil.rmtree(sys.argv[3])
shutil.copytree(sys.argv[2], sys.argv[3])
print(len(FeatureStore(sys.argv[1])))
"""


@pytest.fixture
def hub(store):
    running = PlayedHub()
    running.repositories |= {
        "datasets/me/open": Repository(store.root),
        "datasets/me/private": Repository(store.root, is_private=True),
        "datasets/me/gated": Repository(store.root, is_gated=True),
        "buckets/me/open": Repository(store.root),
    }
    yield running
    running.stop()


@pytest.fixture
def run(hub, tmp_path):
    """Runs Python as somebody whose Hub is the played one."""

    def run(*arguments, token=None, code=0, **environment):
        inherited = {name: value for name, value in os.environ.items() if name[:3] != "HF_"}
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        login = hub.environment(tmp_path / "home", token)
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=inherited | path | login | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    return run


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("hf://datasets/me/open", None),
        ("hf://datasets/me/open@main", None),
        (f"hf://datasets/me/open@{COMMIT}", None),
        ("hf://datasets/me/private", TOKEN),
        ("hf://datasets/me/gated", TOKEN),
        ("hf://buckets/me/open", None),
    ],
)
def test_a_store_on_the_hub_is_gathered_bit_for_bit_and_verified(run, store, tmp_path, url, token):
    run("-c", GATHER, url, tmp_path / "found.npy", token=token)
    found = np.load(tmp_path / "found.npy")
    assert np.array_equal(found.view(np.uint16), store.features.view(np.uint16))


def test_files_beside_those_of_the_store_are_not_read(run, hub, store):
    write_card(str(store.root), CardSettings(license="mit"), store.root / "README.md")
    done = run("-m", "cache.verify", "hf://datasets/me/open")
    assert f"{len(store.names)} shards, all bytes are those that were written" in done.stdout
    asked = {path.rsplit("/", 1)[-1] for _, path in hub.requests if "/resolve/" in path}
    assert asked == {*store.names, "spec.json", "index.parquet"}


LOGIN = "hf auth login"

REFUSED = [
    ("hf://datasets/me/private", None, "shows no such repository", LOGIN),
    ("hf://datasets/me/private", "hf_of_another", "shows no such repository", LOGIN),
    ("hf://datasets/me/none", None, "shows no such repository", LOGIN),
    ("hf://datasets/me/none", TOKEN, "shows no such repository", LOGIN),
    ("hf://me/open", None, "shows no such repository", "hf://datasets/<owner>/<name>"),
    ("hf://datasets/me/gated", None, "the repository is gated", LOGIN),
    ("hf://datasets/me/gated", "hf_of_another", "the repository is gated", "Ask for access"),
    ("hf://datasets/me/open@v2", None, "has no such revision", "what follows the @"),
    ("hf://buckets/me/none", None, "shows no such bucket", LOGIN),
    ("hf://datasets/me/o!en", None, "no address on the Hub", "hf://datasets/<owner>/<name>"),
    ("hf://datasets/me/open/part", None, "missing, so this is no whole store", "Check the address"),
]


@pytest.mark.parametrize(("url", "token", "reason", "remedy"), REFUSED)
def test_what_the_hub_does_not_give_is_one_line_that_says_what_to_do(
    run, url, token, reason, remedy
):
    done = run("-m", "cache.inspect", url, token=token, code=1)
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {url}/spec.json: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr
    assert remedy in done.stderr
    assert "attempts" not in done.stderr


def test_verify_of_a_store_that_the_hub_does_not_give_calls_no_file_damaged(run):
    done = run("-m", "cache.verify", "hf://datasets/me/private", code=1)
    assert done.stdout.count("\n") == 1
    assert "hf auth login" in done.stdout
    assert "No file is known to be damaged" in done.stderr


def test_a_hub_that_may_not_be_asked_is_said(run):
    done = run("-m", "cache.inspect", "hf://datasets/me/open", code=1, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids requests" in done.stderr
    assert "attempts" not in done.stderr


def test_a_process_that_logs_in_after_a_refusal_gets_the_store(run, store):
    done = run("-c", LOG_IN_LATER, "hf://datasets/me/private", TOKEN)
    assert done.stdout == f"{len(store.image_ids)}\n"


def test_a_process_that_opens_a_store_again_sees_what_was_put_there_since(
    run, store, build_store, tmp_path
):
    grown = build_store(tmp_path / "grown", num_images=90)
    done = run("-c", GROWN, "hf://datasets/me/open", grown.root, store.root)
    assert done.stdout.split() == ["60", "90"]


def test_the_code_of_a_card_reads_the_store(run, store, tmp_path):
    settings = CardSettings(license="mit", repository="me/open")
    write_card(str(store.root), settings, tmp_path / "card.md")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "card.md").read_text(), re.S)
    package = tmp_path / "site/patchcache"
    shutil.copytree(Path(cache.__file__).parent, package)
    shard = sorted(store.names)[0]
    from_store = f"import numpy as np\nnp.save({str(tmp_path / 'of_store.npy')!r}, features)\n"
    from_shard = f"import numpy as np\nnp.save({str(tmp_path / 'of_shard.npy')!r}, features)\n"
    run("-c", blocks[0] + from_store, PYTHONPATH=str(package.parent))
    run("-c", blocks[1] + from_shard)
    assert np.array_equal(np.load(tmp_path / "of_store.npy"), store.features[:2])
    with h5py.File(store.root / shard) as file:
        assert np.array_equal(np.load(tmp_path / "of_shard.npy"), file["features"][:])


@pytest.mark.parametrize("name", NAMED_FAULTS)
def test_an_exception_that_is_known_by_name_is_one_of_a_client(name):
    modules = huggingface_hub.errors, botocore.exceptions, http.client
    (found,) = (getattr(module, name) for module in modules if hasattr(module, name))
    assert issubclass(found, Exception)
