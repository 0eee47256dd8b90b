"""Both runs that are evaluated: what is known of them, and their models."""

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from cache import FeatureStore
from cache.errors import SpecMismatchError, StageError
from cache.files import canonical_json, sha256_of
from cache.foreign import reading_foreign_file
from cache.table import INDEX
from eval.controls import Asked
from train.data import FEATURES
from train.fingerprint import language_model_fingerprint
from train.language_model import load_language_model, load_lora
from train.model import CaptionModel
from train.projector import load_projector, seeded_projector
from train.run import RUNS, pick_device
from train.settings import LlmSettings

STAGES = ("pretrain", "finetune")
ADAPTER = RUNS / "finetune" / "adapter"


@dataclass(frozen=True)
class Models:
    """Stage 1 alone and the fine-tuned model, around one language model."""

    stage_1: Asked
    """To be asked while the adapter is turned off."""
    both: Asked
    adapter: PeftModel


def load_models(
    llm: LlmSettings, tokenizer: PreTrainedTokenizerBase, store: FeatureStore, seed: int
) -> Models:
    """Load all of both runs, so that a damaged one is found before either is asked.

    Raises:
        SettingsError: No such language model.
        StageError: A file of a run is missing, damaged, or does not fit the others.
    """
    language_model = load_language_model(llm, pick_device())
    width, device = language_model.config.hidden_size, language_model.device
    decides = {
        "language_model": language_model_fingerprint(language_model, tokenizer),
        "features": sha256_of(FEATURES / INDEX),
        "seed": seed,
    }
    projectors = {
        stage: load_projector(projector_of(stage), store.spec.width, width) for stage in STAGES
    }
    adapter = load_lora(language_model, ADAPTER)
    adapters = {"finetune": sha256_of(ADAPTER / "adapter_model.safetensors")}

    def asked(stage: str) -> Asked:
        projector = projectors[stage]
        untrained = seeded_projector(projector.kind, store.spec.width, width, seed)
        own = {"projector": sha256_of(projector_of(stage)), "adapter": adapters.get(stage)}
        return Asked(
            name=stage,
            model=CaptionModel(projector.to(device), language_model),
            untrained=CaptionModel(untrained.to(device), language_model),
            tokenizer=tokenizer,
            store=store,
            seed=seed,
            identity=hashlib.sha256(canonical_json(decides | own)).hexdigest(),
        )

    return Models(asked("pretrain"), asked("finetune"), adapter)


def projector_of(stage: str) -> Path:
    """Return the file of a stage's projector, by whose hash a run is recognised."""
    return RUNS / stage / "projector.safetensors"


def read_history(stage: str) -> list[dict[str, float]]:
    """Return the rows of a run's history.csv; what a step does not have is left out.

    Raises:
        StageError: No such file, or not a table of numbers.
    """
    path = RUNS / stage / "history.csv"
    with (
        reading_foreign_file(lambda why: _nothing_in(path, "history", why, stage), path),
        path.open(newline="", encoding="utf-8") as file,
    ):
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def read_provenance(stage: str, store: FeatureStore) -> dict[str, Any]:
    """Return the provenance of a run that learned from the features of a store.

    Raises:
        StageError: No such file, or not a JSON object.
        SpecMismatchError: The run learned from other features.
    """
    path = RUNS / stage / "provenance.json"
    with reading_foreign_file(lambda why: _nothing_in(path, "provenance", why, stage), path):
        values = dict(json.loads(path.read_text(encoding="utf-8")))
        learned_from = str(values["features_fingerprint"])
    if learned_from != store.fingerprint:
        raise SpecMismatchError(
            f"{path}: the run learned from features of fingerprint {learned_from[:12]}, "
            f"{store.root} has those of {store.fingerprint[:12]}. Run the {stage} stage again, or "
            f"bring the features back that it learned from."
        )
    return values


def _nothing_in(path: Path, what: str, why: str, stage: str) -> StageError:
    return StageError(f"{path}: no {what} ({why}). Run the {stage} stage.")
