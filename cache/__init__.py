"""The feature store: patch embeddings of images in HDF5 shards, read at the speed of memory."""

import importlib
from typing import TYPE_CHECKING, Any

# First: a command that lacks a package must say so in one line.
from .cli import startup as startup
from .errors import (
    CacheError,
    CorruptShardError,
    IncompleteStoreError,
    InvalidFeaturesError,
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
    from .write import unfinished_ids, write_store

__all__ = [
    "CacheError",
    "CorruptShardError",
    "FeatureStore",
    "IncompleteStoreError",
    "InvalidFeaturesError",
    "MissingImageError",
    "PatchcacheError",
    "SettingsError",
    "Spec",
    "SpecMismatchError",
    "UnreachableStoreError",
    "UnsafeShardError",
    "VerifyReport",
    "unfinished_ids",
    "write_store",
]

_LAZY = {
    "FeatureStore": "store",
    "Spec": "spec",
    "VerifyReport": "audit",
    "unfinished_ids": "write",
    "write_store": "write",
}
"""Names whose modules load numpy, h5py and pyarrow; imported on first use."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
