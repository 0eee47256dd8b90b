import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from cache.files.atomic import sha256_of
from cache.plan import plan_shards
from cache.shard import open_shard, write_shard
from cache.spec import FORMAT, Spec
from cache.store_index import ShardFile, StoreIndex

PATCHES, WIDTH = 4, 6


@pytest.fixture(scope="session")
def spec():
    return Spec(
        format=FORMAT,
        model="tiny",
        weights_sha256="ab" * 32,
        activation="quick_gelu",
        layer=-2,
        tokens="patch",
        normalized=False,
        image_size=32,
        resize="shortest",
        crop="center",
        interpolation="bicubic",
        mean=(0.5, 0.25, 0.125),
        std=(1.0, 0.5, 0.25),
        precision="fp32",
        batch_size=4,
        dtype="float16",
        patches=PATCHES,
        width=WIDTH,
        preprocess_version=1,
    )


def random_rows(num_rows, seed=0, shape=(PATCHES, WIDTH)):
    values = np.random.default_rng(seed).standard_normal((num_rows, *shape))
    return values.astype(np.float16)


@dataclass
class Built:
    """A store on disk, and what it must give back."""

    root: Path
    image_ids: np.ndarray
    features: np.ndarray
    names: list[str]
    spec: Spec

    def shard_of(self, image_id):
        return next(
            self.root / name
            for name in self.names
            if image_id in open_shard(self.root / name, self.spec).image_ids
        )


@pytest.fixture
def make_rows():
    return random_rows


@pytest.fixture(scope="session")
def build_store(spec, tmp_path_factory):
    """Makes stores; each kind is written once and copied, since writing waits for the disk."""
    made = {}

    def build(root, num_images=60, seed=0, spec=spec):
        key = num_images, seed, spec
        if key not in made:
            made[key] = write_store(tmp_path_factory.mktemp("made") / "store", *key)
        shutil.copytree(made[key].root, root)
        return replace(made[key], root=root)

    return build


def write_store(root, num_images, seed, spec, shard_rows=5):
    """Write a store from nothing but its parts: plan, shard files, table, spec."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    image_ids = np.sort(rng.choice(10**6, num_images, replace=False))
    features = random_rows(num_images, seed, (spec.patches, spec.width))
    plan = plan_shards(image_ids, image_ids.astype(np.uint64), spec.fingerprint, shard_rows)
    shards = []
    for planned in plan:
        rows = features[np.searchsorted(image_ids, planned.image_ids)]
        write_shard(root / planned.name, spec, planned.image_ids, rows)
        shards.append(open_shard(root / planned.name, spec))
    write_table(root, spec, shards)
    (root / "spec.json").write_bytes(spec.to_json())
    return Built(root, image_ids, features, [shard.path.name for shard in shards], spec)


def write_table(root, spec, shards):
    files = sorted(
        (ShardFile(s.path.name, s.path.stat().st_size, sha256_of(s.path)) for s in shards),
        key=lambda file: file.name,
    )
    numbers = {file.name: number for number, file in enumerate(files)}
    sizes = [len(shard.image_ids) for shard in shards]
    image_ids = np.concatenate([shard.image_ids for shard in shards])
    StoreIndex(
        spec.fingerprint,
        tuple(files),
        image_ids,
        np.repeat([numbers[s.path.name] for s in shards], sizes).astype(np.int32),
        np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        np.concatenate([shard.row_xxh3 for shard in shards]),
        image_ids.astype(np.uint64),
    ).write(root / "index.parquet")


@pytest.fixture
def store(tmp_path, build_store):
    return build_store(tmp_path / "features")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory, monkeypatch):
    """Each test has a folder of its own for shards of remote stores."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PATCHCACHE_CACHE_DIR", str(folder))
    return folder
