"""A cluster that cannot be reached, and Ray that is not installed, give one line."""

import subprocess
import sys

import pytest

from cache.errors import SettingsError
from pipeline.cluster import connection
from tests.pipeline.cluster.conftest import environment
from workspace.errors import StageError


def connect(address):
    with connection.connected(address, 1, 0):
        raise AssertionError


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"package ray, which is not installed.*extra `ray`"):
        connect(None)


def test_the_address_of_ray_client_is_refused():
    with pytest.raises(SettingsError, match=r"^RAY_ADDRESS is ray://head:10001"):
        connect("ray://head:10001")


def test_an_address_where_nothing_answers_is_named(monkeypatch):
    with pytest.raises(StageError, match=r"^RAY_ADDRESS: no connection .* at 127\.0\.0\.1:9: "):
        connect("127.0.0.1:9")


@pytest.mark.slow("starts a Ray cluster")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_token_file_of_the_home_folder_connects_and_another_token_is_explained(
    cluster, tmp_path
):
    code = """
import sys
from cache.cli.command import run_guarded
from pipeline.cluster.connection import connected

def connect():
    with connected(sys.argv[1], 1, 0):
        print("connected")

run_guarded(connect)
"""
    variables = environment(
        HOME=str(tmp_path), RAY_AUTH_MODE="token", RAY_NUM_REDIS_GET_RETRIES="1"
    )
    token = variables.pop("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()

    def connect_with(held):
        (tmp_path / ".ray/auth_token").write_text(held)
        command = [sys.executable, "-c", code, cluster.address]
        return subprocess.run(
            command, env=variables, capture_output=True, text=True, check=False, timeout=60
        )

    done = connect_with(token)
    assert done.stdout == "connected\n", done.stderr
    said = connect_with("0" * 64).stderr.splitlines()[-1]
    assert f"no connection to a Ray cluster at {cluster.address}: " in said
    assert "Set RAY_AUTH_MODE=token, and its token in ~/.ray/auth_token" in said


@pytest.mark.slow("starts Ray")
def test_a_process_without_the_token_is_refused_by_ray_of_our_own():
    code = """
import os, subprocess, sys
from pipeline.cluster.connection import connected
other = "import ray, sys; ray._raylet.GcsClient(address=sys.argv[1])"
with connected(None, 1, 0):
    import ray
    address = ray.get_runtime_context().gcs_address
    for token in (os.environ["RAY_AUTH_TOKEN"], "0" * 64):
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        command = [sys.executable, "-c", other, address]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(done.returncode, "InvalidAuthToken" in done.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(RAY_ADDRESS="", RAY_AUTH_MODE="token"),
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.stdout.split() == ["0", "False", "1", "True"], done.stderr
