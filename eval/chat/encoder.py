"""Looks at a picture as a run's features were made: the pipeline's pixels, the run's vision tower.

open_clip is imported with the first picture: who asks about a cached image never waits for it.

Letters: S side in pixels, C channels, P patches, D width of the vision tower.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import SettingsError
from eval.runs import FinishedRun
from pipeline.images.decode import DecodeError, Interpolation, Resize, decode_rgb
from pipeline.images.names import MAX_IMAGE_BYTES
from pipeline.settings import EncoderSettings
from workspace.errors import StageError

if TYPE_CHECKING:
    from pipeline.encoding.encoder import Encoder


class Vision:
    """The vision tower that a run learned from, loaded on first use and kept."""

    def __init__(self, run: FinishedRun) -> None:
        self._run = run
        self._encoder: Encoder | None = None

    def load(self) -> "Encoder":
        """Return the tower, and load it the first time.

        Raises:
            SpecMismatchError: The settings of the run name a tower other than it learned from.
            PatchcacheError: The tower cannot be loaded.
        """
        if self._encoder is None:
            from pipeline.encoding.encoder import load_encoder

            settings = self._run.params.section("encoder", EncoderSettings)
            # Which device made the features decides nothing here, and may be another machine's.
            encoder = load_encoder(dataclasses.replace(settings, device="auto"))
            self._run.check_features(encoder.spec, f"the vision tower {settings.pretrained}")
            self._encoder = encoder
        return self._encoder

    def look(self, data: bytes, name: str) -> NDArray[np.float16]:
        """Return the features of a picture: float16 [P, D].

        Args:
            data: The file's bytes.
            name: For the error text.

        Raises:
            StageError: No picture, a damaged one, or one too large to be decoded.
            PatchcacheError: The tower cannot be loaded, or is another one.
        """
        encoder = self.load()
        size, resize = encoder.spec.image_size, cast(Resize, encoder.spec.resize)
        interpolation = cast(Interpolation, encoder.spec.interpolation)
        try:
            pixels_SSC = decode_rgb(data, size, resize, interpolation)
        except DecodeError as error:
            raise StageError(f"{name}: no picture that can be read: {error}") from None
        patches_PD: NDArray[np.float16] = encoder.encode(torch.from_numpy(pixels_SSC)[None])[0]
        return patches_PD


def read_picture(path: Path) -> bytes:
    """Return the bytes of a picture file.

    Raises:
        SettingsError: No such file.
        StageError: One too large to be a picture.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such file. Wanted a picture.")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise StageError(f"{path}: has more than {MAX_IMAGE_BYTES} bytes, wanted a picture.")
    return path.read_bytes()
