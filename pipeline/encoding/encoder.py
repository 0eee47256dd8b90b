"""The vision tower on its device: turns pixels into patch embeddings.

`pipeline.towers` loads it. A feature is the output of one block before the final norm, of
the patches alone; of a convolutional tower, its last map.

Letters: B images, S side of the input in pixels, P patches, D width of the tower.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cache.errors import SettingsError
from cache.spec import FORMAT, Spec
from pipeline.settings import EXTERNAL, TIMM, TRANSFORMERS, EncoderSettings
from pipeline.towers.open_clip_tower import load_open_clip
from pipeline.towers.timm_tower import load_timm
from pipeline.towers.tower import Tower, patch_tokens, try_image
from pipeline.towers.transformers_tower import load_transformers
from workspace.errors import StageError

PREPROCESS_VERSION = 1
"""Raised whenever a change here or in `pipeline.images.decode` gives an image other pixels."""


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
    tower = _load_tower(settings)
    num_patches, width = try_image(tower, settings)
    preprocess = tower.preprocess
    spec = Spec(
        format=FORMAT,
        model=tower.model,
        weights_sha256=tower.weights_sha256,
        activation=tower.activation,
        layer=settings.layer,
        tokens=tower.tokens,
        normalized=False,
        image_size=preprocess.size,
        resize=preprocess.resize,
        crop=preprocess.crop,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        precision=settings.precision,
        batch_size=settings.batch_size,
        dtype="float16",
        patches=num_patches,
        width=width,
        preprocess_version=PREPROCESS_VERSION,
    )
    return Encoder(tower.visual, spec, resolve_devices(settings.device)[0])


def _load_tower(settings: EncoderSettings) -> Tower:
    if settings.model.startswith(TRANSFORMERS):
        return load_transformers(settings)
    if settings.model.startswith(TIMM):
        return load_timm(settings)
    return load_open_clip(settings)


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
