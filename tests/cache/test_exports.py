import inspect
import subprocess
import sys

import pytest

import cache
from cache import FeatureStore, VerifyReport, write_store

STABLE = {
    "PatchcacheError",
    "CorruptShardError",
    "FeatureStore",
    "IncompleteStoreError",
    "MissingImageError",
    "SpecMismatchError",
    "UnsafeShardError",
    "VerifyReport",
    "write_store",
}


def test_the_stable_names_are_exported():
    assert set(cache.__all__) >= STABLE
    assert sorted(cache.__all__) == cache.__all__
    assert all(hasattr(cache, name) for name in cache.__all__)


@pytest.mark.parametrize("name", sorted(n for n in cache.__all__ if n.endswith("Error")))
def test_every_error_is_of_the_one_tree(name):
    assert issubclass(getattr(cache, name), cache.PatchcacheError)


def test_a_missing_image_is_a_key_error():
    assert issubclass(cache.MissingImageError, KeyError)


def test_the_stable_signatures_hold():
    def parameters(function):
        found = inspect.signature(function).parameters
        # More is allowed by keyword.
        return {n: p.default for n, p in found.items() if p.kind is not p.KEYWORD_ONLY}

    empty = inspect.Parameter.empty
    assert parameters(FeatureStore) == {"root": empty}
    assert parameters(FeatureStore.gather) == {"self": empty, "image_ids": empty, "out": None}
    assert parameters(FeatureStore.verify) == {"self": empty, "deep": True}
    assert parameters(write_store) == {"folder": empty, "spec": empty, "rows": empty}
    assert all(hasattr(FeatureStore, name) for name in ("fingerprint", "image_ids", "__len__"))
    assert list(parameters(VerifyReport))[:2] == ["ok", "problems"]


def test_importing_the_cache_imports_neither_torch_nor_the_other_packages():
    code = (
        "import sys, cache\n"
        "heavy = {'torch', 'open_clip', 'transformers', 'pipeline', 'train', 'eval', 'demo'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
