"""What all vision towers have in common: patch embeddings from pixels, and the facts of the spec.

Letters: B images, S side of the input in pixels, G side of a convolutional tower's last map,
P patches, D width of the tower.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cache.errors import SettingsError
from cache.files.foreign import reading_foreign_file
from pipeline.images.decode import FILTERS, RESIZES
from pipeline.settings import EncoderSettings

RANDOM_SEED = 0
"""Seed of the weights of `pretrained: random`, so that every process draws the same ones."""

PATCH = "patch"
"""Value of `tokens` in the spec: the tokens of a transformer's patches, without prefix tokens."""

GRID = "grid"
"""Value of `tokens` in the spec: the places of a convolutional tower's last map."""

LAST_MAP = -1
"""The only `encoder.layer` of a convolutional tower."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a tower wants its pictures; the fields are those of the spec."""

    size: int
    resize: str
    crop: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def geometry(self) -> tuple[int, str, str, str]:
        """Size, resize, interpolation and crop, in the order of `images.decode.to_square`."""
        return self.size, self.resize, self.interpolation, self.crop


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision tower as it was loaded, in float32 on the CPU; the fields are those of the spec."""

    visual: nn.Module
    """open_clip's own module, or a `PatchEncoder`."""
    model: str
    weights_sha256: str
    activation: str
    tokens: str
    preprocess: Preprocess


class PatchEncoder(nn.Module):
    """A tower that gives the features of its layer and no others: [B, 3, S, S] to [B, P, D]."""


class GridEncoder(PatchEncoder):
    """A convolutional network of timm: the places of its last map, row by row, are the patches."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x_BCSS: Tensor) -> Tensor:
        """Return the last map, as the network's pooling sees it: [B, G * G, D]."""
        map_BDGG: Tensor = self.trunk.forward_features(x_BCSS)  # type: ignore[operator]
        return map_BDGG.flatten(2).transpose(1, 2)


def patch_tokens(visual: nn.Module, x_BCSS: Tensor, layer: int) -> Tensor:
    """Return the patch tokens after a block: [B, P, D], not normalised, no class token."""
    if isinstance(visual, PatchEncoder):
        own: Tensor = visual(x_BCSS)
        return own
    output = visual.forward_intermediates(  # type: ignore[operator]
        x_BCSS,
        indices=[layer],
        stop_early=True,
        normalize_intermediates=False,
        intermediates_only=True,
        output_fmt="NLC",
    )
    tokens: Tensor = output["image_intermediates"][0]
    return tokens


def weights_sha256(visual: nn.Module) -> str:
    """Hash names, types, shapes and values of a tower's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(visual.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def grid_encoder(trunk: Any, size: int, settings: EncoderSettings) -> GridEncoder | None:
    """Return the encoder of a convolutional network; None if its last map is no square grid.

    Args:
        trunk: A network of timm, without pooling and classifier.
        size: Side of its input in pixels.
        settings: Their layer must be the last.

    Raises:
        SettingsError: A layer before the last: its map has another size.
    """
    if not hasattr(trunk, "forward_features"):
        return None
    with torch.inference_mode():
        found = trunk.forward_features(torch.zeros(1, 3, size, size))
    # Transformers that merge patches keep their channels last.
    channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    if channels_last or not isinstance(found, Tensor) or found.ndim != 4:
        return None
    if found.shape[1] != trunk.num_features or found.shape[2] != found.shape[3]:
        return None
    if settings.layer != LAST_MAP:
        raise SettingsError(
            f"encoder.layer: {settings.model} has no block {settings.layer}: the maps of a "
            f"convolutional network differ in size, and only the last is taken. Set encoder.layer "
            f"to {LAST_MAP}."
        )
    return GridEncoder(trunk)


def check_layer(num_blocks: int, settings: EncoderSettings) -> None:
    """Refuse a layer that a tower does not have.

    Raises:
        SettingsError: The tower has fewer blocks.
    """
    if num_blocks < -settings.layer:
        raise SettingsError(
            f"encoder.layer: {settings.model} has no block {settings.layer} (it has {num_blocks})."
        )


def check_preprocess(resize: str, interpolation: str, settings: EncoderSettings) -> None:
    """Refuse pictures that `pipeline.images.decode` cannot make.

    Raises:
        SettingsError: Another way to resize, or another filter.
    """
    if resize not in RESIZES or interpolation not in FILTERS:
        raise SettingsError(
            f"encoder.model: {settings.model} wants images resized by {(resize, interpolation)}; "
            f"known are {RESIZES} with {tuple(FILTERS)}."
        )


def try_image(tower: Tower, settings: EncoderSettings) -> tuple[int, int]:
    """Encode one black image; return P and D.

    Raises:
        SettingsError: The tower cannot encode images of its preprocessing's size.
    """
    size = tower.preprocess.size

    def refuse(detail: str) -> SettingsError:
        return SettingsError(
            f"encoder.model: {settings.model} cannot encode an image of {size} x {size} pixels: "
            f"{detail}"
        )

    with torch.inference_mode(), reading_foreign_file(refuse):
        features = patch_tokens(tower.visual, torch.zeros(1, 3, size, size), settings.layer)
    return features.shape[1], features.shape[2]
