"""The feature store: patch embeddings of images in HDF5 shards, read at the speed of memory."""

# First of all: what follows imports packages that may not be there.
import cache.cli.startup  # noqa: F401

# isort: split
from cache.audit import VerifyReport
from cache.errors import (
    CacheError,
    CorruptShardError,
    IncompleteStoreError,
    MissingImageError,
    SettingsError,
    SpecMismatchError,
    StageError,
    UnreachableStoreError,
    UnsafeShardError,
)
from cache.spec import Spec
from cache.store import FeatureStore

__all__ = [
    "CacheError",
    "CorruptShardError",
    "FeatureStore",
    "IncompleteStoreError",
    "MissingImageError",
    "SettingsError",
    "Spec",
    "SpecMismatchError",
    "StageError",
    "UnreachableStoreError",
    "UnsafeShardError",
    "VerifyReport",
]
