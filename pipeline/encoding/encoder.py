"""The vision tower: loads it through open_clip and turns pixels into patch embeddings.

A feature is the output of one block before the final norm, without the class token: the
`hidden_states[layer][:, 1:]` of the transformers CLIP vision model with the same weights.

Letters: B images, S side of the input in pixels, P patches, D width of the tower.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.pretrained import download_pretrained_from_hf
from torch import Tensor, nn

from cache.errors import SettingsError
from cache.files.atomic import canonical_json, check_ordinary
from cache.files.foreign import reading_foreign_file
from cache.spec import FORMAT, Spec
from cache.texts import one_line
from pipeline.encoding.hub import logging_disabled, offline_if_hub_unreachable
from pipeline.images.decode import Interpolation, Resize
from pipeline.settings import EXTERNAL, RANDOM, EncoderSettings
from workspace.errors import StageError

PREPROCESS_VERSION = 1
"""Raised whenever a change here or in `pipeline.images.decode` gives an image other pixels."""

RANDOM_SEED = 0
"""Seed of the weights of `pretrained: random`, so that every process draws the same ones."""


@dataclass(frozen=True)
class PendingBatch:
    """A batch that the device is encoding; its tensors may be read once `copied` has passed."""

    features_BPD: Tensor
    """float16, in main memory."""
    is_finite: Tensor
    """bool []: whether every value fits float16."""
    copied: torch.cuda.Event | None
    """Recorded after the copy from a GPU; None on other devices."""


class Encoder:
    """A vision tower in evaluation mode, with the spec of its features."""

    def __init__(self, visual: nn.Module, spec: Spec, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec.precision]
        self._visual = visual.to(device, self._dtype)
        if device.type == "cuda" and spec.precision == "fp32":
            # By default, cuDNN multiplies float32 patches in TF32.
            torch.backends.cudnn.allow_tf32 = False
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    def encode(self, pixels_BSSC: Tensor) -> NDArray[np.float16]:
        """Encode a batch of images.

        Args:
            pixels_BSSC: uint8 [B, S, S, 3], RGB.

        Returns:
            float16 [B, P, D].

        Raises:
            StageError: A value does not fit float16.
        """
        return self.result(self.submit(pixels_BSSC))

    @torch.inference_mode()
    def submit(self, pixels_BSSC: Tensor) -> PendingBatch:
        """Queue a batch, as `encode` takes it, on the device; does not wait for a GPU."""
        if self.device.type == "cuda":
            # Only from pinned memory does a GPU copy while it computes.
            pixels_BSSC = pixels_BSSC.pin_memory()
        x = pixels_BSSC.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        x = ((x - self._mean) / self._std).to(self._dtype)
        features_BPD = patch_tokens(self._visual, x, self.spec.layer).to(torch.float16)
        is_finite = torch.isfinite(features_BPD).all()
        if self.device.type != "cuda":
            return PendingBatch(features_BPD.cpu(), is_finite.cpu(), None)
        pinned = _to_pinned(features_BPD), _to_pinned(is_finite)
        return PendingBatch(*pinned, torch.cuda.current_stream(self.device).record_event())

    def result(self, pending: PendingBatch) -> NDArray[np.float16]:
        """Wait for a submitted batch and return its features as `encode` does."""
        if pending.copied:
            pending.copied.synchronize()
        if not pending.is_finite:
            raise StageError(
                f"encoder: block {self.spec.layer} of {self.spec.model} gives values outside "
                f"float16 (65504), or not finite ones. Check encoder.pretrained, or take another "
                f"encoder.layer."
            )
        return pending.features_BPD.numpy()


def _to_pinned(tensor: Tensor) -> Tensor:
    """Start a copy from a GPU to pinned memory."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def patch_tokens(visual: nn.Module, x_BCSS: Tensor, layer: int) -> Tensor:
    """Return the patch tokens after a block: [B, P, D], not normalised, no class token."""
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


def load_encoder(settings: EncoderSettings) -> Encoder:
    """Load the vision tower that the settings name.

    Raises:
        SettingsError: Unknown architecture or weights, weights of another activation, or a tower
            without patch tokens or without such a layer; or features of an external store.
        StageError: A checkpoint that cannot be read.
    """
    if settings.model == EXTERNAL:
        raise SettingsError(
            f"encoder.model is external: the features are those of {settings.pretrained}, and no "
            f"vision tower is known that could encode a picture. A run of such features can "
            f"neither be asked about a file nor be served or exported; `python -m eval.ask "
            f"--image-id` asks it about an image of the store."
        )
    name, config, spec_name = _architecture(settings.model)
    _check_activation(name, config, settings)
    model = _load_model(name, settings.pretrained)
    visual: nn.Module = model.eval().visual  # type: ignore[assignment]
    preprocess = _preprocess(model, name, settings)
    features_BPD = _try_layer(visual, preprocess["size"], settings)
    spec = Spec(
        format=FORMAT,
        model=spec_name,
        weights_sha256=weights_sha256(visual),
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        layer=settings.layer,
        tokens="patch",
        normalized=False,
        image_size=preprocess["size"],
        resize=preprocess["resize_mode"],
        crop="center",
        interpolation=preprocess["interpolation"],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        precision=settings.precision,
        batch_size=settings.batch_size,
        dtype="float16",
        patches=features_BPD.shape[1],
        width=features_BPD.shape[2],
        preprocess_version=PREPROCESS_VERSION,
    )
    return Encoder(visual, spec, resolve_devices(settings.device)[0])


def resolve_devices(name: str) -> list[torch.device]:
    """Resolve `encoder.device`: "auto" is every GPU, or the CPU where there is none.

    Raises:
        SettingsError: This machine lacks such a device.
    """
    if name == "auto":
        count = torch.cuda.device_count()
        return [torch.device("cuda", n) for n in range(count)] or [torch.device("cpu")]
    try:
        # A valid name says nothing: only a tensor that was made on the device and copied back does.
        tensors = [torch.empty(0, device=device.strip()) for device in name.split(",")]
        return [tensor.device for tensor in tensors if tensor.cpu() is not None]
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingsError(f"encoder.device: {str(error).splitlines()[0]}") from None


def weights_sha256(visual: nn.Module) -> str:
    """Hash names, types, shapes and values of a tower's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(visual.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def _try_layer(visual: nn.Module, image_size: int, settings: EncoderSettings) -> Tensor:
    """Encode one black image: [1, P, D]. Shows that the tower has the layer, and its P and D."""
    num_blocks = _num_blocks(visual, settings.model)
    if num_blocks < -settings.layer:
        raise SettingsError(
            f"encoder.layer: {settings.model} has no block {settings.layer} (it has {num_blocks})."
        )
    with torch.inference_mode():
        try:
            return patch_tokens(visual, torch.zeros(1, 3, image_size, image_size), settings.layer)
        except (AssertionError, RuntimeError) as error:
            raise SettingsError(
                f"encoder.model: {settings.model} cannot encode an image of {image_size} x "
                f"{image_size} pixels: {one_line(error)}"
            ) from None


def _num_blocks(visual: nn.Module, model: str) -> int:
    """Count the blocks of a tower that keeps one grid of patches from the first to the last."""
    transformer: Any = getattr(visual, "transformer", None)
    if transformer is not None:
        return len(transformer.resblocks)
    trunk: Any = getattr(visual, "trunk", visual)
    embed = getattr(trunk, "patch_embed", None)
    # timm's convolutional and staged networks lack one of these.
    if not (hasattr(trunk, "blocks") and hasattr(embed, "dynamic_feat_size")):
        raise SettingsError(
            f"encoder.model: {model} has no patch tokens: {type(trunk).__name__} is a "
            f"convolutional network, merges patches on the way, or is otherwise no plain vision "
            f"transformer. Wanted a ViT."
        )
    return len(trunk.blocks)


def _preprocess(model: nn.Module, name: str, settings: EncoderSettings) -> dict[str, Any]:
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
    found = preprocess["resize_mode"], preprocess["interpolation"]
    known = get_args(Resize), get_args(Interpolation)
    if found[0] not in known[0] or found[1] not in known[1]:
        raise SettingsError(
            f"encoder.model: {settings.model} wants images resized by {found}; known are "
            f"{known[0]} with {known[1]}."
        )
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise SettingsError(f"encoder.model: image size is {height} x {width}, wanted a square.")
    return preprocess | {"size": height}
