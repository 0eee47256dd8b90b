"""What training takes on a card of less memory: torch's allocator is capped in a fresh process.

The cap is the card's memory without what CUDA itself takes. Passes are doubled until one does not
fit. Phi-2 in NF4, both stages, with and without gradient checkpointing.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import PhiConfig, PreTrainedModel

from bench.gpu_parts.models import make_language_model
from bench.gpu_parts.report import Row, free_gpu_memory
from bench.gpu_parts.training import (
    Chip,
    Steps,
    images_of_passes,
    make_stage,
    measure_loop,
    our_loop,
)
from bench.step import FINETUNE, PRETRAIN, make_features
from bench.texts import make_tokenizer
from cache import FeatureStore
from train.model.blocks import recompute_blocks
from train.settings import LoraSettings

CUDA_GIB = 0.6
"""What the context and libraries of a process take, outside of torch's allocator."""

UNKNOWN_CHIP = Chip(measured=1.0, data_sheet=None)
"""No share of a rate is told of a capped process."""


@dataclass(frozen=True)
class Card:
    """A card, and how it is used."""

    gib: float
    """Its memory."""
    checkpointing: bool
    """Whether blocks are computed again in the backward pass."""

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.gib:g} GiB{', gradient checkpointing' if self.checkpointing else ''}"


@dataclass(frozen=True)
class Training:
    """What is trained on every card; pickled for the process."""

    phi: PhiConfig
    lora: LoraSettings
    dtype: torch.dtype
    passes: tuple[int, ...]
    """Positions of a forward pass, ascending."""
    device: str
    images: int
    """Of the store."""
    steps: Steps


def measure_card(card: Card, training: Training) -> Row:
    """Train on a card in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(train_on_card, card, training).result()


def train_on_card(card: Card, training: Training) -> Row:
    """Train in this process, which has not used the GPU."""
    device = torch.device(training.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(memory_share(card, total))
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(make_features(Path(folder), training.images))
        base = make_language_model(training.phi, quantize=True, dtype=training.dtype, device=device)
        return {
            name: largest_pass(partial(_train, name, base, store, card, training), training.passes)
            for name in (PRETRAIN, FINETUNE)
        }


def memory_share(card: Card, total_gib: float) -> float:
    """Return the share of a GPU's memory that torch's allocator has on a card."""
    return min(1.0, (card.gib - CUDA_GIB) / total_gib)


def largest_pass(train: Callable[[int], Row], passes: tuple[int, ...]) -> Row:
    """Return the row of the largest pass that fits, with its `pass_tokens`.

    Args:
        train: Takes the positions of a pass; raises `OutOfMemoryError` if it does not fit.
        passes: Ascending; all larger ones are left out when one does not fit.
    """
    largest: Row = {"pass_tokens": 0}
    for pass_tokens in passes:
        try:
            largest = {"pass_tokens": pass_tokens, **train(pass_tokens)}
        except torch.OutOfMemoryError:
            # The error's frames hold tensors until here.
            free_gpu_memory()
            return largest
    return largest | {"larger_ones": "not tried"}


def _train(
    name: str,
    base: PreTrainedModel,
    store: FeatureStore,
    card: Card,
    training: Training,
    pass_tokens: int,
) -> Row:
    stage = make_stage(name, base, make_tokenizer(), store, training.lora, len(store))
    if card.checkpointing:
        recompute_blocks(stage.model.language_model)
    loop, images = our_loop(stage, pass_tokens), images_of_passes(stage, 1, pass_tokens)
    rank = training.lora.r if name == FINETUNE else 0
    row = measure_loop(stage, loop, images, training.steps, rank, UNKNOWN_CHIP)
    wanted = ("texts_per_second", "positions_per_second", "peak_gib", "weights_gib")
    return {key: row[key] for key in wanted if key in row}
