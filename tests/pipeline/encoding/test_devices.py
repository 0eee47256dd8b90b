"""Two processes encode side by side what one would, and end together when one of them cannot.

Each process of another device costs seconds to start, so that a test tries several things.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from cache.errors import SettingsError
from cache.files.atomic import sha256_of
from cache.plan import plan_shards
from pipeline.encoding import devices as module
from pipeline.encoding.devices import encode_job
from pipeline.encoding.encode import Job
from pipeline.encoding.encoder import load_encoder, resolve_devices
from pipeline.encoding.probe import encode_probe_images, serialize_probe
from pipeline.encoding.stats import ExtractionStats
from pipeline.images.source import ImageSource, open_images, read_source
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.settings import Params

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    pytest.mark.slow("starts a process for each device"),
]


@pytest.fixture
def two(make_workspace):
    """A workspace whose settings name two devices, with what it reads written."""
    made = make_workspace(encoder={"device": "cpu,cpu"})
    made.write()
    return made


@pytest.fixture
def job(two, settings, monkeypatch):
    """All of the workspace as one job, and the encoder of the first device."""
    monkeypatch.chdir(two.root)
    given = settings(model="tiny-vit.json", batch_size=3, device="cpu,cpu")
    encoder = load_encoder(given)
    data = Params.read(Path("params.yaml")).section("data", DataSettings)
    source = open_images(read_source(), data)
    source = dataclasses.replace(source, source_xxh3=source.source_xxh3.copy())
    Path("probe").write_bytes(serialize_probe(encode_probe_images(encoder), encoder.spec))
    made = Job(
        shards=plan_shards(source.image_ids, source.source_xxh3, encoder.spec.fingerprint, 4),
        source=source,
        settings=given,
        spec=encoder.spec,
        probe=Path("probe"),
        folder=Path("made"),
        workers=0,
        max_failures=0,
    )
    assert len(made.shards) > 5
    return made, encoder


@pytest.fixture
def threads(monkeypatch):
    """A thread in place of each other process, where it is not about processes."""

    def pool(count, context, initializer, arguments):
        return ThreadPoolExecutor(count, initializer=initializer, initargs=arguments)

    monkeypatch.setattr(module, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(module, "exit_with_parent", lambda: None)
    yield
    del module._counters


def leave_to_the_other(monkeypatch, number=0):
    """The process of the first device takes some shards, and leaves the rest to the other one."""
    real = module.SharedCounters.claim_shards

    def taken(self, num_shards):
        taking = real(self, num_shards)
        yield from (next(taking) for _ in range(number))

    monkeypatch.setattr(module.SharedCounters, "claim_shards", taken)


def names(folder):
    return {path.name for path in folder.glob("*.h5")} if folder.exists() else set()


# Together they do what one does


def test_two_processes_make_the_bytes_of_one_and_each_shard_once(two, wanted, monkeypatch):
    leave_to_the_other(monkeypatch, number=2)
    all_stats = []
    real = ExtractionStats.add
    monkeypatch.setattr(
        ExtractionStats, "add", lambda self, other: all_stats.append(other) or real(self, other)
    )
    report = two.run()
    assert two.store_bytes() == wanted
    other = next(stats for stats in all_stats if stats.devices == 2)
    assert len(other.encoded_shards) == report["shards"] - 2
    # Those of the job, to which both were added.
    assert all_stats[-1].images_encoded == report["images"]
    assert all_stats[-1].encoded_shards == {
        name: sha256_of(two.features / name) for name in names(two.features)
    }


def test_no_two_take_the_same_shard_and_none_is_left():
    counters = module.SharedCounters.create()
    first, second = counters.claim_shards(9), counters.claim_shards(9)
    taken = [next(first), next(second), next(second), next(first), *first, *second]
    assert taken == list(range(9))
    fresh = module.SharedCounters.create()
    taking = fresh.claim_shards(9)
    assert next(taking) == 0
    fresh.stop()
    assert list(taking) == list(fresh.claim_shards(9)) == []


def test_failures_of_all_processes_are_counted_together(job, monkeypatch):
    """One in each process, of which each alone would be allowed."""
    job, encoder = job
    broken = [int(job.shards[place].image_ids[0]) for place in (0, -1)]
    for image_id in broken:
        position = int(np.searchsorted(job.source.image_ids, image_id))
        spoil(job.source, position)
    leave_to_the_other(monkeypatch, number=1)
    job = dataclasses.replace(job, max_failures=1)
    with pytest.raises(StageError, match=r"2 images failed .* at most 1 of 30") as caught:
        encode_job(job, encoder)
    assert all(f"image {image_id}: " in str(caught.value) for image_id in broken)
    # The shards without them are kept.
    assert names(job.folder) == {shard.name for shard in job.shards[1:-1]}


def spoil(source: ImageSource, position):
    """Make an image one that does not decode, and was so when it was indexed."""
    data = b"\xff\xd8 no picture"
    archive = source.archives[source.splits[position]]
    (Path(archive.path) / source.file_names[position]).write_bytes(data)
    source.source_xxh3[position] = xxhash.xxh3_64_intdigest(data)


# They end together


def test_a_device_that_does_not_reproduce_the_probe_stops_the_stage(job, threads, monkeypatch):
    """The first device does not go on with all that there is to do."""
    job, encoder = job
    job.probe.write_bytes(serialize_probe(encode_probe_images(encoder) + np.float16(1), job.spec))
    taken = []
    real = module.SharedCounters.claim_shards

    def slow(self, num_shards):
        for number in real(self, num_shards):
            taken.append(number)
            yield number
            wait_until(lambda: len(taken) == 1 or self.next_shard.value >= module.NO_MORE_SHARDS)

    monkeypatch.setattr(module.SharedCounters, "claim_shards", slow)
    with pytest.raises(StageError, match=r"probe: the encoder gives 8 of 8 images other features"):
        encode_job(job, encoder)
    assert taken == [0, 1]
    assert names(job.folder) == {shard.name for shard in job.shards[:2]}


def wait_until(done):
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_error_of_another_process_arrives_unchanged(job, monkeypatch):
    job, encoder = job
    leave_to_the_other(monkeypatch)
    path = next(Path(job.source.archives["train"].path).iterdir())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StageError) as caught:
        encode_job(job, encoder)
    assert re.fullmatch(
        rf"train: {path.name} is not the file that was indexed\. Run the index stage again\.",
        str(caught.value),
    )


def test_a_killed_process_gives_one_line(job, monkeypatch):
    job, encoder = job

    def encode(*args):
        [child] = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(module, "_encode", encode)
    with pytest.raises(StageError, match=r"the process of a device died\. Finished") as caught:
        encode_job(job, encoder)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("moment", ["starts", "works", "waits"])
def test_an_interrupt_ends_the_other_processes_at_once(job, monkeypatch, moment):
    """While this one starts them, works, and waits for them."""
    job, encoder = job
    others = []

    def interrupt(*args):
        raise KeyboardInterrupt

    def submit(*args, real=ProcessPoolExecutor.submit):
        future = real(*args)
        others.extend(multiprocessing.active_children())
        if moment == "starts":
            os.kill(os.getpid(), signal.SIGINT)
        return future

    def encode(*args):
        if moment == "works":
            interrupt()

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    monkeypatch.setattr(module, "_encode", encode)
    if moment == "waits":
        monkeypatch.setattr(Future, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode_job(job, encoder)
    assert [process.exitcode for process in others] == [-signal.SIGKILL]
    # It is heard again.
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_signal_to_the_tracker_of_semaphores_is_no_matter():
    """In a process of its own, whose tracker no other test has started."""
    code = """
import os, signal
from multiprocessing.resource_tracker import _resource_tracker
from pipeline.encoding.devices import SharedCounters
counters = SharedCounters.create()
os.kill(_resource_tracker._pid, signal.SIGHUP)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_is_the_matter_of_this_process_alone(job, monkeypatch):
    job, encoder = job

    def encode(*args):
        [other] = multiprocessing.active_children()
        status = Path(f"/proc/{other.pid}/status").read_text()
        blocked = int(re.search(r"SigBlk:\s*([0-9a-f]+)", status)[1], 16)
        assert blocked & (1 << (signal.SIGINT - 1))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_encode", encode)
    with pytest.raises(KeyboardInterrupt):
        encode_job(job, encoder)


def test_after_an_error_here_no_other_begins_another_shard(job, threads, monkeypatch):
    job, encoder = job
    begun, raised = threading.Event(), threading.Event()
    real, taken = module._encode, module.SharedCounters.claim_shards

    def encode(job, given, stats, counters, progress):
        if given is encoder:
            assert begun.wait(60)
            raised.set()
            raise StageError("no")
        real(job, given, stats, counters, progress)

    def one_until_raised(self, num_shards):
        for number in taken(self, num_shards):
            begun.set()
            yield number
            assert raised.wait(60)
            wait_until(lambda: self.next_shard.value >= module.NO_MORE_SHARDS)

    monkeypatch.setattr(module.SharedCounters, "claim_shards", one_until_raised)
    monkeypatch.setattr(module, "_encode", encode)
    with pytest.raises(StageError, match=r"^no$"):
        encode_job(job, encoder)
    assert names(job.folder) == {job.shards[0].name}


def test_a_process_ends_when_its_parent_is_killed(job, monkeypatch):
    """Else it would write into the work directory beside the run that goes on."""
    job, encoder = job
    receiver, sender = os.pipe()

    def encode(*args):
        [child] = multiprocessing.active_children()
        os.write(sender, str(child.pid).encode())
        signal.pause()

    monkeypatch.setattr(module, "_encode", encode)
    killed = multiprocessing.get_context("fork").Process(target=encode_job, args=(job, encoder))
    killed.start()
    orphan = int(os.read(receiver, 20))
    try:
        # It is at work.
        wait_until(lambda: names(job.folder))
        killed.kill()
        wait_until(lambda: not is_running(orphan))
    finally:
        killed.kill()
        killed.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)
        os.close(receiver)
        os.close(sender)


def is_running(process):
    with contextlib.suppress(FileNotFoundError):
        # A zombie waits to be collected by whoever inherited it.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# Which devices


def test_auto_is_every_gpu_or_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [str(device) for device in resolve_devices("auto")] == ["cuda:0", "cuda:1", "cuda:2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_devices("auto") == [torch.device("cpu")]


def test_a_list_names_one_device_per_process():
    assert resolve_devices("cpu") == [torch.device("cpu")]
    assert resolve_devices("cpu, cpu,cpu") == [torch.device("cpu")] * 3


@pytest.mark.parametrize("name", ["gpu", "", "cpu,", "cpu;cpu", "cpu,nothing", "cuda:99"])
def test_an_unknown_device_is_a_wrong_setting(name):
    with pytest.raises(SettingsError, match=r"^encoder\.device: ") as caught:
        resolve_devices(name)
    assert "\n" not in str(caught.value)


# Where the time went


@pytest.mark.parametrize(
    ("workers", "devices", "lanes"), [(0, 1, 1), (3, 1, 3), (0, 2, 2), (3, 2, 4)]
)
def test_decoding_has_as_many_lanes_as_processes_that_decode(workers, devices, lanes):
    stats = ExtractionStats(elapsed=2.0, devices=devices)
    stats.seconds["decode"] = 2.0 * lanes
    stats.seconds["encode"] = 1.0
    assert stats.busy_shares(workers) == {"decode": 1.0, "encode": 0.5 / devices}
