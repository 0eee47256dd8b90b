"""Stage pretrain: the projector learns to caption images, the language model is frozen."""

from pathlib import Path

import torch

from cache import FeatureStore
from cache.command import run_stage
from cache.files import write_json
from cache.settings import Params
from train.data import FEATURES, held_out_images, read_caption_examples, with_features
from train.language_model import load_language_model, load_tokenizer
from train.loop import Task
from train.loop import train as run_loop
from train.model import CaptionModel
from train.projector import seeded_projector
from train.run import RunDirectory, pick_device, provenance
from train.settings import LlmSettings, PretrainSettings, ProjectorSettings, TrackingSettings
from train.tracking import Tracker

REPORT = Path("reports/pretrain.json")


def pretrain(params: Params) -> None:
    """Train a projector on the captions of the training images and publish the run."""
    settings = params.section("pretrain", PretrainSettings)
    llm = params.section("llm", LlmSettings)
    kind = params.section("projector", ProjectorSettings).kind
    tracking = params.section("tracking", TrackingSettings)
    seed = params.seed()
    store = FeatureStore(FEATURES)
    # What is asked of these images later must be new to the model, their captions too.
    held_out = held_out_images()
    examples = [e for e in read_caption_examples("train") if e.image_id not in held_out]
    device = pick_device()
    language_model = load_language_model(llm, device)
    width = language_model.config.hidden_size
    projector = seeded_projector(kind, store.spec.width, width, seed).to(device)
    task = Task(
        model=CaptionModel(projector, language_model),
        tokenizer=load_tokenizer(llm),
        store=store,
        train=with_features(examples, store, "captions of split train"),
        validation=with_features(read_caption_examples("val"), store, "captions of split val"),
        batch_size=settings.batch_captions,
        optimizer=torch.optim.AdamW(
            projector.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        ),
        seed=seed,
    )
    run = RunDirectory("pretrain", params, provenance(store, device))
    with Tracker(tracking, run.stage, params.values) as tracker:
        metrics = run_loop(task, settings, run, tracker)
    projector.save(run.path / "projector.safetensors")
    run.publish(metrics)
    write_json(REPORT, metrics)


if __name__ == "__main__":
    run_stage(pretrain, __doc__)
