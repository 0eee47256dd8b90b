"""Trains a projector on captions; the language model is frozen: stage 1, and its control."""

import torch

from cache import FeatureStore
from train.data.examples import (
    held_out_images,
    read_caption_examples,
    read_conversation_examples,
    with_features,
)
from train.data.other_images import learned_features
from train.loop.loop import train
from train.loop.setup import TrainingSetup
from train.loop.tracking import Tracker
from train.model.blocks import set_up_blocks
from train.model.captioner import CaptionModel
from train.model.fingerprint import language_model_fingerprint
from train.model.language_model import load_language_model
from train.model.preflight import check_language_model
from train.model.projector import check_pool, seeded_projector
from train.run import (
    RunDirectory,
    control_of,
    pick_device,
    provenance,
    run_identity,
    stage_lock,
)
from train.settings import (
    CheckpointSettings,
    LlmSettings,
    PretrainSettings,
    ProjectorSettings,
    TrackingSettings,
)
from train.stages.untrained import check_any_texts, publish_untrained
from workspace.paths import FEATURES, REPORTS
from workspace.settings import Params


def train_on_captions(params: Params, name: str = "pretrain") -> None:
    """Train a projector on the captions of the training images, and publish the run.

    Without captions of split train, the run is a fresh projector for stage 2, and without
    conversations too it is refused.

    Args:
        params: Settings.
        name: Of the run: the stage's, or `CONTROL`, whose images have features of other images.
    """
    settings = params.section("pretrain", PretrainSettings)
    llm = params.section("llm", LlmSettings)
    projector_settings = params.section("projector", ProjectorSettings)
    kind, pool = projector_settings.kind, projector_settings.pool
    saving = params.section("checkpoints", CheckpointSettings)
    tracking = params.section("tracking", TrackingSettings)
    seed, report = params.seed(), REPORTS / f"{name}.json"
    store = FeatureStore(FEATURES)
    check_pool(pool, store.spec.patches, "projector.pool")
    captions = read_caption_examples("train")
    if not len(captions):
        check_any_texts(name, *map(read_conversation_examples, ("train", "holdout")))
    device = pick_device()
    checked = check_language_model(llm)
    projector = seeded_projector(kind, store.spec.width, checked.width, seed, pool).to(device)
    image_tokens = projector.num_embeddings(store.spec.patches)
    checked.check_positions(image_tokens, settings.max_text_tokens)
    prompts = checked.prompt_format
    origin = {"language_model": checked.identity}
    if not len(captions):
        publish_untrained(name, params, store, projector, report, **origin)
        return
    # Held-out images must stay new to the model, in their captions too.
    captions = captions.without(held_out_images())
    language_model = load_language_model(llm, device)
    set_up_blocks(language_model, projector, settings)
    examples = with_features(captions, store, "captions of split train")
    validation = with_features(read_caption_examples("val"), store, "captions of split val")
    setup = TrainingSetup(
        model=CaptionModel(projector, language_model),
        prompt_format=prompts,
        store=learned_features(name, store, examples, validation, seed),
        train=examples,
        validation=validation,
        batch_size=settings.batch_captions,
        optimizer=torch.optim.AdamW(
            projector.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        ),
        seed=seed,
        settings=settings,
    )
    identity = run_identity(
        params,
        ("llm", "projector", "pretrain"),
        store,
        language_model=language_model_fingerprint(language_model, prompts.tokenizer),
        **prompts.identity(),
        **control_of(name, "pretrain"),
    )
    with stage_lock(name):
        made_from = provenance(store, device, **origin, **control_of(name, "pretrain"))
        run = RunDirectory(name, params, identity, made_from)
        with Tracker(tracking, run, params.values) as tracker:
            metrics = train(setup, saving, run, tracker)
        if run.is_main:
            projector.save(run.files / "projector.safetensors")
            run.publish(metrics, report)
