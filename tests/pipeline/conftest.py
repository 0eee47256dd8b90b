import contextlib
import functools
import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image
from ruamel.yaml import YAML

from pipeline.extract import extract
from pipeline.indexing.tables import SCHEMAS
from pipeline.settings import EncoderSettings
from workspace.settings import Params

TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "layers": 3,
        "width": 64,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@functools.cache
def draw_jpeg(seed, size=(48, 40)):
    """A JPEG with coarse random blobs, so that neighbouring pixels are related."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def tiny():
    """The open_clip config of a small ViT; tests may change it."""
    return json.loads(json.dumps(TINY))


@pytest.fixture
def jpeg():
    return draw_jpeg


@pytest.fixture
def tiny_model(tmp_path, tiny):
    path = tmp_path / "tiny-vit.json"
    path.write_text(json.dumps(tiny))
    return str(path)


@pytest.fixture
def settings(tiny_model):
    """Makes encoder settings: the small ViT with random weights, but for what is given."""

    def make(**changes):
        usual = {"model": tiny_model, "pretrained": "random", "layer": -2, "precision": "fp32"}
        return EncoderSettings(**(usual | {"batch_size": 4, "device": "cpu"} | changes))

    return make


def name_of(image_id):
    return f"{image_id:012d}.jpg"


class Workspace:
    """A folder with images, their index and settings; tests change them and run the stage."""

    def __init__(self, root, image_ids):
        self.root = root
        self.images = {image_id: draw_jpeg(image_id) for image_id in image_ids}
        self.extract = {"workers": 0, "engine": "local", "shard_rows": 4, "max_failure_rate": 0}
        self.encoder = {"model": "tiny-vit.json", "pretrained": "random", "layer": -2}
        self.encoder |= {"precision": "fp32", "batch_size": 3, "device": "cpu"}
        self.config = TINY
        self.archives = "folder"
        self.order = 0

    def split(self, image_id):
        return "val" if image_id % 5 == 0 else "train"

    def write(self):
        """Write everything that the stage reads."""
        self.root.mkdir(exist_ok=True)
        (self.root / "tiny-vit.json").write_text(json.dumps(self.config))
        data = {"source": "local", "instruct": "none", "instruct_holdout": 0.1}
        for split in ("train", "val"):
            data[split] = {"images": self.write_images(split), "captions": "none"}
        data["max_reject_rate"] = 0.0
        with (self.root / "params.yaml").open("w") as file:
            sections = {"data": data, "encoder": self.encoder, "extract": self.extract}
            YAML().dump(sections, file)
        self.write_index()

    def write_images(self, split):
        chosen = [image_id for image_id in self.images if self.split(image_id) == split]
        random.Random(self.order).shuffle(chosen)
        if self.archives == "zip":
            with zipfile.ZipFile(self.root / f"{split}.zip", "w") as archive:
                for image_id in chosen:
                    archive.writestr(f"{split}2017/{name_of(image_id)}", self.images[image_id])
            return f"{split}.zip"
        folder = self.root / split
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for image_id in chosen:
            (folder / name_of(image_id)).write_bytes(self.images[image_id])
        return split

    def write_index(self):
        rows = [
            {
                "image_id": image_id,
                "split": self.split(image_id),
                "file_name": name_of(image_id),
                "width": 48,
                "height": 40,
                "num_bytes": len(data),
                "source_xxh3": xxhash.xxh3_64_intdigest(data),
            }
            for image_id, data in sorted(self.images.items())
        ]
        path = self.root / "data" / "index" / "images.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, SCHEMAS["images"]), path)

    def run(self, write=True):
        """Run the stage and return its report."""
        if write:
            self.write()
        with contextlib.chdir(self.root):
            extract(Params.read(Path("params.yaml")))
        return self.report()

    def report(self):
        return json.loads((self.root / "reports" / "extract.json").read_text())

    @property
    def features(self):
        return self.root / "data" / "features"

    @property
    def finished(self):
        return self.root / ".work" / "shards"

    def store_bytes(self):
        """Name to content of every file of the store, hidden ones too."""
        return {path.name: path.read_bytes() for path in self.features.iterdir()}


@pytest.fixture(scope="session")
def image_set():
    """Ids of some 30 images."""
    return sorted(random.Random(0).sample(range(1, 10**6), 30))


@pytest.fixture
def make_workspace(tmp_path, image_set):
    def make(name="workspace", image_ids=None, **changes):
        made = Workspace(tmp_path / name, image_set if image_ids is None else image_ids)
        for key, value in changes.items():
            setattr(made, key, getattr(made, key) | value if isinstance(value, dict) else value)
        return made

    return make


@pytest.fixture
def workspace(make_workspace):
    return make_workspace()


@pytest.fixture(scope="session")
def wanted(tmp_path_factory, image_set):
    """The files of the store of `workspace`, built in one go."""
    built = Workspace(tmp_path_factory.mktemp("wanted") / "workspace", image_set)
    built.run()
    return built.store_bytes()
