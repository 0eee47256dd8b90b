"""Loads the vision towers of open_clip.

A feature is the output of one block before the final norm, without the class token: the
`hidden_states[layer][:, 1:]` of the transformers CLIP vision model with the same weights. Of a
convolutional tower, a feature is its last map.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from torch import nn

from cache.errors import SettingsError
from cache.files.atomic import canonical_json, check_ordinary
from cache.files.foreign import reading_foreign_file
from pipeline.settings import RANDOM, EncoderSettings
from pipeline.towers.hub import logging_disabled, offline_if_hub_unreachable
from pipeline.towers.tower import (
    GRID,
    PATCH,
    RANDOM_SEED,
    Preprocess,
    Tower,
    check_layer,
    check_preprocess,
    grid_encoder,
    weights_sha256,
)
from workspace.errors import StageError


def load_open_clip(settings: EncoderSettings) -> Tower:
    """Load a tower of open_clip.

    Raises:
        SettingsError: Unknown architecture or weights, weights of another activation, or a tower
            without patches or without such a layer.
        StageError: A checkpoint that cannot be read.
    """
    name, config, spec_name = _architecture(settings.model)
    _check_activation(name, config, settings)
    model = _load_model(name, settings.pretrained)
    visual: nn.Module = model.eval().visual  # type: ignore[assignment]
    preprocess = _preprocess(model, name, settings)
    num_blocks = _num_blocks(visual)
    tokens = PATCH
    if num_blocks is None:
        visual, tokens = _grid(visual, preprocess.size, settings), GRID
    else:
        check_layer(num_blocks, settings)
    return Tower(
        visual=visual,
        model=spec_name,
        weights_sha256=weights_sha256(visual),
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        tokens=tokens,
        preprocess=preprocess,
    )


def _architecture(model: str) -> tuple[str, dict[str, Any], str]:
    """Return open_clip's name of an architecture, its config, and its name in the spec.

    A config from a file is registered with open_clip; the spec names it with its hash.
    """
    if not model.endswith(".json"):
        config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
        if config is None:
            raise SettingsError(
                f"encoder.model: open_clip {open_clip.__version__} has no {model!r}. Wanted one "
                f"of open_clip.list_models(), or the path of an open_clip config JSON."
            )
        return model, config, model

    def refuse(detail: str) -> SettingsError:
        return SettingsError(f"encoder.model: cannot read {model}: {detail}")

    check_ordinary(Path(model), refuse)
    with reading_foreign_file(refuse, Path(model)):
        config = json.loads(Path(model).read_bytes())
    wanted = {"embed_dim", "vision_cfg", "text_cfg"}
    if not isinstance(config, dict) or not wanted <= config.keys():
        raise SettingsError(f"encoder.model: {model} is no open_clip config: it lacks {wanted}.")
    with reading_foreign_file(refuse, Path(model)):
        open_clip.add_model_config(model)
    name, digest = Path(model).stem, hashlib.sha256(canonical_json(config)).hexdigest()
    return name, config, f"{name}-{digest[:8]}"


def _check_activation(name: str, config: dict[str, Any], settings: EncoderSettings) -> None:
    """Refuse weights that were trained with another activation; open_clip only warns."""
    tag = open_clip.get_pretrained_cfg(name, settings.pretrained)
    if tag and bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
        wanted = "QuickGELU" if tag.get("quick_gelu") else "GELU"
        raise SettingsError(
            f"encoder: the weights {settings.pretrained!r} were trained with {wanted}, {name} has "
            f"the other activation. Take the architecture with or without '-quickgelu'."
        )


def _load_model(name: str, pretrained: str) -> nn.Module:
    """Build an architecture that open_clip knows with the weights that a setting names."""
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    is_hub_id = not (tag or pretrained == RANDOM or Path(pretrained).is_file())
    if is_hub_id and (pretrained.count("/") != 1 or Path(pretrained).suffix):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise SettingsError(
            f"encoder.pretrained: {pretrained!r} is no file and no tag of {name}. Tags: {tags}."
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_disabled())
        needs_hub = is_hub_id or bool(tag.get("hf_hub"))
        hub_failure = stack.enter_context(offline_if_hub_unreachable()) if needs_hub else ""

        def refuse(detail: str) -> StageError:
            cannot = f"encoder: cannot load {pretrained!r} into {name}:"
            if hub_failure and "Failed to download" in detail:
                return StageError(
                    f"{cannot} the model hub cannot be reached ({hub_failure}), and its local "
                    f"cache (HF_HOME) lacks these weights. Run again with a network, bring the "
                    f"cache of a machine that has one, or name a file in encoder.pretrained."
                )
            if detail.startswith("UnpicklingError"):
                # torch's own text suggests running whatever code the file holds.
                detail = "not a file of tensors alone"
            return StageError(f"{cannot} {detail}. Check encoder.model and encoder.pretrained.")

        stack.enter_context(reading_foreign_file(refuse))
        weights: str | None = pretrained
        if pretrained == RANDOM:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(RANDOM_SEED)
            weights = None
        elif is_hub_id:
            weights = str(download_pretrained_from_hf(pretrained))
        model: nn.Module = open_clip.create_model(name, weights, pretrained_text=False)
        return model


def _num_blocks(visual: nn.Module) -> int | None:
    """Count the blocks of a tower that keeps one grid of patches from the first to the last.

    None for other towers.
    """
    transformer: Any = getattr(visual, "transformer", None)
    if transformer is not None:
        return len(transformer.resblocks)
    trunk: Any = getattr(visual, "trunk", visual)
    embed = getattr(trunk, "patch_embed", None)
    # timm's convolutional and staged networks lack one of these.
    plain = hasattr(trunk, "blocks") and hasattr(embed, "dynamic_feat_size")
    return len(trunk.blocks) if plain else None


def _grid(visual: nn.Module, size: int, settings: EncoderSettings) -> nn.Module:
    """Return the encoder of a convolutional tower of timm's.

    Raises:
        SettingsError: A tower of another kind.
    """
    trunk: nn.Module = getattr(visual, "trunk", visual)
    encoder = grid_encoder(trunk, size, settings)
    if encoder is None:
        raise SettingsError(
            f"encoder.model: {settings.model} has no patch tokens: {type(trunk).__name__} merges "
            f"patches on the way, or is otherwise no plain vision transformer and no convolutional "
            f"network of timm. Wanted a ViT or a ConvNeXt."
        )
    return encoder


def _preprocess(model: nn.Module, name: str, settings: EncoderSettings) -> Preprocess:
    """Return size, resize mode, interpolation, mean and std of the images that the weights want.

    open_clip assumes OpenAI's values for weights without a tag; here, they get the values on which
    all tags of their architecture agree.
    """
    preprocess = dict(open_clip.get_model_preprocess_cfg(model))
    if not open_clip.get_pretrained_cfg(name, settings.pretrained):
        tags = [
            open_clip.get_pretrained_cfg(name, tag)
            for tag in open_clip.list_pretrained_tags_by_model(name)
        ]
        for key in ("mean", "std", "interpolation", "resize_mode"):
            values = {tag[key] for tag in tags}
            if len(values) == 1:
                preprocess[key] = values.pop()
    check_preprocess(preprocess["resize_mode"], preprocess["interpolation"], settings)
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise SettingsError(f"encoder.model: image size is {height} x {width}, wanted a square.")
    return Preprocess(
        size=height,
        resize=preprocess["resize_mode"],
        crop="center",
        interpolation=preprocess["interpolation"],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
    )
