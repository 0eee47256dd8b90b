"""A probe of what the encoder does: its features of eight fixed images, kept with a store.

Libraries change how they decode, resize and multiply without changing the spec. Before new
shards are added to old ones, the encoder must give these features again.

Letters: B the eight images, S side of the input in pixels, P patches, D width of the tower.
"""

import json
import math
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from cache.errors import CorruptShardError, IncompleteStoreError, SpecMismatchError
from cache.files.atomic import canonical_json, path_in_errors
from cache.files.foreign import reading_foreign_file
from cache.spec import Spec
from pipeline.encoding.encoder import Encoder
from pipeline.encoding.versions import library_versions
from pipeline.images.decode import DecodeError, Interpolation, Resize, decode_rgb
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
"""Each passes through another part of the decoder; never change one, kept probes depend on it."""

FP32_TOLERANCE = 2e-3
"""Largest relative L2 difference of an image's features between two runs in fp32.

Measured on the demo's tower and on random ViT-B/32 and ViT-L/14: other batches, threads and
kernels give 5e-5, products rounded to TF32 5e-4; a change of preprocessing 8e-2 in the image that
it hits hardest (bilinear for bicubic), GELU for QuickGELU 8e-3.
"""

BF16_TOLERANCE = 2e-2
"""The same in bf16.

Measured likewise: other batches, threads and kernels give 1.1e-2 at 24 blocks and 8e-3 at 12; a
change of preprocessing 8e-2 or more. The other activation (1.3e-2 to 2e-2) is not separable; the
spec names it, and `pipeline.encoding.encoder` checks it against the weights.
"""

TOLERANCES = {"fp32": FP32_TOLERANCE, "bf16": BF16_TOLERANCE}

MAX_HEADER_BYTES = 8192
"""A header as `probe_bytes` makes it has some 400."""

_VERSION = re.compile("[A-Za-z0-9_.+!-]{1,40}")
"""A library's name, or a version. Error texts quote both, so that they must be short."""

_ANEW = (
    "remove .work/shards, data/features and dvc.lock, which brings them back, so that all images "
    "are encoded anew"
)


@dataclass(frozen=True)
class Probe:
    """What an encoder made of the eight images, and with which libraries."""

    features: NDArray[np.float16]
    """[B, P, D], in the order of `NAMES`."""
    versions: dict[str, str]
    """Library to version."""


def probe_pixels(spec: Spec) -> Tensor:
    """Decode the eight images as the images of a store are: uint8 [B, S, S, 3].

    Raises:
        StageError: An image that cannot be decoded any more.
    """
    resize, interpolation = cast(Resize, spec.resize), cast(Interpolation, spec.interpolation)
    pixels = []
    for name in NAMES:
        data = (FOLDER / name).read_bytes()
        try:
            pixels.append(decode_rgb(data, spec.image_size, resize, interpolation))
        except DecodeError as error:
            raise StageError(
                f"probe: {FOLDER / name} cannot be decoded: {error}. Check that it is the file of "
                f"the repository, and that Pillow {version('pillow')} was built with its format."
            ) from None
    return torch.from_numpy(np.stack(pixels))


def take_probe(encoder: Encoder) -> NDArray[np.float16]:
    """Encode the eight images in one batch, whatever the spec's batch size: [B, P, D]."""
    return encoder.encode(probe_pixels(encoder.spec))


def probe_bytes(features_BPD: NDArray[np.float16], spec: Spec) -> bytes:
    """Return the bytes of a probe's file. Equal content gives equal bytes.

    Args:
        features_BPD: As `take_probe` returns them.
        spec: Of the features.
    """
    features = np.ascontiguousarray(features_BPD, dtype="<f2")
    told = {
        "fingerprint": spec.fingerprint,
        "versions": library_versions(),
        "xxh3": xxhash.xxh3_64_hexdigest(features.data),
    }
    # One key, because safetensors writes several in an order that differs in each process.
    return save({"features": features}, {"probe": canonical_json(told).decode()})


def read_probe(path: Path, spec: Spec) -> Probe:
    """Read a probe back; no more of a file is read than a probe of this spec has bytes.

    Raises:
        IncompleteStoreError: There is no such file.
        SpecMismatchError: Of another encoder.
        CorruptShardError: Not a probe, or not the bytes that were written.
    """
    if not path.is_file():
        raise IncompleteStoreError(
            f"{path}: no such file, wanted the probe of a store. Run `dvc pull`, or {_ANEW}."
        )
    shape = (len(NAMES), spec.patches, spec.width)
    num_bytes = math.prod(shape) * 2
    # By hand, as the safetensors format says: its own reader takes headers of 100 MB.
    with path_in_errors(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, MAX_HEADER_BYTES))
        # One more than wanted, to see whether there are more. Python sets aside what it is asked
        # for, and a spec can ask for gigabytes.
        data = file.read(min(num_bytes, path.stat().st_size) + 1)
    told, tensors = _parse(text, path)
    if told["fingerprint"] != spec.fingerprint:
        raise SpecMismatchError(
            f"{path}: fingerprint is {told['fingerprint']}, wanted {spec.fingerprint}. Use the "
            f"probe of the same encoder and settings."
        )
    wanted = {"dtype": "F16", "shape": list(shape), "data_offsets": [0, num_bytes]}
    if tensors != {"features": wanted}:
        raise _corrupt(path, f"its tensors are not one float16 'features' of shape {shape}")
    if len(data) != num_bytes or xxhash.xxh3_64_hexdigest(data) != told["xxh3"]:
        raise _corrupt(path, f"its features are not the {num_bytes} bytes that were written")
    features = np.frombuffer(data, "<f2").reshape(shape)
    if not np.isfinite(features).all():
        raise _corrupt(path, "its features are not finite")
    return Probe(features, told["versions"])


def check_probe(encoder: Encoder, kept: Probe) -> None:
    """Refuse an encoder that does not give a kept probe again.

    Args:
        encoder: Of the same spec as the probe.
        kept: As `read_probe` returns it.

    Raises:
        StageError: Names the images that differ, by how much, and the libraries that changed.
    """
    tolerance = TOLERANCES[encoder.spec.precision]
    differences = relative_differences(take_probe(encoder), kept.features)
    # Not `>`: NaN differs too.
    differing = [
        f"{name} by {difference:.2g}"
        for name, difference in zip(NAMES, differences.tolist(), strict=True)
        if not difference <= tolerance
    ]
    if differing:
        raise StageError(
            f"probe: the encoder gives {len(differing)} of {len(NAMES)} images other features than "
            f"those kept with the store: {', '.join(differing)} (relative L2, wanted at most "
            f"{tolerance:g} in {encoder.spec.precision}). {_changes(kept.versions)} Or {_ANEW}."
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


def _changes(then: dict[str, str]) -> str:
    now = library_versions()
    changes = [
        f"{name} {then.get(name, 'absent')} then, {now.get(name, 'absent')} now"
        for name in sorted(then | now)
        if then.get(name) != now.get(name)
    ]
    if not changes:
        return (
            "The library versions are the same: go back to the code and the device of then, and "
            "to their settings of precision."
        )
    return f"What changed: {'; '.join(changes)}. Go back to the versions of then."


def _parse(text: bytes, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the metadata of a safetensors header tells, and the rest of the header."""

    def refuse(detail: str) -> CorruptShardError:
        return _corrupt(path, f"its header is not that of a probe ({detail})")

    with reading_foreign_file(refuse):
        tensors = json.loads(text)
        metadata = tensors.pop("__metadata__")
        told = json.loads(metadata["probe"])
        if not (
            metadata.keys() == {"probe"}
            and told.keys() == {"fingerprint", "versions", "xxh3"}
            and re.fullmatch("[0-9a-f]{64}", told["fingerprint"])
            and all(map(_VERSION.fullmatch, (*told["versions"], *told["versions"].values())))
        ):
            raise refuse("other fields")
        return told, tensors


def _corrupt(path: Path, reason: str) -> CorruptShardError:
    return CorruptShardError(f"{path}: {reason}. Run `dvc pull`, or {_ANEW}.")
