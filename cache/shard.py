"""One shard file: writing it, and checking it before anything in it is trusted.

A shard is an HDF5 file whose root holds exactly `features`, `image_id` and `row_xxh3`, all
contiguous and unfiltered, so that `features` can be memory-mapped at its file offset. HDF5 can
make a reader follow links, external files and filters; none of that is followed here.

Letters: N rows, P patches, D width of the vision tower.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from cache.errors import (
    CacheError,
    CorruptShardError,
    IncompleteStoreError,
    SpecMismatchError,
    UnsafeShardError,
)
from cache.files import replacing
from cache.spec import Spec, check_same_spec

ALIGNMENT = 4096
"""File offset of the features is a multiple of this many bytes: a page of memory."""

LIBRARY_VERSIONS = ("v110", "v110")
"""Both bounds of the HDF5 file format, so that any library writes the same bytes."""

DATASETS = {"features": ("<f2", 3), "image_id": ("<i8", 1), "row_xxh3": ("<u8", 1)}
"""Type and number of dimensions of each dataset."""

ATTRIBUTES = frozenset({"format", "fingerprint", "spec"})


@dataclass(frozen=True)
class Shard:
    """A checked shard: where its features lie, and what it says about its rows."""

    path: Path
    offset: int
    """Bytes from the start of the file to the first feature."""
    shape: tuple[int, int, int]
    """N, P, D."""
    image_ids: NDArray[np.int64]
    row_xxh3: NDArray[np.uint64]

    def map(self) -> NDArray[np.float16]:
        """Memory-map the features: float16 [N, P, D], read-only, nothing read yet."""
        return np.memmap(self.path, dtype="<f2", mode="r", offset=self.offset, shape=self.shape)


def hash_rows(features_NPD: NDArray[np.float16]) -> NDArray[np.uint64]:
    """Return xxh3_64 of each row's bytes: uint64 [N]."""
    hashes = (xxhash.xxh3_64_intdigest(row.data) for row in features_NPD)
    return np.fromiter(hashes, dtype="<u8", count=len(features_NPD))


def write_shard(
    path: Path, spec: Spec, image_ids: NDArray[np.int64], features_NPD: NDArray[np.float16]
) -> None:
    """Write a shard, whole or not at all. Equal content gives equal bytes.

    Args:
        path: Where it appears.
        spec: Of the features.
        image_ids: [N], ascending.
        features_NPD: float16 [N, P, D], C-contiguous.
    """
    contents = {
        "features": features_NPD.astype("<f2", copy=False),
        "image_id": image_ids.astype("<i8", copy=False),
        "row_xxh3": hash_rows(features_NPD),
    }
    with (
        replacing(path) as temporary,
        h5py.File(
            temporary,
            "w",
            libver=LIBRARY_VERSIONS,
            track_order=False,
            # Of any size: a last shard of one small row is aligned too.
            alignment_threshold=1,
            alignment_interval=ALIGNMENT,
        ) as file,
    ):
        for name, values in contents.items():
            file.create_dataset(name, data=values, track_times=False)
        for name, text in _attributes(spec).items():
            utf8 = h5py.string_dtype("utf-8", len(text))
            file.attrs.create(name, np.array(text, dtype=utf8), dtype=utf8)


def open_shard(path: Path, spec: Spec) -> Shard:
    """Check a shard's structure and read everything but its features.

    Raises:
        CorruptShardError: HDF5 cannot read it, or its parts do not fit together.
        UnsafeShardError: Anything but three plain contiguous datasets.
        SpecMismatchError: Another encoder wrote it.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _read_checked(file, path, spec)
    except CacheError:
        raise
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, MemoryError) as error:
        # What h5py and numpy raise on damaged files.
        detail = " ".join(str(error).split())
        raise CorruptShardError(
            f"{path}: HDF5 cannot read it ({detail}). Fetch it again, or run "
            f"`python -m cache.verify {path.parent} --repair` and the extract stage."
        ) from None


def _read_checked(file: h5py.File, path: Path, spec: Spec) -> Shard:
    if file.userblock_size or set(file) != DATASETS.keys():
        raise _unsafe(path, f"its root holds {sorted(file)}, wanted {sorted(DATASETS)}")
    if set(file.attrs) != ATTRIBUTES:
        raise _unsafe(path, f"its attributes are {sorted(file.attrs)}, wanted {sorted(ATTRIBUTES)}")
    for name in DATASETS:
        _check_dataset(file, name, path)
    _check_spec(file, path, spec)
    features = file["features"]
    image_ids, row_xxh3 = file["image_id"][:], file["row_xxh3"][:]
    wanted = (len(image_ids), spec.patches, spec.width)
    if features.shape != wanted or len(row_xxh3) != len(image_ids):
        raise CorruptShardError(
            f"{path}: features are {features.shape} beside {len(image_ids)} ids and "
            f"{len(row_xxh3)} hashes, wanted {wanted}. Fetch it again."
        )
    return Shard(path, features.id.get_offset(), features.shape, image_ids, row_xxh3)


def _check_dataset(file: h5py.File, name: str, path: Path) -> None:
    # The link is looked at before it is followed: it may lead into another file.
    if type(file.get(name, getlink=True)) is not h5py.HardLink:
        raise _unsafe(path, f"{name} is a link")
    if file.get(name, getclass=True) is not h5py.Dataset:
        raise _unsafe(path, f"{name} is no dataset")
    dataset = file[name]
    dtype, num_dimensions = DATASETS[name]
    properties = dataset.id.get_create_plist()
    if (
        properties.get_layout() != h5py.h5d.CONTIGUOUS
        or properties.get_external_count()
        or properties.get_nfilters()
    ):
        raise _unsafe(path, f"{name} is not contiguous, or external, virtual or filtered")
    if dataset.dtype.str != dtype or dataset.ndim != num_dimensions:
        raise _unsafe(path, f"{name} is {dataset.dtype.str} with {dataset.ndim} dimensions")
    # Not `dataset.nbytes`, which wraps around at 2**64.
    offset, num_bytes = dataset.id.get_offset(), math.prod(dataset.shape) * dataset.dtype.itemsize
    if offset is None or offset + num_bytes > path.stat().st_size:
        raise CorruptShardError(f"{path}: {name} reaches beyond the end of the file.")
    if name == "features" and offset % ALIGNMENT:
        raise _unsafe(path, f"features start at byte {offset}, wanted a multiple of {ALIGNMENT}")


def _check_spec(file: h5py.File, path: Path, spec: Spec) -> None:
    for name in ATTRIBUTES:
        attribute = file.attrs.get_id(name)
        kind = attribute.get_type()
        if (
            not isinstance(kind, h5py.h5t.TypeStringID)
            or kind.is_variable_str()
            or attribute.get_space().get_simple_extent_type() != h5py.h5s.SCALAR
        ):
            raise _unsafe(path, f"attribute {name} is not one text of fixed length")
    found = {name: bytes(file.attrs[name]) for name in ATTRIBUTES}
    wanted = _attributes(spec)
    if found["fingerprint"] != wanted["fingerprint"]:
        # Says which fields differ, where the shard's own spec can be read.
        with contextlib.suppress(IncompleteStoreError):
            check_same_spec(Spec.from_json(found["spec"], f"{path}: spec"), spec, str(path))
    for name in sorted(ATTRIBUTES):
        if found[name] != wanted[name]:
            raise SpecMismatchError(
                f"{path}: {name} is {found[name]!r}, the store has {wanted[name]!r}. "
                f"Another encoder wrote this shard: delete it and run the extract stage."
            )


def _attributes(spec: Spec) -> dict[str, bytes]:
    return {
        "format": spec.format.encode(),
        "fingerprint": spec.fingerprint.encode(),
        "spec": spec.to_json(),
    }


def _unsafe(path: Path, detail: str) -> UnsafeShardError:
    return UnsafeShardError(f"{path}: {detail}. No writer of this format makes that: delete it.")
