"""A server on this machine that speaks the protocol of S3."""

import itertools
import os

import fsspec
import pytest

LOGIN = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def s3_server():
    """The address of the server; this process and those that it starts use it as S3."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOGIN.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("NO_PROXY", ",".join(filter(None, [os.environ.get("NO_PROXY"), host])))
        yield f"http://{host}:{port}"
    server.stop()


NUMBERS = itertools.count()


@pytest.fixture
def s3(s3_server):
    """The URL of a new bucket."""
    url = f"s3://bucket-{next(NUMBERS)}"
    fsspec.filesystem("s3").mkdir(url)
    return url
