"""The feature store: patch embeddings of images in HDF5 shards, read at the speed of memory."""

import importlib
from typing import TYPE_CHECKING, Any

# First: a command that lacks a package must say so in one line.
from .cli import startup as startup
from .errors import (
    CacheError,
    CorruptShardError,
    IncompleteStoreError,
    MissingImageError,
    PatchcacheError,
    SettingsError,
    SpecMismatchError,
    UnreachableStoreError,
    UnsafeShardError,
)

if TYPE_CHECKING:
    from .audit import VerifyReport
    from .spec import Spec
    from .store import FeatureStore

__all__ = [
    "CacheError",
    "CorruptShardError",
    "FeatureStore",
    "IncompleteStoreError",
    "MissingImageError",
    "PatchcacheError",
    "SettingsError",
    "Spec",
    "SpecMismatchError",
    "UnreachableStoreError",
    "UnsafeShardError",
    "VerifyReport",
]

_LAZY = {"FeatureStore": "store", "Spec": "spec", "VerifyReport": "audit"}
"""Names whose modules load numpy, h5py and pyarrow; imported on first use."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
