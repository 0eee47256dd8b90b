"""Stage pretrain: the projector learns to caption images, the language model is frozen."""

import torch

from cache import FeatureStore
from train.data.examples import (
    held_out_images,
    read_caption_examples,
    read_conversation_examples,
    with_features,
)
from train.loop.loop import train
from train.loop.setup import TrainingSetup
from train.loop.tracking import Tracker
from train.model.blocks import set_up_blocks
from train.model.captioner import CaptionModel
from train.model.fingerprint import language_model_fingerprint
from train.model.language_model import load_language_model
from train.model.preflight import check_language_model
from train.model.projector import check_pool, seeded_projector
from train.run import RunDirectory, pick_device, provenance, run_identity, stage_lock
from train.settings import (
    CheckpointSettings,
    LlmSettings,
    PretrainSettings,
    ProjectorSettings,
    TrackingSettings,
)
from train.untrained import check_any_texts, publish_untrained
from workspace.paths import FEATURES, REPORTS
from workspace.settings import Params
from workspace.stage import run_stage

REPORT = REPORTS / "pretrain.json"


def pretrain(params: Params) -> None:
    """Train a projector on the captions of the training images, and publish the run.

    Without captions of split train, the run is a fresh projector for stage 2, and without
    conversations too it is refused.
    """
    settings = params.section("pretrain", PretrainSettings)
    llm = params.section("llm", LlmSettings)
    projector_settings = params.section("projector", ProjectorSettings)
    kind, pool = projector_settings.kind, projector_settings.pool
    saving = params.section("checkpoints", CheckpointSettings)
    tracking = params.section("tracking", TrackingSettings)
    seed = params.seed()
    store = FeatureStore(FEATURES)
    check_pool(pool, store.spec.patches, "projector.pool")
    captions = read_caption_examples("train")
    if not len(captions):
        check_any_texts("pretrain", *map(read_conversation_examples, ("train", "holdout")))
    device = pick_device()
    checked = check_language_model(llm)
    projector = seeded_projector(kind, store.spec.width, checked.width, seed, pool).to(device)
    image_tokens = projector.num_embeddings(store.spec.patches)
    checked.check_positions(image_tokens, settings.max_text_tokens)
    prompts = checked.prompt_format
    origin = {"language_model": checked.identity}
    if not len(captions):
        publish_untrained("pretrain", params, store, projector, REPORT, **origin)
        return
    # Held-out images must stay new to the model, in their captions too.
    examples = captions.without(held_out_images())
    language_model = load_language_model(llm, device)
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
        language_model=language_model_fingerprint(language_model, prompts.tokenizer),
        **prompts.identity(),
    )
    with stage_lock("pretrain"):
        made_from = provenance(store, device, **origin)
        run = RunDirectory("pretrain", params, identity, made_from)
        with Tracker(tracking, run, params.values) as tracker:
            metrics = train(setup, saving, run, tracker)
        if run.is_main:
            projector.save(run.files / "projector.safetensors")
            run.publish(metrics, REPORT)


if __name__ == "__main__":
    run_stage(pretrain, __doc__)
