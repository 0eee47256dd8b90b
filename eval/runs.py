"""Both runs that are evaluated: what is known of them, and their models."""

import csv
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from cache import FeatureStore
from cache.files.atomic import canonical_json, check_ordinary, sha256_of
from cache.files.foreign import reading_foreign_file
from cache.store_index import INDEX_FILE
from eval.scoring.conditions import Asked
from train.model.captioner import CaptionModel
from train.model.fingerprint import language_model_fingerprint, language_model_identity
from train.model.language_model import load_language_model, load_lora
from train.model.projector import load_projector, read_projector, seeded_projector
from train.provenance import START_PROJECTOR, provenance_of
from train.run import FINISHED, pick_device
from train.settings import LlmSettings
from workspace.errors import StageError
from workspace.paths import FEATURES, RUNS
from workspace.settings import Params

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
        "features": sha256_of(FEATURES / INDEX_FILE),
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

    def refuse(detail: str) -> StageError:
        return StageError(f"{path}: no history ({detail}). Run the {stage} stage.")

    check_ordinary(path, refuse)
    with (
        reading_foreign_file(refuse, path),
        path.open(newline="", encoding="utf-8") as file,
    ):
        rows = csv.DictReader(file)
        if "step" not in (rows.fieldnames or ()):
            raise ValueError("it has no column step")
        return [{k: float(v) for k, v in row.items() if v} for row in rows]


def read_settings() -> dict[str, dict[str, Any]]:
    """Return the settings of each stage's run, as they were when it began.

    Raises:
        SettingsError: A file is missing or damaged.
    """
    return {stage: Params.read(RUNS / stage / "params.yaml").values for stage in STAGES}


def finish_times(provenances: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return when each stage's run was finished, as ISO 8601; runs of earlier versions say nothing.

    Args:
        provenances: Stage to the provenance of its run. What is no time there is left out.
    """
    times = {stage: values.get(FINISHED) for stage, values in provenances.items()}
    return {stage: time for stage, time in times.items() if _is_time(time)}


def _is_time(value: object) -> TypeGuard[str]:
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


def read_provenances(
    store: FeatureStore, llm: LlmSettings, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    """Return the provenance of both runs, which belong to features and model, and together.

    Raises:
        StageError: No provenance, or a run of another language model, or of another stage 1.
        SpecMismatchError: A run learned from other features.
    """
    beside = language_model_identity(llm, tokenizer)
    provenances = {stage: provenance_of(stage, store, beside) for stage in STAGES}
    read_projector(projector_of("pretrain"))
    started_from = provenances["finetune"].get(START_PROJECTOR)
    found = sha256_of(projector_of("pretrain"))
    if started_from not in (None, found):
        # Its scores would be shown as those from which stage 2 went on.
        raise StageError(
            f"{projector_of('pretrain')}: of sha256 {found[:12]}, but {RUNS / 'finetune'} started "
            f"from a projector of {str(started_from)[:12]}. Run the finetune stage again, or bring "
            f"the runs/pretrain back that it started from."
        )
    return provenances
