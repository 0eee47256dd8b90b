"""Fixtures of the evaluation tests: a workspace with two finished runs, pictures, settings."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from PIL import Image
from transformers import dynamic_module_utils

from cache import FeatureStore
from eval.settings import EvaluateSettings
from train.data.prompt_formats import prompt_format
from train.model.fingerprint import language_model_identity
from train.model.language_model import add_lora, load_language_model, load_tokenizer
from train.model.model_files import read_config
from train.model.projector import seeded_projector
from train.run import RunDirectory, provenance
from train.settings import LlmSettings, LoraSettings
from workspace.settings import Params

LIMITS = {
    "caption_images": 99,
    "questions": 99,
    "pope_images": 99,
    "caption_question": "What is in the box",
    "caption_tokens": 6,
    "answer_tokens": 5,
    "max_text_tokens": 64,
    "batch_size": 3,
    "exclude_contaminated": True,
}
DATA = {
    "source": "local",
    "train": {"images": "data/raw/train", "captions": "unused"},
    "val": {"images": "data/raw/val.zip", "captions": "unused"},
    "instruct": "unused",
    "instruct_holdout": 0.5,
    "max_reject_rate": 0.0,
}
HISTORY = [
    {"step": 1, "loss": 3.5, "learning_rate": 1e-3},
    {"step": 2, "loss": 2.5, "learning_rate": 0.0, "validation_loss": 2.75},
]
LEARNED_FROM = {"images": 3, "texts": 5}
"""In the metrics of every run."""

IMAGES = pa.schema(
    [
        ("image_id", pa.int64()),
        ("split", pa.string()),
        ("file_name", pa.string()),
        ("source_xxh3", pa.uint64()),
    ]
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def copied_code(tmp_path_factory):
    """A folder of its own for the code of exports, which transformers copies to the user's cache.

    It copies the code of a folder before it runs it.
    """
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture
def limits():
    def make(**changes):
        return EvaluateSettings(**{**LIMITS, **changes})

    return make


def jpeg(image_id):
    data = io.BytesIO()
    # The comment, because neighbouring reds are one colour in a JPEG.
    comment = str(image_id).encode()
    Image.new("RGB", (30, 20), (image_id, 0, 0)).save(data, "JPEG", comment=comment)
    return data.getvalue()


@dataclass
class World:
    """A workspace with the outputs of all stages before evaluate."""

    workspace: object

    def params(self, *, evaluate=(), data=(), **sections) -> Params:
        return self.workspace.params(
            evaluate={**LIMITS, **dict(evaluate)}, data={**DATA, **dict(data)}, **sections
        )

    def write_images(self, splits):
        """Write the index's table of images, and the pictures: a folder and a zip."""
        rows = [
            {
                "image_id": i,
                "split": split,
                "file_name": f"{i}.jpg",
                "source_xxh3": xxhash.xxh3_64_intdigest(jpeg(i)),
            }
            for i, split in splits.items()
        ]
        pq.write_table(pa.Table.from_pylist(rows, IMAGES), "data/index/images.parquet")
        Path("data/raw/train").mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile("data/raw/val.zip", "w") as archive:
            for i, split in splits.items():
                if split == "val":
                    archive.writestr(f"val/{i}.jpg", jpeg(i))
                else:
                    Path(f"data/raw/train/{i}.jpg").write_bytes(jpeg(i))

    def write_run(self, stage, seed, pool=1, origin=(), **llm):
        """Publish a run of random weights as the stage would; of stage 2, LoRA that matters."""
        params = self.params(llm=llm)
        beside = params.section("llm", LlmSettings)
        tokenizer = load_tokenizer(beside)
        prompts = prompt_format(beside, tokenizer, read_config(beside.model))
        identity = language_model_identity(beside, tokenizer) | prompts.identity()
        made_from = provenance(
            self.store, torch.device("cpu"), language_model=identity, **dict(origin)
        )
        run = RunDirectory(stage, params, {"seed": seed}, made_from)
        run.write_history(HISTORY)
        projector = seeded_projector("mlp", 8, 64, seed, pool)
        projector.save(run.files / "projector.safetensors")
        if stage != "pretrain":
            settings = params.section("llm", LlmSettings)
            model = load_language_model(settings, torch.device("cpu"))
            adapter = add_lora(model, LoraSettings(r=4, alpha=8, dropout=0.5), seed)
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in adapter.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.1, generator=generator)
            adapter.save_pretrained(run.files / "adapter", save_embedding_layers=False)
        run.publish({"loss": 2.5} | LEARNED_FROM, Path(f".work/{stage}.json"))

    @property
    def store(self):
        return FeatureStore("data/features")


@pytest.fixture
def world(workspace):
    """Both runs, and the pictures of all images: 112-115 in a zip (val), the rest in a folder."""
    made = World(workspace)
    made.write_images({i: "val" if 112 <= i <= 115 else "train" for i in range(100, 140)})
    made.write_run("pretrain", 1)
    made.write_run("finetune", 2)
    made.params()
    return made
