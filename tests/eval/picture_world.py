"""A workspace with pictures, their features from a tiny vision tower, and runs of both stages."""

import contextlib
import json
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline.extract import extract
from pipeline.indexing.tables import SCHEMAS
from tests.conftest import PATCHES, WIDTH, Workspace, sign_weights
from tests.eval.conftest import World
from tests.pipeline.conftest import draw_jpeg

TOWER = {
    "embed_dim": WIDTH,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "layers": 3,
        "width": WIDTH,
        "head_width": 4,
        "patch_size": 16,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
ENCODER = {
    "model": "tiny.json",
    "pretrained": "random",
    "layer": -2,
    "precision": "fp32",
    "batch_size": 3,
    "device": "cpu",
}
EXTRACT = {"workers": 0, "engine": "local", "shard_rows": 4, "max_failure_rate": 0.0}
LIMITS = {"caption_tokens": 14, "answer_tokens": 16, "caption_question": "What is in the box"}
VISUAL_GAIN = 8
"""Factor on random weights, so that answers depend on the picture."""
SPACE = "\u0120"
"""A space in a byte-level vocabulary."""
TRAIN, VAL = range(1, 4), range(4, 9)


class PictureWorld(World):
    """Images 1-3 are in a folder (train), 4-8 in a zip (val)."""

    def params(self, *, encoder=(), **sections):
        encoder = {**ENCODER, **dict(encoder)}
        return super().params(encoder=encoder, extract=EXTRACT, evaluate=LIMITS, **sections)

    def write(self):
        """Write pictures, index, features and both runs into the working directory."""
        Path("tiny.json").write_text(json.dumps(TOWER))
        Path("data/raw/train").mkdir(parents=True)
        for image_id in TRAIN:
            Path(f"data/raw/train/{image_id}.jpg").write_bytes(draw_jpeg(image_id))
        with zipfile.ZipFile("data/raw/val.zip", "w") as archive:
            for image_id in VAL:
                archive.writestr(f"val/{image_id}.jpg", draw_jpeg(image_id))
        self.workspace.write_index(
            [(i, "train", "a cat") for i in TRAIN], [(1, "train", [("where", "in the box")])]
        )
        rows = [
            {
                "image_id": image_id,
                "split": split,
                "file_name": f"{image_id}.jpg",
                "width": 48,
                "height": 40,
                "num_bytes": len(draw_jpeg(image_id)),
                "source_xxh3": xxhash.xxh3_64_intdigest(draw_jpeg(image_id)),
            }
            for split, image_ids in (("train", TRAIN), ("val", VAL))
            for image_id in image_ids
        ]
        table = pa.Table.from_pylist(rows, SCHEMAS["images"])
        pq.write_table(table, "data/index/images.parquet")
        extract(self.params())
        assert (self.store.spec.patches, self.store.spec.width) == (PATCHES, WIDTH)
        self.write_run("pretrain", 1)
        self.write_run("finetune", 2)


def make_picture_world(root, phi_dir):
    """Make a world in an empty folder; its model generates words that depend on the picture."""
    talking_phi(phi_dir, root / "phi")
    world = PictureWorld(Workspace(root, root / "phi"))
    with contextlib.chdir(root):
        world.write()
        for path in Path("runs").glob("*/projector.safetensors"):
            change_tensor(path, "layers.2.weight", lambda weight: weight * VISUAL_GAIN)
            sign_weights(path.parent)
    return world


def talking_phi(phi_dir, folder):
    """Copy the checkpoint, with a bias towards tokens that begin with a space."""
    shutil.copytree(phi_dir, folder)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    words = [token_id for token, token_id in vocabulary.items() if token[0] == SPACE != token]

    def prefer(bias):
        bias = bias * 0
        bias[words] = 20
        return bias

    weights = folder / "model.safetensors"
    change_tensor(weights, "lm_head.bias", prefer)
    change_tensor(weights, "model.final_layernorm.bias", lambda bias: bias * 0)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.dense.weight"
        change_tensor(weights, name, lambda weight: weight * VISUAL_GAIN)


def change_tensor(path, name, change):
    """Change one tensor of a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name])}, path, metadata)
