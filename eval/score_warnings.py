"""Warnings that stand above the scores: what keeps them from meaning what they seem to say.

None of this makes an evaluation impossible: a run may be scored on new texts or in another
precision. But a rebuilt index may hold out images that a run learned from, and a random vision
tower tells pictures apart well enough for scores to beat their controls.
"""

from collections.abc import Mapping
from typing import Any

from eval.settings import shown_setting
from pipeline.settings import RANDOM
from train.provenance import changed_tables

RANDOM_TOWER = (
    "The vision tower's weights are random (encoder.pretrained: random): scores say nothing about "
    "a real one."
)

PRECISION = ("quantize", "dtype")
"""Settings of section llm in which an evaluation may differ from the training."""


def random_tower_warning(*settings: Mapping[str, Any]) -> str:
    """Return the warning if any of some settings names random weights, else nothing.

    Args:
        settings: Values of settings files; a section may be absent.
    """
    pretrained = [shown_setting(values, "encoder", "pretrained") for values in settings]
    return RANDOM_TOWER if RANDOM in pretrained else ""


def changed_inputs_warning(
    settings: Mapping[str, Any],
    run_settings: Mapping[str, Mapping[str, Any]],
    provenances: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return a sentence for each change since the runs were trained, or nothing.

    Args:
        settings: Values of this evaluation's settings.
        run_settings: Stage to the values of its run's settings.
        provenances: Stage to its run's provenance.
    """
    sentences = []
    for stage, provenance in provenances.items():
        if changed := changed_tables(provenance):
            sentences.append(
                f"{' and '.join(changed)} changed after {stage} was trained: images that it "
                f"learned from may count as held out."
            )
        for name in PRECISION:
            here, there = (
                shown_setting(values, "llm", name) for values in (settings, run_settings[stage])
            )
            if here != there:
                sentences.append(f"llm.{name} is {here}, but {stage} was trained with {there}.")
    return " ".join(sentences)
