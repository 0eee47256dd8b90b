"""Loads the vision towers of transformers: CLIP, SigLIP, DINOv2, DINOv3 and AIMv2.

A feature is `hidden_states[layer]` of the vision model without its prefix tokens, whose number the
config names. Files are safetensors, checked before anything is built, and no code of theirs runs.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from cache.errors import SettingsError
from cache.files.atomic import canonical_json
from cache.files.foreign import reading_foreign_file
from cache.texts import one_line
from pipeline.settings import RANDOM, TRANSFORMERS, EncoderSettings
from pipeline.towers.hub import logging_disabled, offline_if_hub_unreachable
from pipeline.towers.image_processor import PROCESSOR_FILES, read_preprocess
from pipeline.towers.tower import (
    PATCH,
    RANDOM_SEED,
    PatchEncoder,
    Tower,
    check_layer,
    weights_sha256,
)
from workspace.checkpoint_files import (
    CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    Refusal,
    at_most_modules,
    check_config,
    check_dtypes,
    check_sizes,
    holding_back_stderr,
    read_headers,
)

MAIN = "main"
"""The revision of a folder, and of the newest files on the hub."""

ATTENTION = "sdpa"
"""The implementation of attention, of transformers' names."""

HUB_FILES = (CONFIG, *PROCESSOR_FILES, WEIGHTS, "model-*.safetensors", WEIGHTS_INDEX)
"""Files fetched from a hub repository: not the same weights in other formats."""

INVISIBLE = (
    "hidden_act",
    "image_size",
    "is_native",
    "layer_norm_eps",
    "num_attention_heads",
    "patch_size",
    "rms_norm_eps",
    "rope_theta",
    "use_swiglu_ffn",
)
"""Config entries that decide features and that no tensor shows. Never change the list: stored
fingerprints depend on it."""


def _none(config: PreTrainedConfig) -> int:
    return 0


def _class_token(config: PreTrainedConfig) -> int:
    return 1


def _class_token_and_registers(config: PreTrainedConfig) -> int:
    return 1 + int(config.num_register_tokens)


PREFIX_TOKENS: dict[str, Callable[[PreTrainedConfig], int]] = {
    "aimv2": _none,
    "clip": _class_token,
    "dinov2": _class_token,
    "dinov2_with_registers": _class_token_and_registers,
    "dinov3_vit": _class_token_and_registers,
    "siglip": _none,
}
"""Number of tokens before the patches, by family."""

VISION_PART = "_vision_model"
"""End of the `model_type` of a checkpoint that holds the vision model alone."""

HINTS = {
    "siglip2": "NaFlex gives each picture another number of patches; SigLIP 2 of one size, like "
    "google/siglip2-base-patch16-224, is of type siglip",
    "dinov3_convnext": "DINOv3's ConvNeXts are in timm",
}


class BlockEncoder(PatchEncoder):
    """A vision model of transformers up to the block whose output is the feature."""

    def __init__(self, model: PreTrainedModel, layer: int, num_prefix_tokens: int) -> None:
        """Keep the blocks up to `layer`, counted from the end, and drop those behind it."""
        super().__init__()
        self.model = model
        self.num_prefix_tokens = num_prefix_tokens
        blocks = blocks_of(model)
        del blocks[len(blocks) + layer + 1 :]

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:  # type: ignore[override]
        """Move the tower; tables that no checkpoint holds stay in float32, as in transformers."""
        self.model.to(device)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def forward(self, x_BCSS: Tensor) -> Tensor:
        """Return the tokens of the patches behind the last block: [B, P, D]."""
        outputs: list[Tensor] = []
        # The model's own outputs are normalised, and pooled.
        hook = blocks_of(self.model)[-1].register_forward_hook(
            lambda block, inputs, output: outputs.append(output)
        )
        try:
            self.model(x_BCSS)
        finally:
            hook.remove()
        return outputs[0][:, self.num_prefix_tokens :]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return a vision model's list of blocks; all families have only one list of modules."""
    (blocks,) = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return blocks


def load_transformers(settings: EncoderSettings) -> Tower:
    """Load a tower of transformers.

    Raises:
        SettingsError: Names what is wrong with the model, its files or its processor.
    """
    refusal = functools.partial(_refusal, settings.model)
    folder = locate(settings)
    config = read_vision_config(folder, refusal)
    check_layer(config.num_hidden_layers, settings)
    preprocess = read_preprocess(folder, refusal)
    model = load_vision_model(settings)
    # Before blocks are dropped: weights are the same whatever the layer.
    digest = weights_sha256(model)
    family = _family(config.model_type)
    return Tower(
        visual=BlockEncoder(model, settings.layer, num_prefix_tokens(config)),
        model=f"{TRANSFORMERS}{family}-{_invisible_sha256(config)[:8]}",
        weights_sha256=digest,
        activation="swiglu" if getattr(config, "use_swiglu_ffn", False) else config.hidden_act,
        tokens=PATCH,
        preprocess=preprocess,
    )


def load_vision_model(settings: EncoderSettings) -> PreTrainedModel:
    """Load the whole vision model of a tower, in float32 on the CPU.

    Raises:
        SettingsError: Names what is wrong with the model or its files.
    """
    refusal = functools.partial(_refusal, settings.model)
    folder = locate(settings)
    if settings.pretrained == RANDOM:
        with reading_foreign_file(refusal(CONFIG)):
            return _random_model(read_vision_config(folder, refusal))
    return load_model(folder, refusal)


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """Return how many tokens a vision model has before those of the patches."""
    return PREFIX_TOKENS[_family(config.model_type)](config)


def _refusal(model: str, file: str) -> Callable[[str], SettingsError]:
    """Return a function that makes the error for a faulty file of a tower."""

    def refuse(detail: str) -> SettingsError:
        return SettingsError(
            f"encoder.model: cannot load {model!r}: {file and f'{file}: '}{detail}. Wanted a hub "
            f"id that can be reached, or a folder, with config.json, preprocessor_config.json and "
            f"safetensors of {', '.join(PREFIX_TOKENS)}."
        )

    return refuse


def locate(settings: EncoderSettings) -> Path:
    """Return the folder with a tower's files, fetched from the hub if needed.

    Raises:
        SettingsError: No such folder, no such revision, or a hub that cannot be reached.
    """
    name = settings.model.removeprefix(TRANSFORMERS)
    is_random = settings.pretrained == RANDOM
    refuse = _refusal(settings.model, "")
    with reading_foreign_file(refuse):
        if name and Path(name).is_dir():
            if is_random or settings.pretrained == MAIN:
                return Path(name)
            raise SettingsError(
                f"encoder.pretrained: {settings.pretrained!r} is no revision of the folder {name}, "
                f"which has one only. Set it to {MAIN}, or to {RANDOM}."
            )
    files = HUB_FILES[: 1 + len(PROCESSOR_FILES)] if is_random else HUB_FILES
    with logging_disabled(), offline_if_hub_unreachable() as hub_failure:

        def refuse_hub(detail: str) -> SettingsError:
            if hub_failure:
                detail = (
                    f"the model hub cannot be reached ({hub_failure}), and its local cache "
                    f"(HF_HOME) lacks revision {settings.pretrained!r}"
                )
            return refuse(detail)

        with reading_foreign_file(refuse_hub), holding_back_stderr(for_good=True):
            revision = MAIN if is_random else settings.pretrained
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=list(files),
                    local_files_only=bool(hub_failure),
                )
            )


def read_vision_config(folder: Path, refusal: Refusal) -> PreTrainedConfig:
    """Read the config of a checkpoint's vision model, without running code that comes with it.

    Raises:
        PatchcacheError: From `refusal`: another family, or a config that cannot be used.
    """
    refuse = refusal(CONFIG)
    values = check_config(folder, refusal)
    model_type = values.get("model_type")
    if _family(model_type) not in PREFIX_TOKENS:
        hint = HINTS.get(str(model_type), "")
        raise refuse(
            f"model_type is {one_line(repr(model_type))}, which is not supported as a vision tower"
            f"{hint and f' ({hint})'}"
        )
    if "quantization_config" in values:
        raise refuse("its weights are quantised, wanted them as they were trained")
    with reading_foreign_file(refuse, folder / CONFIG), holding_back_stderr(for_good=True):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    vision: PreTrainedConfig = getattr(config, "vision_config", config)
    return vision


def _family(model_type: Any) -> str:
    return str(model_type).removesuffix(VISION_PART)


def load_model(folder: Path, refusal: Refusal) -> PreTrainedModel:
    """Load a checkpoint's vision model with its weights, in float32 on the CPU.

    Raises:
        PatchcacheError: From `refusal`: names the faulty file.
    """
    config = read_vision_config(folder, refusal)
    headers = read_headers(folder, refusal)
    check_dtypes(headers, refusal)
    tensors = {name: shape for header in headers.values() for name, shape in header.shapes.items()}
    with reading_foreign_file(refusal(CONFIG)), holding_back_stderr(for_good=True):
        # Layers have more tensors than modules, except for dropouts and activations.
        with torch.device("meta"), at_most_modules(2 * len(tensors) + 100):
            empty = _from_config(config)
        check_sizes(empty, tensors)
    with (
        reading_foreign_file(refusal(WEIGHTS)),
        logging_disabled(),
        holding_back_stderr(for_good=True),
    ):
        model, loading = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        if loading["missing_keys"]:
            # transformers draws them at random.
            raise ValueError(f"it lacks {', '.join(sorted(loading['missing_keys'])[:3])}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def _random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model with weights from a fixed seed."""
    with torch.random.fork_rng(), logging_disabled():
        torch.manual_seed(RANDOM_SEED)
        return _from_config(config).eval()


def _from_config(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_config(
        config, dtype=torch.float32, attn_implementation=ATTENTION, trust_remote_code=False
    )
    return model


def _invisible_sha256(config: PreTrainedConfig) -> str:
    """Hash the config entries that decide features and that no tensor shows."""
    entries = {name: getattr(config, name) for name in INVISIBLE if hasattr(config, name)}
    return hashlib.sha256(canonical_json(entries)).hexdigest()
