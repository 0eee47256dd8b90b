"""Trains projector and LoRA on conversations: stage 2, and its control."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from cache import FeatureStore
from cache.files.atomic import sha256_of
from cache.files.foreign import writing_foreign_file
from cache.texts import first_few
from train.data.examples import read_conversation_examples, with_features
from train.data.other_images import learned_features
from train.loop.loop import train
from train.loop.setup import TrainingSetup
from train.loop.tracking import Tracker
from train.model.blocks import set_up_blocks
from train.model.captioner import CaptionModel
from train.model.fingerprint import language_model_fingerprint
from train.model.language_model import add_lora, load_language_model
from train.model.preflight import check_language_model
from train.model.projector import Projector, check_pool, load_projector
from train.provenance import START_PROJECTOR, changed_settings, changed_tables, provenance_of
from train.run import (
    UNTRAINED,
    RunDirectory,
    control_of,
    pick_device,
    provenance,
    run_identity,
    stage_lock,
)
from train.settings import CheckpointSettings, FinetuneSettings, LlmSettings, TrackingSettings
from train.stages.untrained import check_any_texts, publish_untrained
from workspace.paths import FEATURES, REPORTS, RUNS
from workspace.settings import Params

START = RUNS / "pretrain" / "projector.safetensors"
"""The projector from which stage 2 starts."""


def train_on_conversations(params: Params, name: str = "finetune") -> None:
    """Train projector and LoRA on the conversations of the training images, publish the run.

    Without conversations, the run is stage 1's projector, without an adapter.

    Args:
        params: Settings.
        name: Of the run: the stage's, or `CONTROL`, whose images have features of other images.
    """
    settings = params.section("finetune", FinetuneSettings)
    llm = params.section("llm", LlmSettings)
    saving = params.section("checkpoints", CheckpointSettings)
    tracking = params.section("tracking", TrackingSettings)
    seed, report = params.seed(), REPORTS / f"{name}.json"
    store = FeatureStore(FEATURES)
    device = pick_device()
    checked = check_language_model(llm)
    prompts = checked.prompt_format
    projector = load_projector(START, store.spec.width, checked.width).to(device)
    check_pool(projector.pool, store.spec.patches, str(START))
    image_tokens = projector.num_embeddings(store.spec.patches)
    checked.check_positions(image_tokens, settings.max_text_tokens)
    stage_1 = provenance_of("pretrain", store, checked.identity)
    _warn_of_changes(name, stage_1, params)
    examples = read_conversation_examples("train")
    held_out = read_conversation_examples("holdout")
    start_sha256 = sha256_of(START)
    origin = {"language_model": checked.identity, START_PROJECTOR: start_sha256}
    if not len(examples) and not len(held_out):
        if UNTRAINED in stage_1:
            check_any_texts(name, examples, held_out)
        publish_untrained(name, params, store, projector, report, **origin)
        return
    language_model = load_language_model(llm, device)
    set_up_blocks(language_model, projector, settings)
    identity = run_identity(
        params,
        ("llm", "finetune"),
        store,
        language_model=language_model_fingerprint(language_model, prompts.tokenizer),
        start_projector=start_sha256,
        **prompts.identity(),
        **control_of(name, "finetune"),
    )
    adapter = add_lora(language_model, settings.lora, seed)
    examples = with_features(examples, store, "conversations of split train")
    held_out = with_features(held_out, store, "conversations of split holdout")
    setup = TrainingSetup(
        model=CaptionModel(projector, language_model),
        prompt_format=prompts,
        store=learned_features(name, store, examples, held_out, seed),
        train=examples,
        validation=held_out,
        batch_size=settings.batch_examples,
        optimizer=make_optimizer(projector, adapter, settings),
        seed=seed,
        settings=settings,
    )
    with stage_lock(name):
        made_from = provenance(store, device, **origin, **control_of(name, "finetune"))
        run = RunDirectory(name, params, identity, made_from)
        with Tracker(tracking, run, params.values) as tracker:
            metrics = train(setup, saving, run, tracker)
        if run.is_main:
            projector.save(run.files / "projector.safetensors")
            with writing_foreign_file(run.files / "adapter"):
                # By default, PEFT asks the hub whether embeddings were added.
                adapter.save_pretrained(run.files / "adapter", save_embedding_layers=False)
            run.publish(metrics, report)


def _warn_of_changes(name: str, stage_1: Mapping[str, Any], params: Params) -> None:
    """Print the texts and settings that changed since stage 1 was trained.

    Args:
        name: Of the run that starts.
        stage_1: Its provenance.
        params: The current settings.
    """
    if changed := changed_tables(stage_1):
        print(
            f"{name}: {' and '.join(changed)} changed after the pretrain stage: its projector "
            f"may have been trained on images that are held out now",
            file=sys.stderr,
        )
    if differing := changed_settings("pretrain", params, ("seed", "projector", "pretrain")):
        print(
            f"{name}: {START.parent} was trained with other settings: "
            f"{first_few(differing)}. Run the pretrain stage to train it with those of now.",
            file=sys.stderr,
        )


def make_optimizer(
    projector: Projector, adapter: torch.nn.Module, settings: FinetuneSettings
) -> torch.optim.Optimizer:
    """Return AdamW with one learning rate for LoRA and another for the projector."""
    lora = [p for p in adapter.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": lora, "lr": settings.learning_rate},
            {"params": list(projector.parameters()), "lr": settings.projector_learning_rate},
        ],
        weight_decay=settings.weight_decay,
        fused=True,
    )
