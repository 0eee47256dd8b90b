"""Counts the operations of a training step from its shapes, and the hours of the recipe from rates.

Operations are those that a step needs, with a multiplication and an addition as two. Padding,
recomputation and logits at other than supervised positions are not needed, so they count for
nothing, whoever computes them.

    blocks      2 a parameter and position forward, 2 for the gradient of the input. The weights
                are frozen, so there is no third product.
    LoRA        2 forward, 2 for the gradient of the input, 2 for that of the weights
    projector   2 forward, 2 for the gradient of the weights, at patches; its second layer has 2
                for the gradient of its input
    attention   a layer, and pair of positions of which the first sees the second: 4 H forward
                (scores and their sum of values), 8 H for the gradients of queries, keys and values
    output      4 H V at each supervised position: forward, and the gradient of the input

Letters: P patches, D width of the vision tower, H width and V vocabulary of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PhiConfig

from train.data.prompts import TokenizedText

PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}
"""Dense bf16 with float32 sums, of NVIDIA's data sheets, which name twice as much with sparsity."""

MEMORY_BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA L4": 0.3e12,
    "NVIDIA L40S": 0.864e12,
}
"""Bytes a second, of the same data sheets."""


@dataclass(frozen=True)
class Work:
    """What some sequences ask of a model, without padding."""

    texts: int
    positions: int
    patches: int
    """Positions that are patches."""
    pairs: int
    """Pairs of positions of which the first sees the second."""
    targets: int
    """Supervised tokens."""


def count_work(images: Sequence[Sequence[TokenizedText]], patches: int) -> Work:
    """Count the work of images whose texts share one copy of the patches.

    For one sequence a text, give every text an image of its own.

    Args:
        images: Texts of each image.
        patches: Of an image.
    """
    # The last token of a text is only predicted.
    lengths = [[len(text.token_ids) - 1 for text in texts] for texts in images]
    patch_pairs = patches * (patches + 1) // 2
    return Work(
        texts=sum(map(len, images)),
        positions=sum(patches + sum(of_image) for of_image in lengths),
        patches=patches * len(images),
        pairs=sum(
            patch_pairs + sum(n * patches + n * (n + 1) // 2 for n in of_image)
            for of_image in lengths
        ),
        targets=sum(text.num_target_tokens for texts in images for text in texts),
    )


def block_parameters(phi: PhiConfig) -> int:
    """Return the number of weights in the matrices of all blocks."""
    width, inner = phi.hidden_size, phi.intermediate_size
    return int(phi.num_hidden_layers * (4 * width**2 + 2 * width * inner))


def lora_parameters(phi: PhiConfig, rank: int) -> int:
    """Return the number of weights of LoRA on every matrix of all blocks."""
    width, inner = phi.hidden_size, phi.intermediate_size
    return int(phi.num_hidden_layers * rank * (4 * 2 * width + 2 * (width + inner)))


def step_flops(work: Work, phi: PhiConfig, vision_width: int, lora_rank: int) -> int:
    """Return the operations of a training step with the projector `mlp`.

    Args:
        work: Of the step.
        phi: The language model, with as many keys as queries.
        vision_width: D.
        lora_rank: 0 for stage 1.
    """
    width = phi.hidden_size
    blocks = 4 * block_parameters(phi) * work.positions
    lora = 6 * lora_parameters(phi, lora_rank) * work.positions
    projector = (4 * vision_width * width + 6 * width**2) * work.patches
    attention = 12 * width * phi.num_hidden_layers * work.pairs
    output = 4 * width * phi.vocab_size * work.targets
    return int(blocks + lora + projector + attention + output)


TRAIN_CAPTIONS, IMAGES = 591_753, 123_287
"""Of COCO 2017: the captions of its training images, and all images."""

CONVERSATIONS = round(157_712 * 0.98)
"""Of LLaVA-Instruct-150K, without those that are held out."""

EPOCHS = {"pretrain": 3, "finetune": 1}

GENERATED = ((2 * 5000, 26), (2000, 256), (9000, 2))
"""Texts of the evaluation, and the tokens of the longest of a batch: captions of both stages, which
end as COCO's do; answers, one of which reaches the limit; yes-no answers with their EOS."""

CONDITIONS, GENERATION_BATCH = 4, 64
"""Ways in which every text is generated, and texts of a batch.

Source of all these numbers: configs/coco.yaml.
"""


@dataclass(frozen=True)
class Rates:
    """What was measured; None where it was not."""

    captions_per_second: float | None
    conversations_per_second: float | None
    images_per_second: float | None
    """Of the extraction, from JPEG to shards."""
    seconds_per_token: float | None
    """Of a batch of `GENERATION_BATCH` texts, its prompts counted in."""


def recipe_hours(rates: Rates) -> dict[str, float | None]:
    """Return the hours of each stage of configs/coco.yaml, and of all; None where unknown."""

    def hours(amount: float, rate: float | None) -> float | None:
        return amount / rate / 3600 if rate else None

    per_token = rates.seconds_per_token
    tokens = sum(-(-texts // GENERATION_BATCH) * longest for texts, longest in GENERATED)
    found = {
        "extract": hours(IMAGES, rates.images_per_second),
        "pretrain": hours(EPOCHS["pretrain"] * TRAIN_CAPTIONS, rates.captions_per_second),
        "finetune": hours(EPOCHS["finetune"] * CONVERSATIONS, rates.conversations_per_second),
        "evaluate": hours(CONDITIONS * tokens, 1 / per_token if per_token else None),
    }
    known = [value for value in found.values() if value is not None]
    total = sum(known) if len(known) == len(found) else None
    return {
        stage: None if value is None else round(value, 3)
        for stage, value in (found | {"total": total}).items()
    }
