"""Counts the operations of an image: in a vision tower, and in a training step with Phi-2.

A multiplication and an addition are two operations. Letters: P patches, D width.
"""

from functools import cache

import numpy as np
from transformers import PhiConfig

from bench.cost_parts.sizes import Tower
from bench.gpu_parts.arithmetic import Work, count_work, step_flops
from bench.make_phi2 import PHI2
from bench.texts import CAPTION_LENGTHS, CAPTIONS_AN_IMAGE, KINDS
from train.data.prompts import TokenizedText

LORA_RANK = 128
"""Of stage 2 in configs/coco.yaml."""

SAMPLED_IMAGES = 2000
"""Images whose texts stand for all."""

STAGES = ("stage 1", "stage 2")


def tower_flops(tower: Tower, blocks: int | None = None) -> float:
    """Return the operations of a tower's forward pass over one image.

    Args:
        tower: Its shape.
        blocks: How many blocks are computed; all but the last when not given, as for `layer: -2`.
    """
    positions = tower.patches + 1
    products = 24 * positions * tower.width**2
    attention = 4 * positions**2 * tower.width
    pixels = 2 * tower.patches * 3 * tower.patch_size**2 * tower.width
    return (tower.blocks - 1 if blocks is None else blocks) * (products + attention) + pixels


def training_flops(stage: str, tower: Tower) -> float:
    """Return the operations of training with one image and all its texts, Phi-2 and packed rows.

    Stage 1 has five captions an image, stage 2 the conversations of an image.
    """
    images = _texts(stage)
    work: Work = count_work(images, tower.patches)
    rank = 0 if stage == "stage 1" else LORA_RANK
    return step_flops(work, PhiConfig(**PHI2), tower.width, rank) / len(images)


@cache
def _texts(stage: str) -> list[list[TokenizedText]]:
    rng = np.random.default_rng(0)
    make = _captions if stage == "stage 1" else _conversations
    drawn = (make(rng) for _ in range(SAMPLED_IMAGES))
    return [texts for texts in drawn if texts]


def _captions(rng: np.random.Generator) -> list[TokenizedText]:
    lengths = np.repeat(list(CAPTION_LENGTHS), list(CAPTION_LENGTHS.values()))
    return [_text(0, length) for length in rng.choice(lengths, CAPTIONS_AN_IMAGE).tolist()]


def _conversations(rng: np.random.Generator) -> list[TokenizedText]:
    drawn = [texts[rng.integers(len(texts))] for share, texts in KINDS if rng.random() < share]
    return [
        _text(sum(question for question, _ in turns), sum(answer for _, answer in turns))
        for turns in drawn
    ]


def _text(questions: int, targets: int) -> TokenizedText:
    # One more for the EOS, which is only predicted.
    return TokenizedText(
        [0] * (questions + targets + 1), [False] * questions + [True] * (targets + 1)
    )
