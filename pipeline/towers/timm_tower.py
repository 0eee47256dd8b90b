"""Loads convolutional networks of timm: the places of their last map are the patches.

Weights come from safetensors alone; preprocessing is that of timm's evaluation transform with the
numbers of the weights' tag.
"""

import math
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from timm.data.config import resolve_data_config
from torch import nn

from cache.errors import SettingsError
from cache.files.foreign import reading_foreign_file
from pipeline.settings import RANDOM, TIMM, EncoderSettings
from pipeline.towers.hub import logging_disabled, offline_if_hub_unreachable
from pipeline.towers.tower import (
    GRID,
    RANDOM_SEED,
    Preprocess,
    Tower,
    check_preprocess,
    grid_encoder,
    weights_sha256,
)
from workspace.errors import StageError
from workspace.tensor_file import read_header

ACTIVATION = "own"
"""Value of `activation` in the spec: the architecture has only one."""

SUFFIX = ".safetensors"

RESIZES = {"center": "shortest", "squash": "squash"}
"""How the decoder resizes, by timm's `crop_mode`."""


def load_timm(settings: EncoderSettings) -> Tower:
    """Load a convolutional network of timm.

    Raises:
        SettingsError: Unknown architecture or tag, no convolutional network, or a layer before the
            last.
        StageError: Weights that cannot be read.
    """
    name = _architecture(settings.model)
    cfg = _pretrained_cfg(name, settings)
    preprocess = _preprocess(cfg, settings)
    with torch.random.fork_rng(), logging_disabled(), reading_foreign_file(_refusal(settings)):
        torch.manual_seed(RANDOM_SEED)
        # Without the classifier, whose size depends on the data set.
        trunk: nn.Module = timm.create_model(name, num_classes=0).eval()
        encoder = grid_encoder(trunk, preprocess.size, settings)
    if encoder is None:
        raise SettingsError(
            f"encoder.model: {settings.model} is no convolutional network whose last map is a "
            f"square grid. Wanted one like timm:convnext_tiny or timm:efficientnet_b0; open_clip "
            f"and transformers (hf:) have vision transformers."
        )
    if settings.pretrained != RANDOM:
        _load_weights(trunk, _weights_file(cfg, settings), cfg, settings)
    return Tower(
        visual=encoder,
        model=f"{TIMM}{name}",
        weights_sha256=weights_sha256(encoder),
        activation=ACTIVATION,
        tokens=GRID,
        preprocess=preprocess,
    )


def _architecture(model: str) -> str:
    name = model.removeprefix(TIMM)
    if not timm.is_model(name) or "." in name:
        raise SettingsError(
            f"encoder.model: timm {timm.__version__} has no {name!r}. Wanted one of "
            f"timm.list_models(), without a tag, which encoder.pretrained names."
        )
    return name


def _refusal(settings: EncoderSettings) -> Any:
    def refuse(detail: str) -> StageError:
        return StageError(
            f"encoder: cannot load {settings.pretrained!r} into {settings.model}: {detail}. Check "
            f"encoder.model and encoder.pretrained."
        )

    return refuse


def _pretrained_cfg(name: str, settings: EncoderSettings) -> dict[str, Any]:
    """Return timm's facts about the weights: those of the tag, or else of the default tag.

    Raises:
        SettingsError: No tag and no file.
    """
    pretrained = settings.pretrained
    is_tag = pretrained != RANDOM and not pretrained.endswith(SUFFIX)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if is_tag and pretrained not in tags:
        raise SettingsError(
            f"encoder.pretrained: {pretrained!r} is no tag of {settings.model} and no {SUFFIX} "
            f"file. Tags: {', '.join(tags) or 'none'}."
        )
    cfg = timm.get_pretrained_cfg(f"{name}.{pretrained}" if is_tag else name)
    return dict(cfg.to_dict()) if cfg else {}  # type: ignore[no-untyped-call]


def _preprocess(cfg: dict[str, Any], settings: EncoderSettings) -> Preprocess:
    """Return the numbers of timm's evaluation transform (`timm.data.transforms_factory`)."""
    data: dict[str, Any] = resolve_data_config(pretrained_cfg=cfg)  # type: ignore[no-untyped-call]
    height, width = data["input_size"][1:]
    if height != width:
        raise SettingsError(f"encoder.model: image size is {height} x {width}, wanted a square.")
    mode = RESIZES.get(data["crop_mode"], data["crop_mode"])
    check_preprocess(mode, data["interpolation"], settings)
    side = math.floor(height / data["crop_pct"])
    return Preprocess(
        size=height,
        resize=mode if side == height else f"{mode}-{side}",
        crop="center",
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _weights_file(cfg: dict[str, Any], settings: EncoderSettings) -> Path:
    """Return the safetensors of a tag, fetched from the hub if needed, or of a path."""
    if settings.pretrained.endswith(SUFFIX):
        return Path(settings.pretrained)
    refuse = _refusal(settings)
    if not cfg.get("hf_hub_id"):
        raise refuse("timm has these weights not on the model hub")
    with logging_disabled(), offline_if_hub_unreachable() as hub_failure:

        def refuse_hub(detail: str) -> StageError:
            if hub_failure:
                detail = (
                    f"the model hub cannot be reached ({hub_failure}), and its local cache "
                    f"(HF_HOME) lacks these weights"
                )
            return StageError(str(refuse(detail)))

        with reading_foreign_file(refuse_hub):
            return Path(
                hf_hub_download(
                    cfg["hf_hub_id"], "model.safetensors", local_files_only=bool(hub_failure)
                )
            )


def _load_weights(
    trunk: nn.Module, path: Path, cfg: dict[str, Any], settings: EncoderSettings
) -> None:
    """Load weights other than the classifier's.

    Raises:
        StageError: No safetensors, or weights of another architecture.
    """
    refuse = _refusal(settings)
    read_header(path, refuse)
    heads = cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    with reading_foreign_file(refuse, path):
        weights = {
            name: tensor
            for name, tensor in load_file(path).items()
            if not name.startswith(tuple(f"{head}." for head in heads))
        }
        trunk.load_state_dict(weights)
