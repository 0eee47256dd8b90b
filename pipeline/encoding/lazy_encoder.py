"""The vision tower, loaded when something must be encoded and not before.

What spec the settings gave is remembered in the work directory, under a key over everything that
decides it: the settings, the files they name, the libraries, and the code but for its comments.
So a store whose shards are all there is checked and published again without torch.
"""

import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cache.errors import PatchcacheError
from cache.files.atomic import canonical_json, sha256_of, write_bytes
from cache.spec import FORMAT, Spec
from pipeline.encoding.versions import library_versions
from pipeline.settings import EncoderSettings
from workspace.code_hash import code_hash
from workspace.errors import StageError
from workspace.paths import WORK

if TYPE_CHECKING:
    from pipeline.encoding.encoder import Encoder

SPECS = WORK / "specs"
"""Specs under the keys of the settings that gave them."""

CODE = ("images/decode.py", "encoding/encoder.py")
"""The modules that decide what a feature is."""


class Tower:
    """The encoder that the settings name; knows its spec without being loaded, if it ever was."""

    def __init__(self, settings: EncoderSettings) -> None:
        """Look for what is remembered of these settings."""
        self.settings = settings
        self._remembered = recall(settings)

    @property
    def spec(self) -> Spec:
        """Spec of the features; loads the encoder where it is not remembered."""
        return self._remembered or self.encoder.spec

    @property
    def is_loaded(self) -> bool:
        """Whether the encoder was loaded."""
        return "encoder" in self.__dict__

    @cached_property
    def encoder(self) -> "Encoder":
        """The encoder; its errors are those of `pipeline.encoding.encoder.load_encoder`.

        Raises:
            StageError: Its spec is not the one that was remembered.
        """
        # Takes seconds to import.
        from pipeline.encoding.encoder import load_encoder

        encoder = load_encoder(self.settings)
        remember(self.settings, encoder.spec)
        if self._remembered not in (None, encoder.spec):
            # A tag whose weights were replaced; all so far was planned with the old spec.
            raise StageError(
                f"encoder: {self.settings.pretrained} of {self.settings.model} has other weights "
                f"or another preprocessing than when features were last made. Run the same command "
                f"again to encode the images with what it is now."
            )
        return encoder


def recall(settings: EncoderSettings) -> Spec | None:
    """Return the spec that these settings gave before; None where anything may have changed it."""
    key = _key(settings)
    if key is None or not (SPECS / f"{key}.json").is_file():
        return None
    try:
        return Spec.read(SPECS / f"{key}.json")
    except PatchcacheError:
        # Damaged: it is made again.
        return None


def remember(settings: EncoderSettings, spec: Spec) -> None:
    """Keep the spec that these settings gave."""
    key = _key(settings)
    if key is not None:
        write_bytes(SPECS / f"{key}.json", spec.to_json())


def _key(settings: EncoderSettings) -> str | None:
    """Hash everything that decides the spec; None for weights whose owner can replace them."""
    files = [name for name in (settings.model, settings.pretrained) if Path(name).is_file()]
    if "/" in settings.pretrained and settings.pretrained not in files:
        return None
    decisive = {
        "settings": dataclasses.asdict(settings) | {"device": None},
        "files": {name: sha256_of(Path(name)) for name in files},
        "versions": library_versions(),
        "code": {name: code_hash(Path(__file__).parents[1] / name) for name in CODE},
        "format": FORMAT,
    }
    return hashlib.sha256(canonical_json(decisive)).hexdigest()[:16]
