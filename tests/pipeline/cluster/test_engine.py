"""A cluster of two nodes makes the bytes of one process, whatever is lost on the way."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest

from cache.errors import SettingsError
from pipeline.cluster import engine
from pipeline.cluster.engine import SHARDS_IN_FLIGHT, EncoderSlot, cluster_slots
from pipeline.encoding.engines import encode_job
from pipeline.encoding.probe import encode_probe_images, serialize_probe
from tests.pipeline.cluster.conftest import (
    environment,
    processes,
    reads_of,
    shard_files,
    wait_until,
)
from tests.pipeline.cluster.slow_images import DeadlyImages, SlowImages
from workspace.errors import StageError

pytestmark = [
    pytest.mark.slow("starts a Ray cluster of two nodes"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

DRIVER = """
import dataclasses
from pathlib import Path
from cache.cli.command import run_guarded
from pipeline import extract as stage
from tests.pipeline.cluster.slow_images import SlowImages
from workspace.settings import Params

real = stage.open_images

def open_slowly(*args):
    opened = real(*args)
    log = Path("reads").absolute()
    slow = {split: SlowImages(images, log, 0.25) for split, images in opened.archives.items()}
    return dataclasses.replace(opened, archives=slow)

stage.open_images = open_slowly
run_guarded(lambda: stage.extract(Params.read(Path("params.yaml"))))
"""
"""The stage, with images that take a quarter of a second."""


def with_images(job, kind, *args):
    archives = {split: kind(images, *args) for split, images in job.source.archives.items()}
    return dataclasses.replace(job, source=dataclasses.replace(job.source, archives=archives))


def encoded_here(job, encoder):
    """The shards as the local engine makes them."""
    encode_job(dataclasses.replace(job, engine="local", folder=Path("wanted")), encoder)
    return shard_bytes("wanted")


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("[!.]*")}


def drive(workspace, **changes):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=workspace.root,
        env=environment(**changes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_cluster_makes_the_store_of_one_process_and_reports_the_same_failures(
    make_workspace, second_node
):
    reports, stores = [], []
    for name, engine_name in (("here", "local"), ("there", "auto")):
        workspace = make_workspace(name)
        workspace.extract |= {"engine": engine_name, "max_failure_rate": 0.1, "workers": 0}
        workspace.images[7] = b"\xff\xd8 no picture"
        reports.append(workspace.run())
        stores.append(workspace.store_bytes())
    assert stores[0] == stores[1]
    assert reports[0]["failures"] == reports[1]["failures"] != {}
    assert reports[0]["shards_encoded"] == reports[1]["shards_encoded"]
    assert all(seconds > 0 for seconds in reports[1]["seconds"].values())
    assert all(0 <= share <= 1 for share in reports[1]["shares"].values())


def test_an_encoder_and_a_node_are_lost_and_only_their_shards_are_encoded_again(
    job, cluster, second_node
):
    job, encoder = job
    wanted, log = encoded_here(job, encoder), Path("reads").absolute()
    job = with_images(job, SlowImages, log, 0.15)
    finished = []

    def lose():
        wait_until(lambda: len(shard_files(job.folder)) >= 1)
        assert len(processes("ray::EncoderActor")) == 2
        processes("ray::EncoderActor")[0].kill()
        wait_until(lambda: len(shard_files(job.folder)) >= 3)
        finished.append(shard_files(job.folder))
        cluster.remove_node(second_node, allow_graceful=False)

    loser = threading.Thread(target=lose)
    loser.start()
    stats = encode_job(job, encoder)
    loser.join()
    assert shard_bytes(job.folder) == wanted
    assert stats.images_encoded == len(job.source.image_ids)
    # What was finished was not made again.
    [finished] = finished
    assert len(finished) < len(wanted) / 2
    assert finished.items() <= shard_files(job.folder).items()
    reads = Counter(reads_of(log))
    again = {
        shard.name
        for shard in job.shards
        for image_id in shard.image_ids.tolist()
        if reads[name_in(job, image_id)] > 1
    }
    assert len(again) <= 3 * SHARDS_IN_FLIGHT


def name_in(job, image_id):
    return job.source.file_names[int(np.searchsorted(job.source.image_ids, image_id))]


def test_a_killed_driver_leaves_no_process_and_its_successor_takes_its_shards(
    make_workspace, wanted, second_node
):
    workspace = make_workspace()
    workspace.extract["engine"] = "ray"
    workspace.write()
    driver = drive(workspace)
    wait_until(lambda: len(shard_files(workspace.finished)) >= 3)
    driver.kill()
    driver.communicate()
    wait_until(lambda: not processes("ray::EncoderActor") and not processes("decode_batch"))
    finished = shard_files(workspace.finished)
    unfinished = workspace.finished / ".gone.h5.partial"
    unfinished.write_bytes(b"")
    report = workspace.run(write=False)
    assert workspace.store_bytes() == wanted
    assert report["shards_reused"] >= len(finished) < report["shards"]
    assert finished.items() <= shard_files(workspace.finished).items()
    assert [path.name for path in workspace.finished.glob(".*")] == [".lock"]


def test_shards_arrive_from_nodes_that_do_not_share_the_folder(job, second_node, monkeypatch):
    job, encoder = job
    wanted = encoded_here(job, encoder)
    real = engine.ClusterJob
    monkeypatch.setattr(engine, "ClusterJob", lambda *args: real(*args[:3], "of another folder"))
    encode_job(job, encoder)
    assert shard_bytes(job.folder) == wanted


@pytest.mark.parametrize("what", ["image", "probe", "place"])
def test_an_error_elsewhere_is_one_line_here(job, second_node, what):
    job, encoder = job
    folder = Path(job.source.archives["train"].path)
    if what == "image":
        path = next(folder.iterdir())
        path.write_bytes(path.read_bytes() + b"\0")
        line = rf"train: {path.name} is not the file that was indexed\. Run the index stage again\."
    if what == "probe":
        job.probe.write_bytes(
            serialize_probe(encode_probe_images(encoder) + np.float16(1), job.spec)
        )
        line = r"node [\d.]+: probe: the encoder gives 8 of 8 images other features .*"
    if what == "place":
        folder.rename("elsewhere")
        line = rf"node [\d.]+: {folder.absolute()}: no such images there\. Share the folder .*"
    with pytest.raises(StageError, match=f"^{line}$"):
        encode_job(job, encoder)


def test_a_batch_that_kills_its_process_stops_the_stage(job, second_node):
    job, encoder = job
    job = dataclasses.replace(with_images(job, DeadlyImages), shards=job.shards[:1])
    with pytest.raises(StageError, match=r"a batch .* not decoded in 6 tries") as caught:
        encode_job(job, encoder)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_lost_again_and_again_stops_the_stage(job, monkeypatch):
    job, _ = job
    run = engine.ClusterRun.__new__(engine.ClusterRun)
    run._job, run._tries, run._encoders, run._waiting = job, Counter(), {}, deque([2])
    monkeypatch.setattr(run, "_drop", lambda encoder: run._encoders.pop(encoder.slot))
    slot = EncoderSlot("", "10.0.0.3", "cpu", 0, 0)

    def lose():
        encoder = engine._Encoder(slot, None, None, {"a": run._waiting.popleft()})
        run._encoders[slot] = encoder
        run._lose(encoder, engine._Lost("memory"))

    lose()
    lose()
    assert list(run._waiting) == [2]
    with pytest.raises(StageError) as caught:
        lose()
    name = job.shards[2].name
    assert f"node 10.0.0.3 (cpu) died with {name}, after 3 tries: memory" in str(caught.value)


def test_devices_of_one_machine_are_refused_for_a_cluster():
    with pytest.raises(SettingsError, match=r"^encoder\.device is cuda:0,cuda:1"):
        cluster_slots("cuda:0,cuda:1")


@pytest.mark.parametrize(
    ("device", "cpus", "gpus", "encoders"),
    [("cpu", 8, 0, 2), ("cpu", 3, 0, 1), ("cpu", 0, 0, 0), ("cuda", 8, 2, 2), ("cuda", 8, 0, 0)],
)
def test_a_node_has_an_encoder_for_each_gpu_or_for_the_threads_of_one(
    monkeypatch, device, cpus, gpus, encoders
):
    monkeypatch.setattr(engine.torch, "get_num_threads", lambda: 4)
    node = {"Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}
    assert engine._num_encoders(node, device) == encoders


def test_two_devices_of_this_machine_survive_a_kill_and_a_signal(make_workspace, wanted):
    """Ray of its own, started three times."""
    workspace = make_workspace(encoder={"device": "cpu,cpu"}, extract={"engine": "auto"})
    workspace.write()
    for end in (signal.SIGKILL, signal.SIGTERM):
        with drive(workspace, RAY_ADDRESS="") as driver:
            try:
                wait_until(lambda: shard_files(workspace.finished))
                # The second driver finds shards; while an encoder runs, one is still missing.
                wait_until(lambda: processes("ray::EncoderActor.encode"))
                finished = shard_files(workspace.finished)
                children = processes("patchcache-")
                os.killpg(driver.pid, end)
                _, stderr = driver.communicate(timeout=60)
            finally:
                driver.kill()
        assert children
        wait_until(lambda: not any(map(is_running, children)))  # noqa: B023
        assert finished.items() <= shard_files(workspace.finished).items()
        finished = shard_files(workspace.finished)
    assert (driver.returncode, stderr) == (130, "error: interrupted; run the same command again\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.extract"],
        cwd=workspace.root,
        env=environment(RAY_ADDRESS=""),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert workspace.store_bytes() == wanted
    assert finished.items() <= shard_files(workspace.finished).items()


def is_running(process):
    return process.is_running() and process.status() != "zombie"
