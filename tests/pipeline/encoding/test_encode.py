import os
import signal
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from cache.files.atomic import sha256_of
from cache.plan import plan_shards
from cache.shard import open_shard
from pipeline.encoding import batches
from pipeline.encoding import encode as module
from pipeline.encoding.batches import Job
from pipeline.encoding.encode import ShardEncoder
from pipeline.encoding.encoder import load_encoder
from pipeline.encoding.stats import ExtractionStats
from pipeline.images.archives import ImageArchive
from pipeline.images.decode import decode_rgb
from pipeline.images.source import ImageSource
from workspace.data_settings import ImagePath
from workspace.errors import StageError

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture
def images(jpeg, image_set):
    return {image_id: jpeg(image_id) for image_id in image_set}


@pytest.fixture
def encoder(settings):
    return load_encoder(settings(batch_size=3))


@pytest.fixture
def source(tmp_path, images):
    folder = tmp_path / "images"
    folder.mkdir()
    for image_id, data in images.items():
        (folder / f"{image_id}.jpg").write_bytes(data)
    return ImageSource(
        image_ids=np.array(sorted(images)),
        source_xxh3=np.array([xxhash.xxh3_64_intdigest(images[i]) for i in sorted(images)], "u8"),
        file_names=[f"{image_id}.jpg" for image_id in sorted(images)],
        splits=["train"] * len(images),
        archives={"train": ImageArchive([ImagePath(path=str(folder))], key="data.train.images")},
    )


@pytest.fixture
def plan(source, encoder):
    return plan_shards(source.image_ids, source.source_xxh3, encoder.spec.fingerprint, 5)


@pytest.fixture
def run(source, encoder, settings, tmp_path):
    def encoded(shards, workers=0, max_failures=0, progress=lambda count: None):
        stats = ExtractionStats()
        job = Job(
            shards=shards,
            source=source,
            settings=settings(batch_size=3),
            spec=encoder.spec,
            probe=tmp_path / "probe",
            folder=tmp_path / "shards",
            workers=workers,
            engine="local",
            max_failures=max_failures,
        )
        ShardEncoder(job, encoder, stats, progress).run()
        return stats

    return encoded


def break_image(source, image_id, data=b"\xff\xd8 no picture"):
    position = int(np.searchsorted(source.image_ids, image_id))
    (Path(source.archives["train"].path) / source.file_names[position]).write_bytes(data)
    source.source_xxh3[position] = xxhash.xxh3_64_intdigest(data)


def features_of(shard):
    return np.memmap(shard.path, "<f2", "r", shard.offset, shard.shape)


def names(folder):
    return {path.name for path in folder.glob("*.h5")}


@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_is_its_own_images_features(run, plan, encoder, images, tmp_path, workers):
    stats = run(plan, workers)
    for planned in plan:
        shard = open_shard(tmp_path / "shards" / planned.name, encoder.spec)
        assert np.array_equal(shard.image_ids, planned.image_ids)
        for start in range(0, len(planned.image_ids), 3):
            ids = planned.image_ids[start : start + 3].tolist()
            pixels = np.stack([decode_rgb(images[i], 32, "shortest") for i in ids])
            features = encoder.encode(torch.from_numpy(pixels))
            assert np.array_equal(features_of(shard)[start : start + 3], features)
    assert stats.images_encoded == len(images)
    assert stats.encoded_shards == {
        planned.name: sha256_of(tmp_path / "shards" / planned.name) for planned in plan
    }


def test_a_batch_never_crosses_a_shard(run, plan, encoder, monkeypatch):
    sizes = []
    real = encoder.submit
    monkeypatch.setattr(encoder, "submit", lambda x: sizes.append(len(x)) or real(x))
    run(plan)
    wanted = []
    for planned in plan:
        full, rest = divmod(len(planned.image_ids), 3)
        wanted += [3] * full + [rest] * (rest > 0)
    assert sizes == wanted


def test_only_the_shards_asked_for_are_written(run, plan, tmp_path):
    run(plan[1:3])
    assert names(tmp_path / "shards") == {planned.name for planned in plan[1:3]}


def test_nothing_to_do_is_nothing_done(run, tmp_path):
    stats = run([])
    assert (stats.images_encoded, stats.failures) == (0, {})
    assert not names(tmp_path / "shards")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failed_image_costs_its_shard_alone(run, plan, source, tmp_path, workers):
    broken = plan[1].image_ids[-1]
    break_image(source, broken)
    stats = run(plan, workers, max_failures=1)
    assert list(stats.failures) == [broken]
    assert "\n" not in stats.failures[broken]
    assert names(tmp_path / "shards") == {p.name for p in plan} - {plan[1].name}


def test_one_pass_finds_every_failure(run, plan, source):
    broken = [int(i) for shard in plan for i in (shard.image_ids[0], shard.image_ids[-1])]
    for image_id in set(broken):
        break_image(source, image_id)
    stats = run(plan, max_failures=len(broken))
    assert set(stats.failures) == set(broken)


def test_a_shard_of_failures_alone_is_no_shard(run, plan, source, tmp_path):
    for image_id in plan[0].image_ids:
        break_image(source, int(image_id))
    stats = run(plan, max_failures=len(plan[0].image_ids))
    assert set(stats.failures) == set(plan[0].image_ids.tolist())
    assert plan[0].name not in names(tmp_path / "shards")


def test_too_many_failures_name_images_and_reasons(run, plan, source):
    for image_id in source.image_ids[:3]:
        break_image(source, int(image_id))
    with pytest.raises(StageError, match=r"max_failure_rate") as caught:
        run(plan, max_failures=2)
    text = str(caught.value)
    assert all(f"image {image_id}: " in text for image_id in source.image_ids[:3])
    assert "at most 2 of 30" in text
    assert "\n" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_changed_since_the_index_stops_the_run(run, plan, source, workers):
    path = Path(source.archives["train"].path) / source.file_names[4]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StageError, match=f"{path.name} is not the file that was indexed"):
        run(plan, workers, max_failures=10)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_went_since_the_index_stops_the_run(run, plan, source, workers):
    path = Path(source.archives["train"].path) / source.file_names[4]
    path.unlink()
    with pytest.raises(StageError, match=f"{path.name}.*Run the index stage again"):
        run(plan, workers, max_failures=10)


def test_a_dead_decoding_process_gives_one_line(run, plan, monkeypatch):
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(batches, "decode_for", die)
    with pytest.raises(StageError, match=r"a decoding process died.*extract.workers") as caught:
        run(plan, workers=1)
    assert "\n" not in str(caught.value)


def test_a_failed_write_is_not_swallowed(run, plan, monkeypatch):
    for place in (0, len(plan) - 1):
        bad = plan[place].name

        def write(path, *args, bad=bad):
            if path.name == bad:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "write_with_hash", write)
        with pytest.raises(OSError, match="No space left"):
            run(plan)


def test_a_value_beyond_float16_stops_the_run(run, plan, encoder):
    with torch.no_grad():
        encoder._visual.transformer.resblocks[0].mlp.c_proj.bias[0] = 1e6
    with pytest.raises(StageError, match="float16"):
        run(plan)


def test_seconds_are_counted(run, plan):
    stats = run(plan)
    assert set(stats.seconds) == {"decode", "encode", "hash", "write"}
    assert min(stats.seconds.values()) > 0
    stats.elapsed = 2 * max(stats.seconds.values())
    stats.decoders = 2
    shares = stats.busy_shares()
    assert max(shares.values()) <= 0.5
    assert shares["decode"] == stats.seconds["decode"] / stats.elapsed / 2


def test_progress_counts_every_image_once(run, plan, images):
    done = []
    run(plan, progress=done.append)
    assert sum(done) == len(images)


def test_the_next_batch_is_submitted_before_the_result_of_the_last(run, plan, encoder, monkeypatch):
    calls = []
    submit, result = encoder.submit, encoder.result
    monkeypatch.setattr(encoder, "submit", lambda x: calls.append("submit") or submit(x))
    monkeypatch.setattr(encoder, "result", lambda x: calls.append("result") or result(x))
    run(plan)
    count = calls.count("submit")
    assert calls == ["submit", *["submit", "result"] * (count - 1), "result"]


@pytest.mark.parametrize("repeats", [2, 12])
def test_never_more_than_two_shards_are_in_memory(
    run, source, encoder, repeats, monkeypatch, tmp_path
):
    """While one is written, slowly, the next is filled, and then waits."""
    plan = plan_shards(source.image_ids, source.source_xxh3, encoder.spec.fingerprint, 5)[:1]
    living = []
    most = []
    real = np.empty

    class Watched(np.ndarray):
        pass

    def empty(shape, dtype=float):
        made = real(shape, dtype)
        if len(shape) == 3 and shape[0]:
            made = made.view(Watched)
            living.append(weakref.ref(made))
            most.append(sum(reference() is not None for reference in living))
        return made

    def write(*args):
        time.sleep(0.02)

    monkeypatch.setattr(module.np, "empty", empty)
    monkeypatch.setattr(module, "write_with_hash", write)
    run(plan * repeats)
    assert len(most) == repeats
    assert max(most) == 2
