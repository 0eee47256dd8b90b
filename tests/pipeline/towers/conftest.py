"""Tiny random checkpoints of each family of transformers, as save_pretrained writes them."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

WIDTH = 32

BLOCKS = 3

SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}

PLAIN = SHAPE | {"intermediate_size": 48, "image_size": 32, "patch_size": 8}

DINO = SHAPE | {"mlp_ratio": 2, "patch_size": 8}

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
TEXT |= {"num_attention_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

SQUARE = {"size": {"height": 32, "width": 32}}

CROPPED = {"crop_size": {"height": 32, "width": 32}}


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is made, and what is known of it."""

    model: str
    """transformers' name of the vision model."""
    config: dict[str, Any]
    processor: str
    numbers: dict[str, Any]
    """Of the processor."""
    prefix: int
    """Tokens before the patches."""
    activation: str
    whole: str = ""
    """transformers' name of a model with a text part, whose checkpoint holds the vision model."""
    side: int = 4
    """Patches in a row."""


CLIP = Kind(
    model="CLIPVisionModel",
    config=PLAIN,
    processor="CLIPImageProcessorPil",
    numbers={"size": {"shortest_edge": 32}} | CROPPED,
    prefix=1,
    activation="quick_gelu",
)

SIGLIP = Kind(
    model="SiglipVisionModel",
    config=PLAIN,
    processor="SiglipImageProcessorPil",
    numbers=SQUARE,
    prefix=0,
    activation="gelu_pytorch_tanh",
)

DINOV2 = Kind(
    model="Dinov2Model",
    # Trained at another size than the processor's, as the published ones.
    config=DINO | {"image_size": 72},
    processor="BitImageProcessorPil",
    numbers={"size": {"shortest_edge": 37}} | CROPPED,
    prefix=1,
    activation="gelu",
)

AIMV2 = Kind(
    model="Aimv2VisionModel",
    config=PLAIN,
    processor="CLIPImageProcessorPil",
    numbers={"size": {"shortest_edge": 32}} | CROPPED,
    prefix=0,
    activation="silu",
)


def changed(kind, **changes):
    return Kind(**kind.__dict__ | changes)


KINDS = {
    "clip": CLIP,
    "clip-whole": changed(CLIP, whole="CLIPModel"),
    "siglip": SIGLIP,
    "siglip-whole": changed(SIGLIP, whole="SiglipModel"),
    "siglip-uneven": changed(
        SIGLIP, config=PLAIN | {"image_size": 35}, numbers={"size": {"height": 35, "width": 35}}
    ),
    "dinov2": DINOV2,
    "dinov2-swiglu": changed(
        DINOV2, config=DINOV2.config | {"use_swiglu_ffn": True}, activation="swiglu"
    ),
    "dinov2-registers": changed(
        DINOV2,
        model="Dinov2WithRegistersModel",
        config=DINOV2.config | {"num_register_tokens": 3},
        prefix=4,
    ),
    "dinov3": Kind(
        model="DINOv3ViTModel",
        config=PLAIN | {"num_register_tokens": 4},
        processor="DINOv3ViTImageProcessor",
        numbers=SQUARE,
        prefix=5,
        activation="gelu",
    ),
    "aimv2": AIMV2,
    "aimv2-native": changed(AIMV2, config=PLAIN | {"is_native": True}),
}


@functools.cache
def build(name, folder):
    """Write the checkpoint of a kind with random weights."""
    kind = KINDS[name]
    vision = getattr(transformers, kind.model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind.whole:
            whole = getattr(transformers, kind.whole)
            model = whole(whole.config_class(vision_config=kind.config, text_config=TEXT))
        else:
            model = vision(vision.config_class(**kind.config))
        # New blocks change their input by next to nothing.
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    getattr(transformers, kind.processor)(**kind.numbers).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Makes the checkpoint of a kind, once, and returns its folder; tests must not change it."""
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda name: Path(build(name, root / name))
