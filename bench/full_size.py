"""Runs both training stages with a language model of Phi-2's size, and records what they take.

    python -m bench.full_size [MODEL]

MODEL is a directory in the layout of microsoft/phi-2; one with random weights is made there, or in
a temporary folder, when it is missing (5.6 GB). With --quick it is a small one, made in a
temporary folder, whatever MODEL is. Settings are those of configs/coco.yaml but for
the number and size of the steps; every stage is a fresh process, as a user starts it.

`peak_gib` and `peak_anonymous_gib` are those of `bench.child`.
"""

import argparse
import csv
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from bench.child import ROOT, Child, call_measured, run_measured
from bench.command import benchmark_parser, run_benchmark
from bench.make_phi2 import PHI2, SHARD_BYTES, write_phi
from bench.stores import make_random_store
from pipeline.indexing.tables import SCHEMAS
from train.model.fingerprint import language_model_fingerprint
from train.model.language_model import load_language_model, load_tokenizer
from train.run import pick_device
from train.settings import LlmSettings

STEPS = 3
"""Of a stage; there is a validation after the second, and one step after that."""

SMALL = PHI2 | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
}
"""The language model of `--quick`."""

BATCH = {"pretrain": ("batch_captions", 10), "finetune": ("batch_examples", 4)}

CAPTIONS = (
    "A man in a red jacket rides his skis down the side of a snowy mountain.",
    "Two zebras are standing next to each other in a grassy field.",
    "A kitchen with a stove, a refrigerator and a microwave.",
    "There is a train coming down the tracks near the station.",
    "A group of young people playing a game of frisbee.",
)
"""Of every image: COCO has five, of 10.5 words on average."""

TURNS = (
    ("What is the man in the picture doing?", CAPTIONS[0]),
    ("How many animals are there in the field, and what are they doing?", " ".join(CAPTIONS[1:3])),
    ("What can be said about the station?", " ".join(CAPTIONS[3:] + CAPTIONS[:1])),
)
"""Of every image: LLaVA's conversations have about as many words."""


def load(model: str) -> dict[str, float]:
    """Load the language model as training does; return the seconds of it and of its fingerprint."""
    settings = LlmSettings(model=model, quantize="nf4", dtype="bf16")
    started = time.perf_counter()
    language_model = load_language_model(settings, pick_device())
    loaded = time.perf_counter()
    language_model_fingerprint(language_model, load_tokenizer(settings))
    return {
        "seconds": loaded - started,
        "fingerprint_seconds": time.perf_counter() - loaded,
    }


def write_index(folder: Path, num_train: int) -> None:
    """Write the tables of so many images to train, the next one for val, the one after held out."""
    turns = [
        {"role": role, "text": text}
        for pair in TURNS
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    splits = ["train"] * num_train + ["val", "holdout"]
    captions = [
        {"caption_id": 5 * image + n, "image_id": image, "split": split, "caption": caption}
        for image, split in enumerate(splits)
        for n, caption in enumerate(CAPTIONS)
        if split != "holdout"
    ]
    conversations = [
        {"conversation_id": str(image), "image_id": image, "split": split, "turns": turns}
        for image, split in enumerate(splits)
        if split != "val"
    ]
    (folder / "data/index").mkdir(parents=True, exist_ok=True)
    for name, rows in (("captions", captions), ("conversations", conversations)):
        table = pa.Table.from_pylist(rows, SCHEMAS[name])
        pq.write_table(table, folder / f"data/index/{name}.parquet")


def run_stage(
    folder: Path, model: Path, stage: str, *, batch: int, steps: int
) -> tuple[Child, list[dict[str, float]]]:
    """Train some steps in a fresh process, on as many images as they need.

    Returns:
        What the process took, and the rows of its history.
    """
    key, _ = BATCH[stage]
    images = batch // len(CAPTIONS) if stage == "pretrain" else batch
    write_index(folder, steps * images)
    yaml = YAML(typ="safe")
    params = yaml.load(ROOT / "configs/coco.yaml")
    params["llm"]["model"] = str(model)
    params["tracking"]["wandb"] = "disabled"
    few = {key: batch, "log_every_steps": 1, "validate_every_steps": 2, "samples": 0}
    params[stage] |= few
    yaml.dump(params, folder / "params.yaml")
    child = run_measured(["-m", f"train.{stage}"], folder)
    child.check(stage)
    with (folder / "runs" / stage / "history.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    metrics = json.loads((folder / "runs" / stage / "metrics.json").read_text())
    # All images have the same texts, so all steps as many positions.
    positions = metrics["tokens_per_second"] * metrics["seconds"] / metrics["steps"]
    for row in rows:
        row["seconds"] = positions / row["tokens_per_second"]
    return child, rows


def measure_stage(folder: Path, model: Path, stage: str) -> dict[str, Any]:
    """Measure some steps of a stage."""
    batch = BATCH[stage][1]
    child, rows = run_stage(folder, model, stage, batch=batch, steps=STEPS)
    losses = [row[name] for row in rows for name in ("loss", "validation_loss") if name in row]
    return {
        BATCH[stage][0]: batch,
        "steps": len(rows),
        "seconds_per_step": round(statistics.median(row["seconds"] for row in rows), 2),
        "seconds_of_each": [round(row["seconds"], 2) for row in rows],
        "seconds": round(child.seconds, 1),
        "losses": [row["loss"] for row in rows],
        "all_losses_finite": all(map(math.isfinite, losses)),
        **child.memory(),
    }


def measure_model(folder: Path, model: Path) -> dict[str, Any]:
    """Run everything in an empty folder; never two of the large processes at once."""
    most = STEPS * BATCH["finetune"][1]
    (folder / "data").mkdir()
    make_random_store(folder / "made", most + 2).rename(folder / "data/features")
    result: dict[str, Any] = {"load": call_measured(load, model, folder=folder)}
    for stage in BATCH:
        result[stage] = measure_stage(folder, model, stage)
    return result


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return what the result file says."""
    with tempfile.TemporaryDirectory() as name:
        (folder := Path(name) / "work").mkdir()
        model = Path(name) / "phi-2"
        if arguments.quick:
            write_phi(model, SMALL, SHARD_BYTES, seed=0)
        else:
            model = (arguments.model or model).resolve()
            if not (model / "model.safetensors.index.json").is_file():
                write_phi(model, PHI2, SHARD_BYTES, seed=0)
        result = measure_model(folder, model)
    print(json.dumps(result, indent=2))
    return result


def main() -> None:
    """Measure and write the result file."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", nargs="?")
    run_benchmark(
        "full_size",
        measure,
        parser,
        minutes=8,
        quick_seconds=60,
        libraries=("torch", "transformers", "peft", "bitsandbytes"),
    )


if __name__ == "__main__":
    main()
