"""The vision tower, loaded only when something must be encoded.

The spec that some settings gave is cached in the work directory, under a hash of everything that
decides it: the settings, the files they name, the libraries, and the code. So a store whose shards
all exist is checked and published again without loading torch.
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
from pipeline.settings import TRANSFORMERS, EncoderSettings
from workspace.code_hash import code_hash, modules_of
from workspace.errors import StageError
from workspace.paths import WORK

if TYPE_CHECKING:
    from pipeline.encoding.encoder import Encoder

SPECS = WORK / "specs"
"""Cached specs, each named by the hash of what decides it."""


MODEL_SUFFIXES = (".json", ".safetensors")
"""Ends of the files from which transformers loads a tower."""


class LazyEncoder:
    """The encoder that the settings name; its spec is known without loading it, once cached."""

    def __init__(self, settings: EncoderSettings) -> None:
        """Look up the cached spec of these settings."""
        self.settings = settings
        self._cache_path = cache_path(settings)
        self._cached_spec = read_cached_spec(self._cache_path)

    @property
    def spec(self) -> Spec:
        """Spec of the features; loads the encoder if no spec is cached."""
        return self._cached_spec or self.encoder.spec

    @property
    def is_loaded(self) -> bool:
        """Whether the encoder was loaded."""
        return "encoder" in self.__dict__

    @cached_property
    def encoder(self) -> "Encoder":
        """The encoder; raises as `pipeline.encoding.encoder.load_encoder` does.

        Raises:
            StageError: Its spec differs from the cached one.
        """
        # Imports torch, which takes seconds.
        from pipeline.encoding.encoder import load_encoder

        encoder = load_encoder(self.settings)
        if self._cache_path:
            write_bytes(self._cache_path, encoder.spec.to_json())
        if self._cached_spec not in (None, encoder.spec):
            # A tag whose weights were replaced: the shards were planned with the cached spec.
            raise StageError(
                f"encoder: {self.settings.pretrained} of {self.settings.model} has other weights "
                f"or another preprocessing than when features were last made. Run the same command "
                f"again to encode the images with the new ones."
            )
        return encoder


def read_cached_spec(path: Path | None) -> Spec | None:
    """Return the spec at `cache_path`; None if there is none, or a damaged one."""
    if path is None or not path.is_file():
        return None
    try:
        return Spec.read(path)
    except PatchcacheError:
        return None


def cache_path(settings: EncoderSettings) -> Path | None:
    """Return where the spec of these settings is cached.

    Anything that may change the spec changes the path. None for weights on the hub, which their
    owner can replace.
    """
    files = _files(settings)
    if files is None:
        return None
    identity = {
        "settings": dataclasses.asdict(settings) | {"device": None},
        "files": {name: sha256_of(Path(name)) for name in files},
        "versions": library_versions(settings.model),
        "code": sorted(code_hash(path) for path in modules_of(("pipeline.encoding.encoder",))),
        "format": FORMAT,
    }
    return SPECS / f"{hashlib.sha256(canonical_json(identity)).hexdigest()[:16]}.json"


def _files(settings: EncoderSettings) -> list[str] | None:
    """Return the files that settings name; None if files on the hub decide the spec."""
    if settings.model.startswith(TRANSFORMERS):
        folder = Path(settings.model.removeprefix(TRANSFORMERS))
        if not folder.is_dir():
            return None
        return sorted(str(path) for path in folder.iterdir() if path.suffix in MODEL_SUFFIXES)
    files = [name for name in (settings.model, settings.pretrained) if Path(name).is_file()]
    on_hub = "/" in settings.pretrained and settings.pretrained not in files
    return None if on_hub else files
