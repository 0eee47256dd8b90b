import contextlib
import dataclasses
import os
import secrets
import time
from pathlib import Path

import psutil
import pytest

from cache.plan import plan_shards
from pipeline.cluster.connection import import_ray
from pipeline.encoding.batches import Job
from pipeline.encoding.encoder import load_encoder
from pipeline.encoding.probe import encode_probe_images, serialize_probe
from pipeline.images.source import open_images, read_source
from pipeline.settings import EncoderSettings
from workspace.data_settings import DataSettings
from workspace.settings import Params

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 << 20}

QUICK_LOSS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""A node that is gone is noticed in seconds instead of half a minute."""


@pytest.fixture(scope="package")
def cluster():
    """A cluster whose first node has one CPU, and which wants a token."""
    # Ray keeps the first token of a process, which another test may have set.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = import_ray()
    # Ray reads the mode as it is imported, which another test may have done.
    ray._private.authentication.authentication_token_setup.enable_token_auth_by_default()
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "_system_config": QUICK_LOSS, "include_dashboard": False},
    )
    try:
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def second_node(cluster, monkeypatch):
    """A node beside the first one, for one test; RAY_ADDRESS names the cluster."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    node = cluster.add_node(**NODE)
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def job(make_workspace, monkeypatch):
    """All of a workspace as one job, and the encoder of this process."""
    made = make_workspace()
    made.extract["engine"] = "auto"
    made.write()
    monkeypatch.chdir(made.root)
    params = Params.read(Path("params.yaml"))
    settings = params.section("encoder", EncoderSettings)
    encoder = load_encoder(settings)
    source = open_images(read_source(), params.section("data", DataSettings))
    source = dataclasses.replace(source, source_xxh3=source.source_xxh3.copy())
    Path("probe").write_bytes(serialize_probe(encode_probe_images(encoder), encoder.spec))
    job = Job(
        shards=plan_shards(source.image_ids, source.source_xxh3, encoder.spec.fingerprint, 2),
        source=source,
        settings=settings,
        spec=encoder.spec,
        probe=Path("probe"),
        folder=Path("made"),
        workers=0,
        engine="auto",
        max_failures=0,
    )
    assert len(job.shards) > 8
    return job, encoder


def wait_until(done, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def processes(title):
    """Return the processes of Ray below this one that run what a title says."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()) and process.status() != "zombie":
                found.append(process)
    return found


def shard_files(folder):
    """Return the inode of each shard by name."""
    return {path.name: path.stat().st_ino for path in Path(folder).glob("*.h5")}


def reads_of(log):
    return log.read_text().splitlines() if log.exists() else []


def environment(**changes):
    root = Path(__file__).parents[3]
    return os.environ | {"PYTHONPATH": str(root)} | changes
