import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash

from cache import FeatureStore
from cache.errors import IncompleteStoreError
from cache.files.atomic import sha256_of
from cache.plan import plan_shards
from cache.store_index import PROBE_FILE, StoreIndex
from pipeline import extract as module
from pipeline.encoding import encoder as encoder_module
from pipeline.encoding import probe as probe_module
from pipeline.encoding import work_folder as finished_module
from pipeline.encoding.encoder import Encoder, load_encoder
from pipeline.encoding.probe import encode_probe_images, read_probe
from pipeline.images import decode as decode_module
from pipeline.images.decode import decode_rgb
from pipeline.images.source import ImageSource
from pipeline.settings import EncoderSettings
from workspace import code_hash
from workspace.errors import StageError
from workspace.locks import folder_lock
from workspace.paths import FEATURES, SHARDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    pytest.mark.slow("encodes a store for nearly every test"),
]

ROOT = Path(__file__).parents[2]

SLOW = """
import sys, time
from pathlib import Path
from workspace.settings import Params
from pipeline.encoding.encoder import Encoder
from pipeline.extract import extract
real = Encoder.submit
Encoder.submit = lambda self, x: (time.sleep(0.2), real(self, x))[1]
extract(Params.read(Path("params.yaml")))
"""


KILLS = """
import gc, os, random, shutil, signal, sys, time
from pathlib import Path
from cache import publish
from workspace.settings import Params
from pipeline.encoding.encoder import Encoder
from pipeline.extract import extract

def slow(function):
    return lambda *args: (time.sleep(0.2), function(*args))[1]

Encoder.submit = slow(Encoder.submit)
publish.link_or_copy = slow(publish.link_or_copy)
random.seed(int(sys.argv[1]))
# A collection of all that was imported takes longer than a shard, and falls into some runs only.
gc.freeze()
for _ in range(10):
    # As DVC does before it runs the stage.
    shutil.rmtree("data/features", ignore_errors=True)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        try:
            extract(Params.read(Path("params.yaml")))
        finally:
            os._exit(1)
    time.sleep(random.uniform(0.2, 2))
    os.kill(child, signal.SIGSTOP)
    finished = len(list(Path(".work/shards").glob("[!.]*.h5")))
    # The decoding process too.
    os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(finished, os.WIFSIGNALED(status), flush=True)
"""
"""Imports everything once, then runs the stage ten times and kills each run at a random moment."""

LOADED = """
import sys
from pathlib import Path
from workspace.settings import Params
from pipeline.extract import extract
extract(Params.read(Path("params.yaml")))
print("loaded", *sorted({"torch", "open_clip"} & sys.modules.keys()))
"""


def python(workspace, *arguments, code=ROOT):
    """Run Python in a workspace, on a copy of the code if one is given."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=workspace.root,
        env=os.environ | {"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=False,
    )


def plan_of(workspace, images=None):
    store = FeatureStore(workspace.features)
    images = workspace.images if images is None else images
    return plan_shards(
        np.array(list(images)),
        np.array([xxhash.xxh3_64_intdigest(data) for data in images.values()], "u8"),
        store.fingerprint,
        workspace.extract["shard_rows"],
    )


def keys(plan):
    return {shard.key for shard in plan}


def states(folder):
    """What changes when a file is written again."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.h5")
    }


def replace_bytes(path, change):
    """Damage a file as another file of that name, so that its hard links stay whole."""
    data = change(path.read_bytes())
    path.unlink()
    path.write_bytes(data)


def flip_padding(data):
    """A byte that no reader looks at, but that makes another file."""
    place = data.index(bytes(512))
    return data[: place + 256] + b"x" + data[place + 257 :]


def flip_last(path):
    replace_bytes(path, lambda data: data[:-1] + bytes([data[-1] ^ 1]))


def flip_feature(data):
    with h5py.File(io.BytesIO(data)) as file:
        place = file["features"].id.get_offset() + 8
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


# What the store holds


def test_the_store_holds_each_images_features(workspace, settings):
    report = workspace.run()
    store = FeatureStore(workspace.features)
    assert store.verify().ok
    assert store.image_ids.tolist() == sorted(workspace.images)
    encoder = load_encoder(settings(batch_size=3))
    assert encoder.spec == store.spec
    for shard in plan_of(workspace):
        for start in range(0, len(shard.image_ids), 3):
            ids = shard.image_ids[start : start + 3]
            pixels = [decode_rgb(workspace.images[i], 32, "shortest") for i in ids.tolist()]
            features = encoder.encode(torch.from_numpy(np.stack(pixels)))
            assert np.array_equal(store.gather(ids), features)
    assert report["images"] == len(workspace.images)


def test_the_files_are_those_of_the_plan(workspace):
    workspace.run()
    plan = plan_of(workspace)
    assert len(plan) > 4
    wanted = {shard.name for shard in plan} | {"spec.json", "index.parquet", "probe.safetensors"}
    assert set(workspace.store_bytes()) == wanted
    table = StoreIndex.read(
        workspace.features / "index.parquet", FeatureStore(workspace.features).spec
    )
    assert np.array_equal(table.source_xxh3, np.concatenate([s.source_xxh3 for s in plan]))


def test_the_report_has_the_keys_of_the_design(workspace):
    report = workspace.run()
    seconds = report["seconds"]
    assert set(seconds) == set(report["shares"]) == {"decode", "encode", "hash", "write"}
    assert all(value > 0 for value in seconds.values())
    shards = len(plan_of(workspace))
    found = {
        name: report[name]
        for name in ("images", "failed", "shards", "shards_encoded", "shards_reused")
    }
    assert found == {
        "images": 30,
        "failed": 0,
        "shards": shards,
        "shards_encoded": shards,
        "shards_reused": 0,
    }
    assert report["images_per_second"] > 0


# Nothing but the images and the encoder decides a byte


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker:UserWarning")
@pytest.mark.parametrize(
    ("archives", "order", "workers"),
    [("folder", 1, 0), ("folder", 2, 1), ("zip", 3, 2), ("zip", 0, 0), ("folder", 0, 4)],
)
def test_sources_order_and_workers_change_no_byte(make_workspace, wanted, archives, order, workers):
    workspace = make_workspace(archives=archives, order=order, extract={"workers": workers})
    workspace.run()
    assert workspace.store_bytes() == wanted


def test_adding_images_in_three_steps_changes_no_byte(workspace, wanted):
    everything = dict(workspace.images)
    # Each step adds between those that are there.
    for step in (3, 2, 1):
        workspace.images = {i: d for n, (i, d) in enumerate(everything.items()) if n % step == 0}
        report = workspace.run()
    assert report["images"] == len(everything)
    assert workspace.store_bytes() == wanted


def test_a_second_run_writes_no_shard_and_changes_no_byte(workspace, wanted):
    workspace.run()
    before = states(workspace.finished)
    report = workspace.run()
    assert workspace.store_bytes() == wanted
    assert states(workspace.finished) == before
    assert (report["shards_encoded"], report["shards_reused"]) == (0, len(before))
    assert report["images_per_second"] == 0


def copy_code(folder):
    for package in ("cache", "workspace", "pipeline"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.pyc"))
    return folder / "pipeline/encoding/encoder.py"


def test_with_all_shards_finished_neither_tower_nor_images_are_needed(workspace, wanted, tmp_path):
    """Not after a change of comments in the encoder's code either."""
    workspace.run()
    for split in ("train", "val"):
        shutil.rmtree(workspace.root / split)
    encoder = copy_code(tmp_path / "code")
    for change in ("", "# A comment.\n\n"):
        encoder.write_text(change + encoder.read_text())
        shutil.rmtree(workspace.features)
        done = python(workspace, "-c", LOADED, code=tmp_path / "code")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\nloaded\n")
        assert done.stderr == ""
        assert workspace.store_bytes() == wanted
        assert workspace.report()["shards_encoded"] == 0


def test_after_a_change_of_the_code_the_encoder_must_give_its_probe_again(
    workspace, wanted, tmp_path
):
    workspace.run()
    encoder = copy_code(tmp_path / "code")
    encoder.write_text(encoder.read_text().replace("float() / 255", "float() / 200"))
    done = python(workspace, "-m", "pipeline.extract", code=tmp_path / "code")
    assert done.returncode == 1
    assert "error: probe: the encoder gives 8 of 8 images other features" in done.stderr
    assert workspace.store_bytes() == wanted


def test_a_change_of_the_code_that_changes_no_feature_is_taken(
    workspace, wanted, tmp_path, monkeypatch
):
    workspace.run()
    encoder = copy_code(tmp_path / "code")
    encoder.write_text(encoder.read_text() + "\nANOTHER = 1\n")
    monkeypatch.setattr(code_hash, "ROOT", tmp_path / "code")
    checked = []
    real = probe_module.check_probe
    monkeypatch.setattr(probe_module, "check_probe", lambda *a: checked.append(real(*a)))
    for _ in range(2):
        assert workspace.run()["shards_encoded"] == 0
        assert workspace.store_bytes() == wanted
    # Once: then its spec is cached again.
    assert len(checked) == 1


def test_outputs_deleted_as_dvc_does_are_linked_again(workspace, wanted):
    workspace.run()
    shutil.rmtree(workspace.features)
    assert workspace.run()["shards_encoded"] == 0
    assert workspace.store_bytes() == wanted


def test_shards_are_not_stored_twice(workspace):
    workspace.run()
    for path in workspace.finished.glob("*.h5"):
        assert path.samefile(workspace.features / path.name)


def test_work_without_hard_links_is_copied(workspace, wanted, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    workspace.run()
    assert workspace.store_bytes() == wanted


# Interrupted


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(make_workspace, wanted):
    workspace = make_workspace(extract={"workers": 1})
    workspace.write()
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        cwd=workspace.root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(workspace.finished.glob("*.h5")) and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        # The decoding process too.
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    before = {name: state for name, state in states(workspace.finished).items() if name[0] != "."}
    assert before
    assert not workspace.features.exists()
    report = workspace.run(write=False)
    after = states(workspace.finished)
    assert {name: after[name] for name in before} == before
    assert report["shards_reused"] == len(before)
    assert report["shards_encoded"] == report["shards"] - len(before) > 0
    assert workspace.store_bytes() == wanted
    # Half a file of the kill is gone too.
    assert {path.suffix for path in workspace.finished.iterdir() if path.name != ".lock"} == {
        ".h5",
        ".sha256",
        ".safetensors",
    }


def test_killed_at_ten_random_moments_it_ends_in_the_same_bytes(make_workspace, wanted):
    workspace = make_workspace(extract={"workers": 1})
    workspace.write()
    done = python(workspace, "-c", KILLS, "0")
    rounds = [line.split() for line in done.stdout.splitlines() if line[0].isdigit()]
    assert len(rounds) == 10, done.stderr
    # Nothing that was finished is lost.
    finished = [int(number) for number, _ in rounds]
    assert finished == sorted(finished)
    # It was killed while there was more to do.
    total = sum(name.endswith(".h5") for name in wanted)
    assert any(0 < number < total for number in finished)
    assert sum(killed == "True" for _, killed in rounds) > 3
    report = workspace.run(write=False)
    assert report["shards_reused"] >= finished[-1]
    assert workspace.store_bytes() == wanted
    assert {path.name for path in workspace.finished.glob("*.h5")} == {
        name for name in wanted if name.endswith(".h5")
    }


def test_a_run_that_fails_keeps_the_shards_before(workspace, wanted, monkeypatch):
    real, calls = Encoder.submit, itertools.count()

    def submit(self, pixels):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(Encoder, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        workspace.run()
    monkeypatch.undo()
    kept = len(list(workspace.finished.glob("*.h5")))
    assert kept > 0
    assert workspace.run()["shards_reused"] == kept
    assert workspace.store_bytes() == wanted


def test_the_index_is_written_last(workspace, monkeypatch):
    published = []
    real = os.replace

    def replace(source, target):
        real(source, target)
        target = workspace.root / target
        if target.parent == workspace.features:
            published.append(target.name)

    monkeypatch.setattr(os, "replace", replace)
    workspace.run()
    assert published[-1] == "index.parquet"
    assert sorted(published) == sorted(workspace.store_bytes())


def stop(*args):
    raise KeyboardInterrupt


def test_a_first_publishing_cut_off_is_no_store(workspace, wanted, monkeypatch):
    monkeypatch.setattr(StoreIndex, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        workspace.run()
    with pytest.raises(IncompleteStoreError):
        FeatureStore(workspace.features)
    monkeypatch.undo()
    assert workspace.run()["shards_encoded"] == 0
    assert workspace.store_bytes() == wanted


def test_an_interrupted_publication_leaves_the_former_store(workspace, monkeypatch, jpeg):
    workspace.run()
    before = FeatureStore(workspace.features).gather(sorted(workspace.images))
    image_id = sorted(workspace.images)[7]
    workspace.images[image_id] = jpeg(1)
    monkeypatch.setattr(StoreIndex, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        workspace.run()
    store = FeatureStore(workspace.features)
    assert store.verify().ok
    assert np.array_equal(store.gather(sorted(workspace.images)), before)
    monkeypatch.undo()
    workspace.run()
    assert {shard.name for shard in plan_of(workspace)} == {
        path.name for path in workspace.features.glob("*.h5")
    }


def test_partial_files_of_a_kill_are_gone_after_the_next_run(workspace, wanted):
    workspace.run()
    name = next(workspace.features.glob("*.h5")).name
    (workspace.features / f".{name}.partial").write_bytes(b"x")
    (workspace.features / ".index.parquet.partial").write_bytes(b"x")
    workspace.run()
    assert workspace.store_bytes() == wanted


def test_a_reader_of_the_old_store_goes_on(workspace, jpeg):
    workspace.run()
    image_ids = sorted(workspace.images)
    reader = FeatureStore(workspace.features)
    before = reader.gather(image_ids)
    workspace.images[image_ids[7]] = jpeg(1)
    workspace.run()
    assert np.array_equal(reader.gather(image_ids), before)
    after = FeatureStore(workspace.features).gather(image_ids)
    changed = [n for n in range(len(image_ids)) if not np.array_equal(before[n], after[n])]
    assert changed == [7]


def test_a_reader_that_had_not_mapped_a_dropped_shard_raises_an_error(workspace, jpeg):
    workspace.run()
    image_ids = sorted(workspace.images)
    reader = FeatureStore(workspace.features)
    workspace.images[image_ids[7]] = jpeg(1)
    workspace.run()
    with pytest.raises(IncompleteStoreError, match="missing"):
        reader.gather(image_ids)


# Changed inputs


def change_one(images, kind, jpeg):
    """The images after one is changed, added or removed."""
    image_ids = sorted(images)
    if kind == "changed":
        return images | {image_ids[11]: jpeg(1)}
    if kind == "removed":
        return {i: data for i, data in images.items() if i != image_ids[11]}
    added = image_ids[11] + 1
    return images | {added: jpeg(added)}


@pytest.mark.parametrize("kind", ["changed", "added", "removed"])
def test_an_image_costs_only_its_own_shards(make_workspace, workspace, kind, jpeg):
    workspace.run()
    before, kept = plan_of(workspace), states(workspace.finished)
    workspace.images = change_one(workspace.images, kind, jpeg)
    report = workspace.run()
    new = keys(plan_of(workspace)) - keys(before)
    assert 1 <= len(new) <= 2
    assert report["shards_encoded"] == len(new)
    assert report["shards_reused"] == report["shards"] - len(new)
    after = states(workspace.finished)
    assert {name: after[name] for name in kept} == kept
    scratch = make_workspace("scratch")
    scratch.images = workspace.images
    scratch.run()
    assert workspace.store_bytes() == scratch.store_bytes()


def test_another_layer_is_another_store_and_the_way_back_is_free(workspace, wanted):
    workspace.run()
    workspace.encoder["layer"] = -1
    report = workspace.run()
    assert report["shards_reused"] == 0
    other = workspace.store_bytes()
    assert not {name for name in other if name.endswith(".h5")} & set(wanted)
    workspace.encoder["layer"] = -2
    assert workspace.run()["shards_encoded"] == 0
    assert workspace.store_bytes() == wanted


def test_an_image_that_changed_since_the_index_is_an_error(workspace):
    workspace.write()
    path = next((workspace.root / "train").iterdir())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StageError, match=f"{path.name} is not the file that was indexed"):
        workspace.run(write=False)
    assert not workspace.features.exists()


@pytest.mark.parametrize(
    "change",
    [
        flip_feature,
        flip_padding,
        lambda data: data[:-1],
        lambda data: data[: len(data) // 3],
        lambda data: b"",
    ],
    ids=["flipped", "padding", "a byte short", "a third", "empty"],
)
def test_a_finished_shard_that_was_damaged_is_encoded_again(workspace, wanted, change, capsys):
    workspace.run()
    path = sorted(workspace.finished.glob("*.h5"))[2]
    replace_bytes(path, change)
    report = workspace.run()
    assert report["shards_encoded"] == 1
    assert path.name in capsys.readouterr().out
    assert workspace.store_bytes() == wanted


def test_a_shard_under_the_name_of_another_is_encoded_again(workspace, wanted):
    workspace.run()
    first, second = sorted(workspace.finished.glob("*.h5"))[:2]
    data = second.read_bytes()
    replace_bytes(first, lambda _: data)
    assert workspace.run()["shards_encoded"] == 1
    assert workspace.store_bytes() == wanted


def test_a_published_shard_that_was_damaged_in_place_is_mended(workspace, wanted):
    workspace.run()
    path = next(workspace.features.glob("*.h5"))
    path.write_bytes(flip_feature(path.read_bytes()))
    assert not FeatureStore(workspace.features).verify().ok
    workspace.run()
    assert workspace.store_bytes() == wanted


# The probe


def test_the_probe_is_published_and_named_in_the_index(workspace):
    workspace.run()
    store = FeatureStore(workspace.features)
    path = workspace.features / PROBE_FILE
    table = StoreIndex.read(workspace.features / "index.parquet", store.spec)
    assert table.probe_sha256 == sha256_of(path)
    [kept] = workspace.finished.glob("probe-*.safetensors")
    assert kept.samefile(path)
    found = read_probe(path, store.spec).features
    encoder = load_encoder(
        EncoderSettings(**workspace.encoder | {"model": str(workspace.root / "tiny-vit.json")})
    )
    assert np.array_equal(found, encode_probe_images(encoder))


def other_pixels(monkeypatch):
    """Another library decodes or resizes otherwise."""
    real = decode_module.to_square
    monkeypatch.setattr(
        decode_module,
        "to_square",
        lambda image, *rest: real(image.convert("L"), *rest).convert("RGB"),
    )


def other_kernels(monkeypatch):
    """Another library multiplies otherwise."""
    real = encoder_module.patch_tokens
    monkeypatch.setattr(encoder_module, "patch_tokens", lambda *args: real(*args) * 1.01)


@pytest.mark.parametrize("change", [other_pixels, other_kernels])
def test_an_encoder_that_changed_adds_nothing(workspace, jpeg, monkeypatch, change):
    workspace.run()
    before = workspace.store_bytes(), states(workspace.finished), workspace.report()
    workspace.images[7] = jpeg(7)
    change(monkeypatch)
    started = []
    real = Encoder.submit
    monkeypatch.setattr(Encoder, "submit", lambda self, x: started.append(len(x)) or real(self, x))
    with pytest.raises(StageError, match=r"probe: the encoder gives \d of 8 images other features"):
        workspace.run()
    assert (workspace.store_bytes(), states(workspace.finished), workspace.report()) == before
    # The probe alone.
    assert started == [8]
    monkeypatch.undo()
    assert workspace.run()["images"] == 31


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), flip_last], ids=["gone", "flipped"])
def test_a_damaged_probe_is_made_again(workspace, wanted, damage):
    workspace.run()
    [probe] = workspace.finished.glob("probe-*.safetensors")
    damage(probe)
    assert workspace.run()["shards_encoded"] == 0
    assert workspace.store_bytes() == wanted
    assert probe.read_bytes() == wanted[PROBE_FILE]


# Shards that DVC has


@pytest.fixture
def stored(workspace, monkeypatch):
    """A workspace whose store only DVC has."""
    workspace.run()
    files = workspace.store_bytes()
    for name in ("data/features", ".work"):
        shutil.rmtree(workspace.root / name)

    def recover(names, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names & files.keys():
            (folder / name).write_bytes(files[name])
        return sorted(names & files.keys())

    monkeypatch.setattr(finished_module, "recover", recover)
    return workspace


def test_of_a_store_that_dvc_has_nothing_is_encoded(stored, wanted):
    assert stored.run()["shards_encoded"] == 0
    assert stored.store_bytes() == wanted


def test_only_shards_that_dvc_lacks_are_encoded(stored, make_workspace, jpeg):
    stored.run()
    before = keys(plan_of(stored))
    for name in ("data/features", ".work"):
        shutil.rmtree(stored.root / name)
    stored.images = change_one(stored.images, "added", jpeg)
    report = stored.run()
    new = keys(plan_of(stored)) - before
    assert report["shards_encoded"] == len(new) <= 2
    assert report["shards_reused"] == report["shards"] - len(new)
    scratch = make_workspace("scratch")
    scratch.images = stored.images
    scratch.run()
    assert stored.store_bytes() == scratch.store_bytes()


def test_a_changed_encoder_adds_nothing_to_the_shards_of_dvc(stored, jpeg, monkeypatch):
    stored.images = change_one(stored.images, "added", jpeg)
    other_kernels(monkeypatch)
    with pytest.raises(StageError, match=r"probe: the encoder gives 8 of 8 images other features"):
        stored.run()
    assert not stored.features.exists()


# Images that do not decode


def break_some(workspace, positions):
    image_ids = sorted(workspace.images)
    for position in positions:
        workspace.images[image_ids[position]] = b"\xff\xd8 no picture %d" % position
    return [image_ids[position] for position in positions]


@pytest.mark.parametrize("positions", [[0], [11], [29], [3, 4, 5, 6, 20]])
def test_failed_images_leave_the_store_of_the_others(make_workspace, positions):
    workspace = make_workspace(extract={"max_failure_rate": 0.2})
    broken = break_some(workspace, positions)
    report = workspace.run()
    assert report["failed"] == len(broken)
    assert report["images"] == 30 - len(broken)
    assert set(report["failures"]) == {str(image_id) for image_id in broken}
    assert report["shards"] == report["shards_encoded"] + report["shards_reused"]
    store = FeatureStore(workspace.features)
    assert not any(image_id in store for image_id in broken)
    without = make_workspace("without")
    without.images = {i: data for i, data in workspace.images.items() if i not in broken}
    without.run()
    assert workspace.store_bytes() == without.store_bytes()
    again = workspace.run()
    assert (again["failed"], again["shards_encoded"]) == (len(broken), 0)


def test_counts_hold_when_a_failure_moves_every_later_cut(make_workspace):
    """Without a cut by hash, each shard is full, and one image less shifts all behind it."""
    uncut = (i for i in itertools.count(1) if xxhash.xxh3_64_intdigest(i.to_bytes(8, "little")) % 4)
    image_ids = list(itertools.islice(uncut, 30))
    workspace = make_workspace(image_ids=image_ids, extract={"max_failure_rate": 0.1})
    break_some(workspace, [2])
    report = workspace.run()
    counts = [report[name] for name in ("shards", "shards_encoded", "shards_reused")]
    assert counts == [4, 4, 0]
    assert {path.name for path in workspace.features.glob("*.h5")} == {
        shard.name
        for shard in plan_of(
            workspace, {i: d for i, d in workspace.images.items() if i != image_ids[2]}
        )
    }


def test_too_many_failures_stop_the_stage_and_are_named(make_workspace):
    workspace = make_workspace(extract={"max_failure_rate": 0.07})
    broken = break_some(workspace, [3, 9, 20])
    with pytest.raises(StageError, match=r"3 images failed .* at most 2 of 30") as caught:
        workspace.run()
    assert all(f"image {image_id}: " in str(caught.value) for image_id in broken)
    assert not workspace.features.exists()
    assert not (workspace.root / "reports").exists()


def test_no_image_that_decodes_is_an_error(make_workspace):
    workspace = make_workspace(extract={"max_failure_rate": 1.0})
    break_some(workspace, range(30))
    with pytest.raises(StageError, match="none of its 30 images could be decoded"):
        workspace.run()


# What the stage refuses


def test_without_an_index_the_error_names_the_stage_to_run(workspace):
    workspace.write()
    path = workspace.root / "data/index/images.parquet"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(StageError, match=r"images.parquet: .*Run the index stage first"):
        workspace.run(write=False)
    for content in (b"", b"no parquet", whole[:-10]):
        path.write_bytes(content)
        with pytest.raises(StageError, match=r"images.parquet: .*Run the index stage first"):
            workspace.run(write=False)
    path.write_bytes(whole)
    pq.write_table(pq.read_table(path).drop_columns(["source_xxh3"]), path)
    with pytest.raises(StageError, match="source_xxh3"):
        workspace.run(write=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.take(list(range(30))[::-1]),
        lambda table: table.take([0, 0, *range(1, 30)]),
        lambda table: table.set_column(
            0, "image_id", pa.array([None, *table["image_id"].to_pylist()[1:]], pa.int64())
        ),
    ],
    ids=["descending", "twice", "missing"],
)
def test_an_index_whose_ids_do_not_ascend_is_refused(workspace, change):
    workspace.write()
    path = workspace.root / "data/index/images.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    said = r"images.parquet: (it has nulls|.*image_id must be .* that ascend)\. Run the index stage"
    with pytest.raises(StageError, match=said):
        workspace.run(write=False)


def test_ids_may_be_as_far_apart_as_they_go():
    ids = np.array([-(2**63), 2**63 - 1])
    assert ImageSource(ids, ids.view(np.uint64), ["a", "b"], ["train"] * 2, {}).image_ids is ids


def test_an_index_of_no_images_is_refused(workspace):
    workspace.write()
    workspace.images = {}
    workspace.write_index()
    with pytest.raises(StageError, match="holds no image"):
        workspace.run(write=False)


def test_without_images_the_error_names_the_setting(workspace):
    workspace.write()
    shutil.rmtree(workspace.root / "val")
    with pytest.raises(StageError, match=r"data\.val\.images: val does not exist"):
        workspace.run(write=False)


def test_a_disk_too_small_is_refused_before_the_work(workspace, monkeypatch):
    usage = shutil.disk_usage(workspace.root.parent)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        StageError, match=r"the features need 60\.0 KiB, 59\.0 KiB more than is free"
    ):
        workspace.run()
    assert not list(workspace.finished.glob("*.h5"))


class Reached(Exception):
    """The work would begin."""


def reach(*args):
    raise Reached


def test_the_amount_of_work_is_printed_before_the_first_image(workspace, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(
        module, "encode", lambda *args: said.append(capsys.readouterr().out) or reach()
    )
    with pytest.raises(Reached):
        workspace.run()
    assert said == ["extract: 30 images to encode, 60.0 KiB\n"]
    monkeypatch.undo()
    workspace.run()
    capsys.readouterr()
    workspace.run()
    assert "to encode" not in capsys.readouterr().out


def test_on_another_file_system_the_whole_store_needs_space(workspace, monkeypatch, jpeg):
    """Shards are copied to it, those too that were there before."""
    workspace.run()
    before = workspace.store_bytes(), states(workspace.finished)
    workspace.images[7] = jpeg(7)
    needed = 31 * 16 * 64 * 2
    usage, stat = shutil.disk_usage(workspace.root), Path.stat

    def elsewhere(path, **options):
        found = stat(path, **options)
        if path != FEATURES.parent:
            return found
        return os.stat_result([*found[:2], found.st_dev + 1, *found[3:]])

    monkeypatch.setattr(Path, "stat", elsewhere)
    free = {SHARDS: needed, FEATURES.parent: needed - 1}
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=free[path]))
    monkeypatch.setattr(module, "encode", reach)
    with pytest.raises(StageError, match=r"^data: the features need 62\.0 KiB, 1 bytes more than"):
        workspace.run()
    assert (workspace.store_bytes(), states(workspace.finished)) == before
    free[FEATURES.parent] += 1
    with pytest.raises(Reached):
        workspace.run()


def test_a_second_extraction_at_the_same_time_is_refused(workspace, wanted):
    workspace.run()
    with folder_lock(workspace.finished):
        done = python(workspace, "-m", "pipeline.extract")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: .work/shards: another process works in it.")
    assert done.stderr.count("\n") == 1
    assert workspace.store_bytes() == wanted
