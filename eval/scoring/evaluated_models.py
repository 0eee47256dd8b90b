"""Loads the models that an evaluation scores: stage 1 alone and the fine-tuned model."""

import contextlib
import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from peft import PeftModel

from cache import FeatureStore
from cache.files.atomic import canonical_json, sha256_of
from cache.store_index import INDEX_FILE
from eval.runs import ADAPTER, PROJECTOR, FinishedRun
from train.data.prompts import PromptFormat
from train.model.captioner import CaptionModel
from train.model.fingerprint import language_model_fingerprint
from train.model.language_model import load_language_model, load_lora
from train.model.projector import seeded_projector
from train.run import pick_device
from workspace.paths import FEATURES


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, the parts of its controls, and the source of its input."""

    name: str
    """The stage that made it."""
    model: CaptionModel
    untrained: CaptionModel
    """The same language model with a projector of random weights."""
    prompt_format: PromptFormat
    store: FeatureStore
    seed: int
    identity: str
    """Hash of weights, features and prompt format, for the cache of generated texts."""


@dataclass(frozen=True)
class EvaluatedModels:
    """The models of both stages, which share one language model; None of a stage without scores."""

    stage_1: EvaluatedModel | None
    """Valid while the adapter is disabled."""
    both_stages: EvaluatedModel | None
    adapter: PeftModel | None

    def without_adapter(self) -> AbstractContextManager[None]:
        """Disable the adapter, if there is one, within a `with` block."""
        return self.adapter.disable_adapter() if self.adapter else contextlib.nullcontext()


def load_models(runs: Mapping[str, FinishedRun], store: FeatureStore, seed: int) -> EvaluatedModels:
    """Load the models of all runs, so that damage in any is found before texts are generated.

    Args:
        runs: Stage to run, as `eval.runs.open_stages` returns them.
        store: Features, with which the runs have been checked.
        seed: Seed of the untrained projectors and of the noise.

    Raises:
        SettingsError: The language model cannot be loaded.
        StageError: The adapter is missing, damaged, or does not fit the language model.
    """
    pretrain, finetune = runs.get("pretrain"), runs.get("finetune")
    # All share language model and prompt format.
    any_run = next(iter(runs.values()))
    language_model = load_language_model(any_run.llm, pick_device())
    shared = {
        # Before LoRA is added, which renames the layers.
        "language_model": language_model_fingerprint(language_model, any_run.tokenizer),
        "features": sha256_of(FEATURES / INDEX_FILE),
        "seed": seed,
        "end_ids": any_run.prompt_format.end_ids,
        **any_run.prompt_format.identity(),
    }
    adapter = None
    if finetune and finetune.is_trained:
        adapter = load_lora(language_model, finetune.folder / ADAPTER)

    def evaluated(run: FinishedRun) -> EvaluatedModel:
        projector = run.projector
        untrained = seeded_projector(
            projector.kind, projector.vision_width, projector.text_width, seed, projector.pool
        )
        adapter_file = run.folder / ADAPTER / "adapter_model.safetensors"
        own = {
            "projector": sha256_of(run.folder / PROJECTOR),
            "adapter": sha256_of(adapter_file) if run is finetune else None,
        }
        return EvaluatedModel(
            name=run.folder.name,
            model=CaptionModel(projector.to(language_model.device), language_model),
            untrained=CaptionModel(untrained.to(language_model.device), language_model),
            prompt_format=run.prompt_format,
            store=store,
            seed=seed,
            identity=hashlib.sha256(canonical_json(shared | own)).hexdigest(),
        )

    stage_1, both_stages = (
        evaluated(run) if run and run.is_trained else None for run in (pretrain, finetune)
    )
    return EvaluatedModels(stage_1, both_stages, adapter)
