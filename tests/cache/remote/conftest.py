import dataclasses
import os

import fsspec
import pytest

from cache.remote import network
from tests.cache.remote.fault_server import FaultServer


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(network, "BACK_OFF", (0.0, 0.0, 0.0))


@pytest.fixture
def wide(tmp_path, build_store, spec):
    """A store whose rows have 6 KB: a shard is much larger than what lies around its features."""
    return build_store(
        tmp_path / "features", num_images=80, spec=dataclasses.replace(spec, patches=16, width=192)
    )


@pytest.fixture
def server(wide):
    running = FaultServer(wide.root)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def s3_server():
    """The address of a server on this machine that speaks the protocol of S3."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def s3(s3_server, monkeypatch, wide, request):
    """URL of the store in a bucket of the server; the environment names both, and no other."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fsspec.filesystem("s3").clear_instance_cache()
    bucket = f"store-{abs(hash(request.node.nodeid)) % 10**9}"
    files = fsspec.filesystem("s3")
    files.mkdir(bucket)
    for path in wide.root.iterdir():
        files.pipe_file(f"{bucket}/features/{path.name}", path.read_bytes())
    yield f"s3://{bucket}/features"
    fsspec.filesystem("s3").clear_instance_cache()
