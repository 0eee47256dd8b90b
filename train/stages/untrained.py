"""Publishes the run of a stage without texts: no step is made, and the next stage finds its files.

Captions and conversations are optional: each trains one stage.
"""

from pathlib import Path
from typing import Any

from cache import FeatureStore
from train.data.examples import Examples
from train.model.projector import Projector
from train.run import UNTRAINED, RunDirectory, pick_device, provenance, run_identity, stage_lock
from workspace.errors import StageError
from workspace.paths import FEATURES
from workspace.settings import Params

REASONS = {
    "pretrain": "there are no captions of split train",
    "finetune": "there are no conversations",
}
"""Stage to the reason for which it is not trained, as part of a sentence."""

_OUTCOMES = {
    "pretrain": "the finetune stage starts from a projector of random weights",
    "finetune": "the run is stage 1's projector, without an adapter",
}


def check_any_texts(stage: str, *texts: Examples) -> None:
    """Refuse a training without any text.

    Raises:
        StageError: All texts are empty.
    """
    if not any(map(len, texts)):
        raise StageError(
            f"{stage}: nothing to train on: the index has neither captions of split train nor "
            f"conversations. The features are finished ({FEATURES}). To train on them, name "
            f"captions in data.train.captions or conversations in data.instruct."
        )


def publish_untrained(
    stage: str,
    params: Params,
    store: FeatureStore,
    projector: Projector,
    report: Path,
    **origin: Any,
) -> None:
    """Publish a projector as the run of a stage, with no step and an empty history.

    Args:
        stage: Its name, with an entry in `REASONS`.
        params: Settings.
        store: Holds the features.
        projector: The weights that the run ends with.
        report: File of the metrics.
        origin: Entries of the provenance, as `train.run.provenance` takes them.
    """
    origin = {**origin, UNTRAINED: REASONS[stage]}
    with stage_lock(stage):
        identity = run_identity(params, ("llm", "projector", stage), store, **{UNTRAINED: stage})
        run = RunDirectory(stage, params, identity, provenance(store, pick_device(), **origin))
        run.write_history([])
        if run.is_main:
            projector.save(run.files / "projector.safetensors")
            image_tokens = projector.num_embeddings(store.spec.patches)
            run.publish({"steps": 0, "images": 0, "texts": 0, "image_tokens": image_tokens}, report)
            print(f"{stage}: 0 steps, because {REASONS[stage]}: {_OUTCOMES[stage]}")
