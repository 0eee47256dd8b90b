"""Writes a shard file, and checks its structure before its content is trusted.

A shard is an HDF5 file whose root holds exactly `features`, `image_id` and `row_xxh3`, all
contiguous and unfiltered, so that `features` can be memory-mapped at its file offset. Links,
external files and filters of a received file are refused before HDF5 follows them.

Letters: N rows, P patches, D width of the vision tower.
"""

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from .errors import (
    REMEDY,
    CorruptShardError,
    IncompleteStoreError,
    SpecMismatchError,
    UnsafeShardError,
)
from .files.atomic import check_ordinary, write_bytes
from .files.foreign import reading_foreign_file
from .files.object_headers import find_tree
from .files.sparse import SparseFile
from .spec import MAX_JSON_BYTES, Spec, check_same_spec
from .texts import first_few, one_line

ALIGNMENT = 4096
"""The file offset of the features is a multiple of this: a page of memory, in bytes."""

USUAL_OFFSET = 3 * ALIGNMENT
"""Where features start in the files of `write_shard`: after superblock, root group and spec."""

LIBRARY_VERSIONS = ("v110", "v110")
"""Lower and upper bound of the file format, so that every HDF5 library writes equal bytes."""

DATASETS = {
    b"features": (h5py.h5t.IEEE_F16LE, 3),
    b"image_id": (h5py.h5t.STD_I64LE, 1),
    b"row_xxh3": (h5py.h5t.STD_U64LE, 1),
}
"""Type and number of dimensions of each dataset."""


@dataclass(frozen=True)
class Shard:
    """The structure of a shard that passed the checks; all but its features."""

    path: Path
    offset: int
    """Bytes from the start of the file to the first feature."""
    shape: tuple[int, int, int]
    """N, P, D."""
    image_ids: NDArray[np.int64]
    row_xxh3: NDArray[np.uint64]


def hash_rows(rows: NDArray[Any] | Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """Return xxh3_64 of the bytes of each array, or entry of the first dimension: uint64 [N]."""
    hashes = (xxhash.xxh3_64_intdigest(row.data) for row in rows)
    return np.fromiter(hashes, dtype="<u8", count=len(rows))


def write_shard(
    path: Path,
    spec: Spec,
    image_ids: NDArray[np.int64],
    features_NPD: NDArray[np.float16],
    row_xxh3: NDArray[np.uint64] | None = None,
) -> None:
    """Write a shard, whole or not at all. The arguments are those of `shard_bytes`."""
    write_bytes(path, *shard_bytes(spec, image_ids, features_NPD, row_xxh3))


def shard_bytes(
    spec: Spec,
    image_ids: NDArray[np.int64],
    features_NPD: NDArray[np.float16],
    row_xxh3: NDArray[np.uint64] | None = None,
) -> list[bytes | memoryview]:
    """Return the bytes of a shard in consecutive pieces. Equal content gives equal bytes.

    One of the pieces is the array of features itself, not a copy: a shard can have gigabytes.

    Args:
        spec: Of the features.
        image_ids: [N], ascending.
        features_NPD: float16 [N, P, D], C-contiguous.
        row_xxh3: `hash_rows(features_NPD)`; computed when not given.
    """
    features = features_NPD.astype("<f2", copy=False)
    skeleton = SparseFile()
    with h5py.File(
        "shard",
        "w",
        driver="fileobj",
        fileobj=skeleton,
        libver=LIBRARY_VERSIONS,
        track_order=False,
        # Aligns datasets of any size, also a last shard of one small row.
        alignment_threshold=1,
        alignment_interval=ALIGNMENT,
    ) as file:
        dataset = file.create_dataset("features", features.shape, "<f2", track_times=False)
        if features.size:
            # Writing one value makes HDF5 allocate the dataset; the features follow below.
            dataset[0, 0, 0] = 0
        start = dataset.id.get_offset() or 0
        for name, values in (
            ("image_id", image_ids.astype("<i8", copy=False)),
            ("row_xxh3", hash_rows(features_NPD) if row_xxh3 is None else row_xxh3),
        ):
            file.create_dataset(name, data=values, track_times=False)
        for name, text in _attributes(spec).items():
            utf8 = h5py.string_dtype("utf-8", len(text))
            file.attrs.create(name, np.array(text, dtype=utf8), dtype=utf8)
    head, tail = skeleton.between(0, start), skeleton.between(start + features.nbytes)
    return [head, features.reshape(-1).view(np.uint8).data, tail]


def open_shard(path: Path, spec: Spec) -> Shard:
    """Check a shard's structure and read everything but its features.

    Raises:
        CorruptShardError: HDF5 cannot read it, or its parts contradict each other.
        UnsafeShardError: Anything but three plain contiguous datasets.
        SpecMismatchError: Another encoder wrote it.
        OSError: The system could not read it; names the file.
    """

    def refuse(detail: str) -> CorruptShardError:
        return CorruptShardError(f"{path}: HDF5 cannot read it ({detail}). {REMEDY}")

    check_ordinary(path, refuse)
    with reading_foreign_file(refuse, path):
        # HDF5 overflows the stack on a damaged tree of the old group layout.
        if tree := find_tree(path):
            raise _unsafe(path, tree)
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
        # Readers need no lock, and some shared file systems refuse locks.
        access.set_file_locking(False, True)
        file = h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, access)
        try:
            return _read_checked(file, path, spec)
        finally:
            file.close()


def _read_checked(file: h5py.h5f.FileID, path: Path, spec: Spec) -> Shard:
    # h5py's low-level interface: a store of a thousand shards opens within a second.
    root = h5py.h5g.open(file, b"/")
    if file.get_create_plist().get_userblock():
        raise _unsafe(path, "it starts with a user block")
    if root.get_num_objs() != len(DATASETS) or set(root) != DATASETS.keys():
        names = one_line(first_few(name.decode(errors="replace") for name in root))
        raise _unsafe(path, f"its root holds {names}, wanted {sorted(DATASETS)}")
    _check_attributes(root, path, spec)
    num_bytes = path.stat().st_size
    features, image_id, row_xxh3 = (
        _checked_dataset(root, name, path, num_bytes) for name in DATASETS
    )
    if features.shape[1:] != (spec.patches, spec.width) or not (
        features.shape[:1] == image_id.shape == row_xxh3.shape
    ):
        raise CorruptShardError(
            f"{path}: features are {features.shape} beside {image_id.shape[0]} ids and "
            f"{row_xxh3.shape[0]} hashes, wanted {spec.patches} x {spec.width} for each. "
            f"{REMEDY}"
        )
    image_ids, hashes = _read(image_id, "<i8"), _read(row_xxh3, "<u8")
    # Not `np.diff`: differences of 2^63 and more overflow.
    if np.any(image_ids[1:] <= image_ids[:-1]):
        raise CorruptShardError(f"{path}: its image ids do not ascend. {REMEDY}")
    return Shard(path, features.get_offset() or 0, features.shape, image_ids, hashes)


def _read(dataset: h5py.h5d.DatasetID, dtype: str) -> NDArray[Any]:
    values = np.empty(dataset.shape, dtype)
    if values.size:
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def _checked_dataset(
    root: h5py.h5g.GroupID, name: bytes, path: Path, num_bytes: int
) -> h5py.h5d.DatasetID:
    text = name.decode()
    # Checked before it is followed: a link can lead into another file.
    if root.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise _unsafe(path, f"{text} is a link")
    if h5py.h5o.get_info(root, name).type != h5py.h5o.TYPE_DATASET:
        raise _unsafe(path, f"{text} is no dataset")
    dataset = h5py.h5d.open(root, name)
    properties = dataset.get_create_plist()
    if (
        properties.get_layout() != h5py.h5d.CONTIGUOUS
        or properties.get_external_count()
        or properties.get_nfilters()
    ):
        raise _unsafe(path, f"{text} is not contiguous, or external, virtual or filtered")
    kind, num_dimensions = DATASETS[name]
    if not dataset.get_type().equal(kind) or len(dataset.shape) != num_dimensions:
        raise _unsafe(path, f"{text} is {dataset.dtype.str} with {len(dataset.shape)} dimensions")
    if h5py.h5a.get_num_attrs(dataset):
        raise _unsafe(path, f"{text} has attributes")
    _check_extent(dataset, text, path, num_bytes)
    return dataset


def _check_extent(dataset: h5py.h5d.DatasetID, name: str, path: Path, num_bytes: int) -> None:
    """Refuse a dataset that is not entirely in the file, or not aligned."""
    wanted = math.prod(dataset.shape) * DATASETS[name.encode()][0].get_size()
    offset = dataset.get_offset()
    if wanted and (offset is None or offset + wanted > num_bytes):
        raise CorruptShardError(f"{path}: {name} reaches beyond the end of the file. {REMEDY}")
    if name == "features" and wanted and offset % ALIGNMENT:
        raise _unsafe(path, f"features start at byte {offset}, wanted a multiple of {ALIGNMENT}")


def _check_attributes(root: h5py.h5g.GroupID, path: Path, spec: Spec) -> None:
    wanted = _attributes(spec)
    if h5py.h5a.get_num_attrs(root) != len(wanted):
        raise _unsafe(path, f"its root has not exactly the attributes {sorted(wanted)}")
    found = {name: _read_text(root, name, path) for name in wanted}
    if found["fingerprint"] != wanted["fingerprint"]:
        # Names the fields that differ, if the shard's own spec can be read.
        with contextlib.suppress(IncompleteStoreError):
            check_same_spec(Spec.from_json(found["spec"], f"{path}: spec"), spec, str(path))
    for name in sorted(wanted):
        if found[name] != wanted[name]:
            raise SpecMismatchError(
                f"{path}: {name} is {one_line(found[name])}, the store has "
                f"{one_line(wanted[name])}. Another encoder wrote this shard: delete it and run "
                f"the extract stage."
            )


def _read_text(root: h5py.h5g.GroupID, name: str, path: Path) -> bytes:
    if not h5py.h5a.exists(root, name.encode()):
        raise _unsafe(path, f"its root lacks the attribute {name}")
    attribute = h5py.h5a.open(root, name.encode())
    kind = attribute.get_type()
    if (
        not isinstance(kind, h5py.h5t.TypeStringID)
        or kind.is_variable_str()
        or kind.get_size() > MAX_JSON_BYTES
        or attribute.get_space().get_simple_extent_type() != h5py.h5s.SCALAR
    ):
        raise _unsafe(path, f"attribute {name} is not one text of fixed length")
    value = np.empty((), f"S{kind.get_size()}")
    attribute.read(value, mtype=kind)
    return bytes(value[()])


@functools.lru_cache
def _attributes(spec: Spec) -> dict[str, bytes]:
    return {
        "format": spec.format.encode(),
        "fingerprint": spec.fingerprint.encode(),
        "spec": spec.to_json(),
    }


def _unsafe(path: Path, detail: str) -> UnsafeShardError:
    return UnsafeShardError(f"{path}: {detail}. No writer of this format makes that: delete it.")
