"""The server of the S3 protocol that benchmarks read from."""

import os
import threading
import time
from pathlib import Path

import boto3
import pytest
import s3fs
from botocore.exceptions import ClientError

from bench.s3_server import BUCKET, Network, serving

CONTENT = os.urandom(1 << 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for name in ("top", "a/first one", "a/b/deep & sweet", "a/second"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(CONTENT)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, Network()) as server:
        yield server


def client_of(server):
    return boto3.client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id="any",
        aws_secret_access_key="any",
        region_name="us-east-1",
    )


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def read(client, **arguments):
    return client.get_object(Bucket=BUCKET, Key="a/first one", **arguments)["Body"].read()


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        (None, slice(None)),
        ("bytes=5-104", slice(5, 105)),
        ("bytes=1000000-", slice(1000000, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=1048570-9999999", slice(1048570, None)),
    ],
)
def test_boto3_gets_the_bytes_that_it_asks_for(client, asked, part):
    assert read(client, **({"Range": asked} if asked else {})) == CONTENT[part]


@pytest.mark.parametrize(
    ("key", "asked", "code"),
    [("a/none", "bytes=0-1", "NoSuchKey"), ("top", "bytes=2000000-", "InvalidRange")],
)
def test_an_error_has_the_code_that_clients_know(client, key, asked, code):
    with pytest.raises(ClientError) as refused:
        client.get_object(Bucket=BUCKET, Key=key, Range=asked)
    assert refused.value.response["Error"]["Code"] == code


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_a_listing_names_every_object_once_in_pages_of_any_size(client, page):
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=BUCKET, Prefix="a/", PaginationConfig={"PageSize": page}
    )
    found = [(file["Key"], file["Size"]) for page in pages for file in page["Contents"]]
    assert found == [(k, len(CONTENT)) for k in ("a/b/deep & sweet", "a/first one", "a/second")]


def test_a_delimiter_cuts_a_listing_into_folders(client):
    found = client.list_objects_v2(Bucket=BUCKET, Prefix="a/", Delimiter="/")
    assert [folder["Prefix"] for folder in found["CommonPrefixes"]] == ["a/b/"]
    assert [file["Key"] for file in found["Contents"]] == ["a/first one", "a/second"]


def test_s3fs_lists_and_reads(server):
    files = s3fs.S3FileSystem(
        key="any", secret="any", endpoint_url=server.url, skip_instance_cache=True
    )
    assert sorted(files.ls(f"{BUCKET}/a")) == [
        f"{BUCKET}/a/{n}" for n in ("b", "first one", "second")
    ]
    assert files.info(f"{BUCKET}/top")["size"] == len(CONTENT)
    assert not files.exists(f"{BUCKET}/none")
    assert files.cat_file(f"{BUCKET}/a/b/deep & sweet", start=10, end=20) == CONTENT[10:20]
    assert files.cat_file(f"{BUCKET}/top") == CONTENT


def test_the_server_counts_what_it_served(server, client):
    before = server.served()
    read(client, Range="bytes=0-999")
    after = server.served()
    assert (after.requests - before.requests, after.body_bytes - before.body_bytes) == (1, 1000)
    assert after.cpu_seconds > before.cpu_seconds


def test_an_answer_waits_for_the_latency_and_a_connection_keeps_to_its_rate(folder):
    seconds = []

    def timed(client):
        started = time.perf_counter()
        assert read(client) == CONTENT
        seconds.append(time.perf_counter() - started)

    with serving(folder, Network(0.05, 4e6)) as server:
        clients = [client_of(server) for _ in range(2)]
        started = time.perf_counter()
        threads = [threading.Thread(target=timed, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        whole = time.perf_counter() - started
    alone = 0.05 + len(CONTENT) / 4e6
    assert min(seconds) >= alone
    # Each connection has the rate for itself.
    assert whole < sum(seconds)


def test_the_process_ends_with_the_block(folder):
    with pytest.raises(KeyError), serving(folder, Network()) as server:  # noqa: PT012
        process = server.process_id
        assert Path(f"/proc/{process}").exists()
        raise KeyError
    assert not Path(f"/proc/{process}").exists()
