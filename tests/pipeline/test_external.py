"""A store that others wrote becomes that of the workspace, or is refused: nothing is encoded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash

from cache import FeatureStore, SettingsError, Spec, write_store
from cache.store_index import StoreIndex
from pipeline.encoding.encoder import load_encoder
from workspace.errors import StageError

ROOT = Path(__file__).parents[2]
SPEC = Spec.external(model="net", about="random numbers", patches=3, width=5)

WITHOUT_TORCH = """
import sys
from pathlib import Path
from pipeline.extract import extract
from workspace.settings import Params
extract(Params.read(Path("params.yaml")))
print("loaded", *sorted({"torch", "open_clip"} & sys.modules.keys()))
"""


def row_of(image_id):
    return np.random.default_rng(image_id).standard_normal((3, 5)).astype(np.float16)


def write_rows(folder, images, spec=SPEC):
    """Write a store with random features of some images: id to the bytes of the file."""
    rows = ((i, xxhash.xxh3_64_intdigest(data), row_of(i)) for i, data in images.items())
    return write_store(folder, spec, rows, shard_rows=4)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def workspace(make_workspace):
    """Settings that take the store `mine`, which holds all images of the index."""
    made = make_workspace(encoder={"model": "external", "pretrained": "mine"})
    made.write()
    write_rows(made.root / "mine", made.images)
    return made


def test_the_store_is_published_as_it_is(workspace):
    workspace.run()
    assert workspace.store_bytes() == bytes_of(workspace.root / "mine")
    store = FeatureStore(workspace.features)
    assert np.array_equal(store.gather(store.image_ids), [row_of(i) for i in store.image_ids])


def test_the_report_has_all_keys_and_nothing_encoded(workspace):
    report = workspace.run()
    shards = len(list(workspace.features.glob("*.h5")))
    assert shards > 3
    assert report == {
        "images": 30,
        "failed": 0,
        "failures": {},
        "shards": shards,
        "shards_encoded": 0,
        "shards_reused": shards,
        "images_per_second": 0,
        "seconds": dict.fromkeys(("decode", "encode", "hash", "write"), 0),
        "shares": dict.fromkeys(("decode", "encode", "hash", "write"), 0),
        "fingerprint": SPEC.fingerprint,
    }


def test_the_shards_are_not_stored_twice(workspace):
    workspace.run()
    for path in (workspace.root / "mine").glob("*.h5"):
        assert path.samefile(workspace.features / path.name)


@pytest.mark.parametrize("place", ["mine", "data/features"])
def test_of_a_folder_of_links_the_files_are_published(workspace, place):
    """As the hub's cache has them, and of the stage's own output."""
    workspace.run()
    wanted = workspace.store_bytes()
    links = workspace.root / "links"
    links.mkdir()
    for name in wanted:
        (links / name).symlink_to(f"../{place}/{name}")
    workspace.encoder["pretrained"] = "links"
    workspace.run()
    assert workspace.store_bytes() == wanted
    assert not any(path.is_symlink() for path in workspace.features.iterdir())


def test_neither_images_nor_torch_are_needed(workspace):
    for split in ("train", "val"):
        shutil.rmtree(workspace.root / split)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=workspace.root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded"
    assert workspace.store_bytes() == bytes_of(workspace.root / "mine")


def test_a_store_behind_a_url_is_the_same_store(workspace):
    workspace.encoder["pretrained"] = f"file://{workspace.root}/mine"
    workspace.run()
    assert workspace.store_bytes() == bytes_of(workspace.root / "mine")


def test_another_store_replaces_all_files_of_the_first(workspace):
    workspace.run()
    other = Spec.external(model="net", about="other numbers", patches=3, width=5)
    write_rows(workspace.root / "other", workspace.images, other)
    workspace.encoder["pretrained"] = "other"
    workspace.run()
    assert workspace.store_bytes() == bytes_of(workspace.root / "other")


def test_a_store_of_another_workspace_is_taken_with_its_probe(workspace, wanted):
    folder = workspace.root / "extracted"
    folder.mkdir()
    for name, data in wanted.items():
        (folder / name).write_bytes(data)
    workspace.encoder["pretrained"] = "extracted"
    workspace.run()
    assert "probe.safetensors" in wanted
    assert workspace.store_bytes() == wanted


def test_rows_of_an_extracted_store_written_again_are_the_same_files(workspace, wanted, tmp_path):
    extracted = tmp_path / "extracted"
    extracted.mkdir()
    for name, data in wanted.items():
        (extracted / name).write_bytes(data)
    store = FeatureStore(extracted)
    index = StoreIndex.read(extracted / "index.parquet", store.spec)
    order = np.random.default_rng(0).permutation(len(store)).tolist()
    ids, sources = index.image_ids.tolist(), index.source_xxh3.tolist()
    rows = ((ids[n], sources[n], store.gather([ids[n]])[0]) for n in order)
    write_store(tmp_path / "again", store.spec, rows, shard_rows=4)
    found = bytes_of(tmp_path / "again")
    # The index names the probe, which no encoder of others has.
    assert found.keys() == wanted.keys() - {"probe.safetensors"}
    assert {n for n in found if found[n] != wanted[n]} == {"index.parquet"}
    again = StoreIndex.read(tmp_path / "again/index.parquet", store.spec)
    for name in ("shards", "image_ids", "shard_number", "row", "row_xxh3", "source_xxh3"):
        assert np.array_equal(getattr(again, name), getattr(index, name)), name


# Images that the store lacks, or has besides


def test_missing_images_are_counted_as_failures(workspace):
    workspace.extract["max_failure_rate"] = 0.1
    ids = sorted(workspace.images)
    kept = {i: d for i, d in workspace.images.items() if i not in ids[3:6]}
    shutil.rmtree(workspace.root / "mine")
    write_rows(workspace.root / "mine", kept)
    report = workspace.run()
    assert (report["images"], report["failed"]) == (27, 3)
    assert report["failures"] == {str(i): "mine has no features of it" for i in ids[3:6]}


def test_too_many_missing_images_are_refused_and_the_former_store_stays(workspace):
    workspace.run()
    before = workspace.store_bytes()
    ids = sorted(workspace.images)
    write_rows(workspace.root / "fewer", {i: workspace.images[i] for i in ids[4:]})
    workspace.encoder["pretrained"] = "fewer"
    workspace.extract["max_failure_rate"] = 0.1
    text = rf"fewer lacks 4 of 30 images, at most 3 .*max_failure_rate\): {ids[0]}, {ids[1]}, "
    with pytest.raises(StageError, match=text):
        workspace.run()
    assert workspace.store_bytes() == before


def test_a_store_of_no_indexed_image_is_refused_at_any_rate(workspace):
    write_rows(workspace.root / "others", {10**7: b"a", 10**7 + 1: b"b"})
    workspace.encoder["pretrained"] = "others"
    workspace.extract["max_failure_rate"] = 1
    with pytest.raises(StageError, match="others lacks 30 of 30 images"):
        workspace.run()


def test_features_of_another_file_than_the_indexed_one_are_refused(workspace):
    ids = sorted(workspace.images)
    changed = workspace.images | {ids[2]: b"another file"}
    shutil.rmtree(workspace.root / "mine")
    write_rows(workspace.root / "mine", changed)
    workspace.extract["max_failure_rate"] = 1
    with pytest.raises(StageError, match=rf"of other files .* for 1 of 30 images: {ids[2]}\."):
        workspace.run()
    assert not workspace.features.exists()


def test_images_that_are_not_indexed_are_named_and_published(workspace, capsys):
    for image_id in sorted(workspace.images)[:2]:
        del workspace.images[image_id]
    assert workspace.run()["images"] == 30
    assert (
        "extract: mine: 2 of its images are not indexed and stay unused" in capsys.readouterr()[0]
    )
    assert workspace.store_bytes() == bytes_of(workspace.root / "mine")


# Refused


def damage(change):
    def damaged(folder):
        path = sorted(folder.glob("*.h5"))[0]
        change(path)

    return damaged


def flip_feature(path):
    with h5py.File(path) as file:
        place = file["features"].id.get_offset() + 8
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (damage(flip_feature), r"the first: .*\.h5: 1 rows have another hash.*Write or copy"),
        (damage(Path.unlink), r"\.h5: missing"),
        (lambda folder: (folder / "index.parquet").unlink(), r"index\.parquet: missing"),
        (shutil.rmtree, r"mine: no such folder"),
        (lambda folder: (folder / "spec.json").write_text("{}"), r"format is None"),
    ],
)
def test_a_damaged_store_is_refused_in_one_line(workspace, change, text):
    change(workspace.root / "mine")
    with pytest.raises(
        StageError, match=rf"encoder\.pretrained: problems of the store: .*{text}"
    ) as e:
        workspace.run()
    assert "\n" not in str(e.value)
    assert not workspace.features.exists()


@pytest.mark.parametrize("name", ["data/features", "./data/../data/features/"])
def test_the_stages_own_output_is_refused(workspace, name):
    workspace.run()
    workspace.encoder["pretrained"] = name
    with pytest.raises(SettingsError, match="is what this stage replaces"):
        workspace.run()
    assert workspace.store_bytes() == bytes_of(workspace.root / "mine")


def test_no_tower_is_known_for_a_picture(settings):
    with pytest.raises(SettingsError, match=r"those of mine, and no vision tower .* --image-id"):
        load_encoder(settings(model="external", pretrained="mine"))
