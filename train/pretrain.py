"""Stage pretrain: the projector learns to caption images, the language model is frozen."""

import torch

from cache import FeatureStore
from train.data.examples import held_out_images, read_caption_examples, with_features
from train.data.prompt_formats import prompt_format
from train.loop.loop import train
from train.loop.setup import TrainingSetup
from train.loop.tracking import Tracker
from train.model.blocks import set_up_blocks
from train.model.captioner import CaptionModel
from train.model.fingerprint import language_model_fingerprint, language_model_identity
from train.model.language_model import load_language_model, load_tokenizer
from train.model.model_files import read_config
from train.model.preflight import check_vocabulary
from train.model.projector import check_pool, seeded_projector
from train.model.supported import check_positions, check_supported
from train.run import RunDirectory, pick_device, provenance, run_identity, stage_lock
from train.settings import (
    CheckpointSettings,
    LlmSettings,
    PretrainSettings,
    ProjectorSettings,
    TrackingSettings,
)
from workspace.paths import FEATURES, REPORTS
from workspace.settings import Params
from workspace.stage import run_stage

REPORT = REPORTS / "pretrain.json"


def pretrain(params: Params) -> None:
    """Train a projector on the captions of the training images, and publish the run."""
    settings = params.section("pretrain", PretrainSettings)
    llm = params.section("llm", LlmSettings)
    projector_settings = params.section("projector", ProjectorSettings)
    kind, pool = projector_settings.kind, projector_settings.pool
    saving = params.section("checkpoints", CheckpointSettings)
    tracking = params.section("tracking", TrackingSettings)
    seed = params.seed()
    store = FeatureStore(FEATURES)
    check_pool(pool, store.spec.patches, "projector.pool")
    # Held-out images must stay new to the model, in their captions too.
    examples = read_caption_examples("train").without(held_out_images())
    device = pick_device()
    check_supported(llm)
    tokenizer = load_tokenizer(llm)
    check_vocabulary(tokenizer, llm)
    prompts = prompt_format(llm, tokenizer, read_config(llm.model))
    shared = len(prompts.lead) + store.spec.patches // pool**2
    check_positions(llm, shared + settings.max_text_tokens)
    language_model_id = language_model_identity(llm, tokenizer) | prompts.identity()
    language_model = load_language_model(llm, device)
    width = language_model.config.hidden_size
    projector = seeded_projector(kind, store.spec.width, width, seed, pool).to(device)
    set_up_blocks(language_model, projector, settings)
    setup = TrainingSetup(
        model=CaptionModel(projector, language_model),
        prompt_format=prompts,
        store=store,
        train=with_features(examples, store, "captions of split train"),
        validation=with_features(read_caption_examples("val"), store, "captions of split val"),
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
        language_model=language_model_fingerprint(language_model, tokenizer),
        **prompts.identity(),
    )
    with stage_lock("pretrain"):
        origin = provenance(store, device, language_model=language_model_id)
        run = RunDirectory("pretrain", params, identity, origin)
        with Tracker(tracking, run, params.values) as tracker:
            metrics = train(setup, saving, run, tracker)
        if run.is_main:
            projector.save(run.files / "projector.safetensors")
            run.publish(metrics, REPORT)


if __name__ == "__main__":
    run_stage(pretrain, __doc__)
