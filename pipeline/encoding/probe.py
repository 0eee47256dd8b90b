"""The probe of an encoder: its features of eight fixed images, stored with its features.

A new version of a library can decode, resize or multiply differently without changing the spec.
Before new shards are added to old ones, the encoder must reproduce its probe.

Letters: B the eight images, S side of the input in pixels, P patches, D width of the tower.
"""

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from cache.errors import CorruptShardError, IncompleteStoreError, SpecMismatchError
from cache.files.atomic import canonical_json, path_in_errors
from cache.files.foreign import reading_foreign_file
from cache.spec import Spec
from pipeline.encoding.encoder import Encoder
from pipeline.encoding.versions import library_versions
from pipeline.images.decode import DecodeError, decode_for
from workspace.errors import StageError

FOLDER = Path(__file__).with_name("probe_images")

NAMES = (
    "baseline.jpg",
    "progressive.jpg",
    "gray.jpg",
    "cmyk.jpg",
    "orientation.jpg",
    "small.jpg",
    "palette.png",
    "gray16.png",
)
"""Each takes another path through the decoder. Never change one: stored probes depend on it."""

TOLERANCES = {"fp32": 2e-3, "bf16": 2e-2}
"""Largest relative L2 difference of an image's features between two runs, by precision.

Measured on the demo's tower and on random ViT-B/32 and ViT-L/14, in fp32 and in bf16: other batch
sizes, threads and kernels give 5e-5 and 1.1e-2, TF32 products 5e-4 in fp32; another preprocessing
8e-2 in the most affected image (bilinear instead of bicubic); GELU instead of QuickGELU 8e-3 and
1.3e-2 to 2e-2. In bf16 the activation cannot be told apart; the spec names it, and
`pipeline.encoding.encoder` checks it against the weights.
"""

MAX_HEADER_BYTES = 8192
"""Limit of the file's header; that of `serialize_probe` has some 400 bytes."""

_VERSION = re.compile("[A-Za-z0-9_.+!-]{1,40}")
"""A library's name or version; short and on one line, because error texts quote both."""

_REENCODE = (
    "remove .work/shards, data/features and dvc.lock, which brings them back, so that all images "
    "are encoded anew"
)


@dataclass(frozen=True)
class Probe:
    """Features of the eight images, and the libraries that made them."""

    features: NDArray[np.float16]
    """[B, P, D], in the order of `NAMES`."""
    versions: dict[str, str]
    """Version of each library, by name."""


def probe_pixels(spec: Spec) -> Tensor:
    """Decode the eight images as those of a store are decoded: uint8 [B, S, S, 3].

    Raises:
        StageError: An image cannot be decoded.
    """
    pixels = []
    for name in NAMES:
        data = (FOLDER / name).read_bytes()
        try:
            pixels.append(decode_for(data, spec))
        except DecodeError as error:
            raise StageError(
                f"probe: {FOLDER / name} cannot be decoded: {error}. Check that it is the file of "
                f"the repository, and that Pillow {version('pillow')} was built with its format."
            ) from None
    return torch.from_numpy(np.stack(pixels))


def encode_probe_images(encoder: Encoder) -> NDArray[np.float16]:
    """Encode the eight images in one batch, whatever the spec's batch size: [B, P, D]."""
    return encoder.encode(probe_pixels(encoder.spec))


def serialize_probe(features_BPD: NDArray[np.float16], spec: Spec) -> bytes:
    """Return the bytes of a probe's file; equal content gives equal bytes.

    Args:
        features_BPD: As `encode_probe_images` returns them.
        spec: Spec of the features.
    """
    features = np.ascontiguousarray(features_BPD, dtype="<f2")
    metadata = {
        "fingerprint": spec.fingerprint,
        "versions": library_versions(spec.model),
        "xxh3": xxhash.xxh3_64_hexdigest(features.data),
    }
    # A single key: safetensors writes several in an order that differs between processes.
    return save({"features": features}, {"probe": canonical_json(metadata).decode()})


def read_probe(path: Path, spec: Spec) -> Probe:
    """Read a probe; no tensor is loaded before its shape and type are checked.

    Raises:
        IncompleteStoreError: The file is missing.
        SpecMismatchError: The probe is of another encoder.
        CorruptShardError: The file is no probe, or its bytes are not those that were written.
    """
    if not path.is_file():
        raise IncompleteStoreError(
            f"{path}: no such file, wanted the probe of a store. Run `dvc pull`, or {_REENCODE}."
        )

    def refuse(reason: str) -> CorruptShardError:
        return CorruptShardError(f"{path}: {reason}. Run `dvc pull`, or {_REENCODE}.")

    with path_in_errors(path), path.open("rb") as start:
        header_bytes = int.from_bytes(start.read(8), "little")
    # safetensors itself parses headers of 100 MB.
    if header_bytes > MAX_HEADER_BYTES:
        raise refuse(f"its header has {header_bytes} bytes, wanted at most {MAX_HEADER_BYTES}")
    shape = [len(NAMES), spec.patches, spec.width]
    with (
        reading_foreign_file(lambda why: refuse(f"it is no probe ({why})"), path),
        safe_open(path, "np") as file,
    ):
        metadata = _parse_metadata(file.metadata() or {})
        if metadata["fingerprint"] != spec.fingerprint:
            raise SpecMismatchError(
                f"{path}: fingerprint is {metadata['fingerprint']}, wanted {spec.fingerprint}. "
                f"Use the probe of the same encoder and settings."
            )
        tensor = file.get_slice("features")
        if len(file.keys()) != 1 or (tensor.get_dtype(), tensor.get_shape()) != ("F16", shape):
            raise refuse(f"its tensors are not one float16 'features' of shape {shape}")
        features = file.get_tensor("features")
    if xxhash.xxh3_64_hexdigest(features.data) != metadata["xxh3"]:
        raise refuse("its features are not those that were written")
    if not np.isfinite(features).all():
        raise refuse("its features are not finite")
    return Probe(features, metadata["versions"])


def _parse_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """Return the fields that `serialize_probe` wrote; raises anything if they are others."""
    fields = json.loads(metadata["probe"])
    if not (
        metadata.keys() == {"probe"}
        and fields.keys() == {"fingerprint", "versions", "xxh3"}
        and re.fullmatch("[0-9a-f]{64}", fields["fingerprint"])
        and all(map(_VERSION.fullmatch, (*fields["versions"], *fields["versions"].values())))
    ):
        raise ValueError("other fields in its header")
    return cast(dict[str, Any], fields)


def check_probe(encoder: Encoder, stored: Probe) -> None:
    """Refuse an encoder that does not reproduce a stored probe.

    Args:
        encoder: An encoder of the same spec.
        stored: The probe as `read_probe` returns it.

    Raises:
        StageError: Names the images that differ, by how much, and the libraries that changed.
    """
    tolerance = TOLERANCES[encoder.spec.precision]
    differences = relative_differences(encode_probe_images(encoder), stored.features)
    # Not `>`, which is False for NaN.
    differing = [
        f"{name} by {difference:.2g}"
        for name, difference in zip(NAMES, differences.tolist(), strict=True)
        if not difference <= tolerance
    ]
    if differing:
        raise StageError(
            f"probe: the encoder gives {len(differing)} of {len(NAMES)} images other features than "
            f"those kept with the store: {', '.join(differing)} (relative L2, wanted at most "
            f"{tolerance:g} in {encoder.spec.precision}). "
            f"{_version_changes(stored.versions, encoder.spec.model)} Or {_REENCODE}."
        )


def relative_differences(
    found_BPD: NDArray[np.float16], wanted_BPD: NDArray[np.float16]
) -> NDArray[np.float64]:
    """Return |found - wanted| / |wanted| of each image, over all its patches: [B]."""
    found = found_BPD.astype(np.float64).reshape(len(found_BPD), -1)
    wanted = wanted_BPD.astype(np.float64).reshape(len(wanted_BPD), -1)
    norms = np.maximum(np.linalg.norm(wanted, axis=1), np.finfo(np.float64).tiny)
    differences: NDArray[np.float64] = np.linalg.norm(found - wanted, axis=1) / norms
    return differences


def _version_changes(stored: dict[str, str], model: str) -> str:
    """Say in a sentence which library versions changed, and what to go back to."""
    current = library_versions(model)
    changes = [
        f"{name} {stored.get(name, 'absent')} then, {current.get(name, 'absent')} now"
        for name in sorted(stored | current)
        if stored.get(name) != current.get(name)
    ]
    if not changes:
        return (
            "The library versions are the same: go back to the former code, device and precision "
            "settings."
        )
    return f"What changed: {'; '.join(changes)}. Go back to the former versions."
