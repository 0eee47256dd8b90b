"""A store, and servers on this machine: one with faults, one that speaks the protocol of S3."""

import dataclasses
import itertools
import os

import fsspec
import pytest

from cache.remote import network
from tests.cache.remote.fault_server import FaultServer

LOGIN = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

NUMBERS = itertools.count()


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
    """The address of the server; this process and those that it starts use it as S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in LOGIN.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("NO_PROXY", ",".join(filter(None, [os.environ.get("NO_PROXY"), host])))
        fsspec.filesystem("s3").clear_instance_cache()
        yield f"http://{host}:{port}"
        fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def s3(s3_server):
    """The URL of a new bucket."""
    url = f"s3://bucket-{next(NUMBERS)}"
    fsspec.filesystem("s3").mkdir(url)
    return url


@pytest.fixture
def s3_store(s3, wide):
    """The URL of the store, in a bucket."""
    for path in wide.root.iterdir():
        fsspec.filesystem("s3").pipe_file(f"{s3}/features/{path.name}", path.read_bytes())
    return f"{s3}/features"
