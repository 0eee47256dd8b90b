"""A machine that vanishes loses no run: what `checkpoints.to` names holds its checkpoints."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from moto.server import ThreadedMotoServer

import train.loop.loop
import train.remote_run
from cache.files.atomic import sha256_of
from cache.remote import network
from cache.remote.destination import Destination
from tests.train.stage_server import outcome
from train.pretrain import pretrain
from train.remote_run import RemoteRun
from workspace.errors import StageError

STEPS = 9
LOOP = {"epochs": 3, "log_every_steps": 3, "validate_every_steps": 4, "samples": 1}


@pytest.fixture(scope="session")
def bucket():
    """A URL of a server of S3's protocol, and the environment of its login."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("runs")
        yield "s3://runs", environment
    server.stop()


@pytest.fixture(params=["file", "s3"])
def place(request, tmp_path):
    """A URL that can be written to, and the environment that reaches it."""
    if request.param == "file":
        return f"file://{tmp_path}/a place", {}
    url, environment = request.getfixturevalue("bucket")
    return f"{url}/{tmp_path.name}", environment


def files_there(url):
    """Return the bytes of the files below a URL, by path in it."""
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}


def steps_there(url):
    # Listed and not read: a running stage deletes old checkpoints.
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    names = [Path(path).stem for path in files.find(root) if "/step-" in path]
    return sorted(int(name.removeprefix("step-")) for name in names)


@pytest.fixture
def params(workspace):
    def params(url=None, **changes):
        to = {} if url is None else {"to": url}
        return workspace.params(
            pretrain=LOOP | changes, checkpoints={"every_steps": 2, "keep": 2} | to
        )

    return params


@pytest.fixture
def unbroken(params):
    """What the stage ends with on a machine that nothing happens to."""

    def run(made):
        pretrain(params(**made))
        found = outcome("pretrain")
        shutil.rmtree("runs/pretrain")
        del found["params"]
        return found

    return run


def outcome_but_params():
    found = outcome("pretrain")
    del found["params"]
    return found


@pytest.mark.slow("kills and resumes training runs")
def test_a_machine_that_vanishes_is_replaced_by_another(server, params, unbroken, place):
    url, environment = place
    longer = {"epochs": 20, "log_every_steps": 1000, "validate_every_steps": 1000}
    wanted = unbroken(longer)
    params(url, **longer)
    first = server.start("pretrain", **environment)
    assert first.until(lambda: len(steps_there(url)) == 2), first.output
    first.kill()
    shutil.rmtree(".work")
    there = steps_there(url)
    second = server.start("pretrain", **environment)
    code, output = second.end()
    assert code == 0, output
    assert f"/step-{there[-1]:08}.safetensors\n" in output
    assert f"pretrain: going on after step {there[-1]} of 60\n" in output
    assert outcome_but_params() == wanted
    found = files_there(url)
    (key,) = {name.split("/")[1] for name in found}
    published = {
        path.relative_to("runs/pretrain").as_posix(): path
        for path in Path("runs/pretrain").rglob("*")
        if path.is_file()
    }
    manifest = json.loads(found.pop(f"pretrain/{key}/run/manifest.json"))
    assert manifest == {name: sha256_of(path) for name, path in published.items()}
    assert found == {
        f"pretrain/{key}/run/{name}": path.read_bytes() for name, path in published.items()
    }


@pytest.fixture
def stopped(monkeypatch, params):
    """Stop the stage after step 5, whose checkpoint is saved and sent; then lose the machine."""

    def stop(url):
        real, put, calls = train.loop.loop.optimizer_step, Destination.put, []

        def slow(self, name, content):
            # The command waits for the last one.
            time.sleep(1.0 * ("00005" in name))
            put(self, name, content)

        def signalling(*arguments, **named):
            calls.append(1)
            if len(calls) == 5:
                signal.raise_signal(signal.SIGTERM)
            return real(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Destination, "put", slow)
            patch.setattr(train.loop.loop, "optimizer_step", signalling)
            with pytest.raises(KeyboardInterrupt):
                pretrain(params(url))
        shutil.rmtree(".work")

    return stop


@pytest.mark.slow("trains several times")
@pytest.mark.parametrize("damage", ["half", "other bytes"])
def test_a_damaged_checkpoint_there_falls_back_to_the_one_before(
    params, unbroken, stopped, tmp_path, capsys, damage
):
    url = f"file://{tmp_path}/place"
    wanted = unbroken({})
    stopped(url)
    assert steps_there(url) == [4, 5]
    (newest,) = tmp_path.glob("place/pretrain/*/step-00000005.safetensors")
    data = newest.read_bytes()
    half = len(data) // 2
    changed = data[:half] if damage == "half" else data[:half] + b"?" + data[half + 1 :]
    newest.write_bytes(changed)
    capsys.readouterr()
    pretrain(params(url))
    said = capsys.readouterr().err.splitlines()
    assert "damaged" in said[1]
    assert said[2].endswith("/step-00000004.safetensors")
    assert said[3] == f"pretrain: going on after step 4 of {STEPS}"
    assert outcome_but_params() == wanted


@pytest.mark.slow("trains several times")
def test_an_older_checkpoint_of_this_machine_gives_way_to_a_newer_one_there(
    params, stopped, tmp_path, capsys
):
    url = f"file://{tmp_path}/place"
    stopped(url)
    (there,) = tmp_path.glob("place/pretrain/*")
    here = Path(".work/runs/pretrain", there.name, "checkpoints")
    here.mkdir(parents=True)
    shutil.copy(there / "step-00000004.safetensors", here)
    pretrain(params(url))
    assert "going on after step 5" in capsys.readouterr().err
    # Of the same step, nothing is fetched.
    shutil.rmtree(tmp_path / "place")
    stopped(url)
    (there,) = tmp_path.glob("place/pretrain/*")
    here.mkdir(parents=True)
    shutil.copy(there / "step-00000005.safetensors", here)
    capsys.readouterr()
    pretrain(params(url))
    assert "fetched" not in capsys.readouterr().err


@pytest.mark.slow("trains several times")
def test_without_the_network_training_ends_and_the_same_command_sends_the_run_later(
    params, unbroken, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(network, "BACK_OFF", (0.0,))
    wanted = unbroken({})
    # A file in place of the folder.
    (tmp_path / "place").write_text("no folder")
    url = f"file://{tmp_path}/place"
    with pytest.raises(StageError, match="finished and published in runs/pretrain, but could not"):
        pretrain(params(url))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, "a kind of failure is said once"
    assert all(line.startswith(f"pretrain: {url}/pretrain/") for line in said)
    assert said[0].endswith("The run goes on with what is on this machine.")
    assert said[1].endswith("Training goes on; the next checkpoint is sent in its place.")
    assert outcome_but_params() == wanted
    (tmp_path / "place").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train.loop.loop, "optimizer_step", None)
        pretrain(params(url))
    assert outcome_but_params() == wanted
    assert any(name.endswith("run/manifest.json") for name in files_there(url))
    assert list(Path(".work/runs/pretrain").iterdir()) == [Path(".work/runs/pretrain/.lock")]


@pytest.fixture
def remote(tmp_path):
    return RemoteRun(f"file://{tmp_path}/place", "pretrain", 2, tmp_path / "outgoing")


def send(remote, folder, step):
    path = folder / f"step-{step:08}.safetensors"
    path.write_bytes(b"%d" % step)
    remote.send_checkpoint(path)
    path.unlink()


def test_training_waits_for_no_upload_and_a_newer_checkpoint_overtakes(
    remote, tmp_path, monkeypatch
):
    is_open, sent, put = [], [], Destination.put

    def slow(self, name, content):
        while not is_open:
            time.sleep(0.001)
        sent.append(name)
        put(self, name, content)

    monkeypatch.setattr(Destination, "put", slow)
    send(remote, tmp_path, 1)
    while remote._waiting:
        time.sleep(0.001)
    for step in (2, 3, 4):
        send(remote, tmp_path, step)
    is_open.append(True)
    remote.wait()
    assert sent == ["step-00000001.safetensors", "step-00000004.safetensors"]
    assert not list((tmp_path / "outgoing").iterdir())


def test_the_end_of_a_command_waits_for_a_limited_time(remote, tmp_path, monkeypatch, capsys):
    is_open = []

    def stuck(self, name, content):
        while not is_open:
            time.sleep(0.001)

    monkeypatch.setattr(Destination, "put", stuck)
    monkeypatch.setattr(train.remote_run, "LAST_SECONDS", 0.05)
    send(remote, tmp_path, 1)
    remote.wait()
    assert "did not get there within" in capsys.readouterr().err
    is_open.append(True)
    remote.wait()


def test_the_last_few_are_kept_there_and_no_newer_one_is_deleted(remote, tmp_path):
    for step in (9, 1, 2, 3):
        send(remote, tmp_path, step)
        remote.wait()
    left = sorted(path.name for path in tmp_path.glob("place/*"))
    assert left == [f"step-{step:08}.safetensors" for step in (2, 3, 9)]


def test_a_bucket_that_is_not_there_is_one_line_and_is_not_made(bucket, tmp_path, capsys):
    remote = RemoteRun("s3://no-such-bucket/a/run", "pretrain", 2, tmp_path / "outgoing")
    assert not list(remote.newer_checkpoints("", tmp_path))
    for step in (1, 2):
        send(remote, tmp_path, step)
        remote.wait()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(
        "pretrain: s3://no-such-bucket/a/run/step-00000001.safetensors: there is"
    )
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished/metrics.json").write_text("{}")
    with pytest.raises(StageError, match="there is no such bucket"):
        remote.send_run(tmp_path / "finished")
    assert not fsspec.filesystem("s3").exists("s3://no-such-bucket")


def test_a_checkpoint_or_a_file_of_the_run_appears_whole(remote, tmp_path, monkeypatch):
    class Cut(BaseException):
        pass

    def cut(self, source, target, **options):
        Path(target).write_bytes(b"half")
        raise Cut

    folder = tmp_path / "finished"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/weights").write_bytes(b"whole")
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", cut)
        with pytest.raises(Cut):
            remote.send_run(folder)
        with pytest.raises(Cut):
            remote._there.put("step-00000001.safetensors", folder / "adapter/weights")
    there = tmp_path / "place"
    assert not (there / "run/adapter/weights").exists()
    assert not (there / "step-00000001.safetensors").exists()
    remote.send_run(folder)
    assert (there / "run/adapter/weights").read_bytes() == b"whole"
    assert not list(there.glob("*.partial")), "what is left of a checkpoint is deleted"
