"""Encodes a picture file as a run's training features were encoded.

open_clip is imported with the first picture, so a question about a cached image does not wait
for it.

Letters: S side in pixels, C channels, P patches, D width of the vision tower.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import SettingsError
from eval.runs import FinishedRun
from pipeline.images.decode import DecodeError, decode_for
from pipeline.images.names import MAX_IMAGE_BYTES
from pipeline.settings import EncoderSettings
from workspace.errors import StageError

if TYPE_CHECKING:
    from pipeline.encoding.encoder import Encoder


class RunEncoder:
    """The vision tower of a run, loaded on first use."""

    def __init__(self, run: FinishedRun) -> None:
        self._run = run
        self._encoder: Encoder | None = None

    def load(self) -> "Encoder":
        """Return the tower; the first call loads it.

        Raises:
            SpecMismatchError: The tower gives other features than the run was trained on.
            PatchcacheError: The tower cannot be loaded.
        """
        if self._encoder is None:
            from pipeline.encoding.encoder import load_encoder

            settings = self._run.params.section("encoder", EncoderSettings)
            # The features may come from another machine, so this machine's device is chosen anew.
            encoder = load_encoder(dataclasses.replace(settings, device="auto"))
            where = f"the vision tower {settings.pretrained} of {settings.model}"
            self._run.check_features(encoder.spec, where)
            self._encoder = encoder
        return self._encoder

    def encode(self, data: bytes, name: str) -> NDArray[np.float16]:
        """Return the features of a picture: float16 [P, D].

        Args:
            data: Bytes of the picture file.
            name: The file's name, for error texts.

        Raises:
            StageError: The bytes are not a picture, damaged, or too large to decode.
            PatchcacheError: The tower cannot be loaded, or is not the run's.
        """
        encoder = self.load()
        try:
            pixels_SSC = decode_for(data, encoder.spec)
        except DecodeError as error:
            raise StageError(f"{name}: not a readable picture: {error}") from None
        patches_PD: NDArray[np.float16] = encoder.encode(torch.from_numpy(pixels_SSC)[None])[0]
        return patches_PD


def read_picture(path: Path) -> bytes:
    """Return the bytes of a picture file.

    Raises:
        SettingsError: There is no such file.
        StageError: The file is too large for a picture.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such file. Wanted a picture.")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise StageError(f"{path}: has more than {MAX_IMAGE_BYTES} bytes, wanted a picture.")
    return path.read_bytes()
