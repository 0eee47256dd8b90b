"""The spec of features: everything that decides their numbers, and its fingerprint.

Stores with equal fingerprints hold interchangeable features; features of different fingerprints
are never mixed.
"""

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import (
    REMEDY,
    FormatVersionError,
    IncompleteStoreError,
    InvalidFeaturesError,
    SpecMismatchError,
)
from .files.atomic import canonical_json, path_in_errors
from .files.foreign import reading_foreign_file
from .texts import first_few, one_line

FORMAT = "patchcache/1"
"""Version of the shard and index layout; a reader refuses any other."""

SPEC_FILE = "spec.json"

MAX_JSON_BYTES = 1 << 16
"""Most bytes of a spec's JSON that are read; it has about 700."""

MAX_WRITTEN_BYTES = 1 << 15
"""Most bytes of a spec's JSON that are written; an attribute of a shard holds fewer than 65,536."""

MAX_FLOAT = sys.float_info.max

MAX_ROW_VALUES = 1 << 30
"""Most values of one image: far more than any encoder gives, and few enough for 64-bit sums."""

COUNTS = ("image_size", "batch_size", "patches", "width")
"""Fields that are at least 1."""

UNSTATED = ("image_size", "batch_size")
"""Those of them that are 0 where `about` says everything."""

FLOAT16 = "float16"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything that decides the numbers of a feature store."""

    format: str
    model: str
    """open_clip architecture; `hf:` and a family; `timm:` and an architecture; of other features,
    any name."""
    weights_sha256: str
    """Over names, types, shapes and values of the vision tower's tensors, not over a file; of other
    features, any hash of the weights."""
    activation: str
    layer: int
    """Block whose output is stored, counted from the end: -2 is the second to last."""
    tokens: str
    """"patch": class token and registers dropped, rows of the picture from the top left; "grid":
    places of a convolutional network's last map, in the same order."""
    normalized: bool
    """Whether the tower's final norm was applied."""
    image_size: int
    resize: str
    crop: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    batch_size: int
    dtype: str
    patches: int
    width: int
    preprocess_version: int
    about: str = ""
    """What made the features, in words, where the other fields cannot say it; else empty."""

    @classmethod
    def external(
        cls,
        *,
        model: str,
        about: str,
        patches: int,
        width: int,
        weights_sha256: str = "",
        tokens: str = "grid",
        **fields: Any,
    ) -> "Spec":
        """Describe features that this project did not make, such as those of a CNN.

        Whatever decides the numbers must be in the spec, so that other numbers have another
        fingerprint: the network and its layer, the weights, size and scale of the picture, and a
        version of the code.

        Args:
            model: Name of the network.
            about: In words, what `model` and `weights_sha256` do not say.
            patches: P, rows of an image's features.
            width: D, values of a patch.
            weights_sha256: Hash of the weights, if there are any.
            tokens: What a row is. "grid": a place of a grid over the picture, row by row from the
                top left.
            fields: Other fields of a spec; those that are not given are empty, or 0.

        Raises:
            InvalidFeaturesError: A value that no spec has; names the field.
        """
        if unknown := fields.keys() - UNSTATED_FIELDS.keys():
            raise InvalidFeaturesError(
                f"spec: no field {first_few(sorted(unknown))} can be given. Wanted some of "
                f"{', '.join(UNSTATED_FIELDS)}."
            )
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        spec = cls(
            **UNSTATED_FIELDS | values,
            format=FORMAT,
            dtype=FLOAT16,
            model=model,
            about=about,
            patches=patches,
            width=width,
            weights_sha256=weights_sha256,
            tokens=tokens,
        )
        if not about:
            raise InvalidFeaturesError(
                "spec: about is empty. Say in it what decides the numbers: layer, preprocessing, "
                "version of the code."
            )
        spec.check()
        return spec

    def check(self) -> None:
        """Refuse a spec that cannot be read back.

        Raises:
            InvalidFeaturesError: Names the fields.
        """
        values = self.fields()
        wrong = _wrong_fields(values)
        wrong += [n for n, v in (("format", FORMAT), ("dtype", FLOAT16)) if values[n] != v]
        wrong += [name for name in ("mean", "std") if isinstance(values[name], list)]
        if wrong:
            details = "; ".join(f"{name} is {values[name]!r}" for name in wrong)
            raise InvalidFeaturesError(
                f"spec: no spec has that: {one_line(details)}. Wanted format {FORMAT!r}, dtype "
                f"{FLOAT16!r}, plain texts and numbers, and sizes of 1 or more."
            )
        if len(self.to_json()) > MAX_WRITTEN_BYTES:
            raise InvalidFeaturesError(
                f"spec: takes {len(self.to_json())} bytes as JSON, wanted at most "
                f"{MAX_WRITTEN_BYTES}. Say less in about."
            )

    def fields(self) -> dict[str, Any]:
        """Return all fields by name, without an empty `about`: what the fingerprint is taken of."""
        values = dataclasses.asdict(self)
        return values if self.about else {n: v for n, v in values.items() if n != "about"}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of all fields, in hexadecimal."""
        return hashlib.sha256(canonical_json(self.fields())).hexdigest()

    def to_json(self) -> bytes:
        """Return the canonical JSON of all fields and the fingerprint: the bytes of spec.json."""
        return canonical_json(self.fields() | {"fingerprint": self.fingerprint})

    @classmethod
    def read(cls, path: Path) -> "Spec":
        """Read a store's spec.json; the errors are those of `from_json`."""
        with path_in_errors(path), path.open("rb") as file:
            return cls.from_json(file.read(MAX_JSON_BYTES), str(path))

    @classmethod
    def from_json(cls, text: bytes, where: str) -> "Spec":
        """Read a spec back.

        Args:
            text: As `to_json` writes it.
            where: The file it comes from, for the error text.

        Raises:
            IncompleteStoreError: Not the JSON of a spec.
            SpecMismatchError: Another format version, or a fingerprint that does not match.
        """

        def refuse(detail: str) -> IncompleteStoreError:
            return IncompleteStoreError(f"{where}: not the JSON of a spec ({detail}). {REMEDY}")

        with reading_foreign_file(refuse):
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError(f"{type(values).__name__} and no object")
            return cls._from_values(values, where)

    @classmethod
    def _from_values(cls, values: dict[str, Any], where: str) -> "Spec":
        found = values.get("format")
        fingerprint = values.pop("fingerprint", None)
        if found != FORMAT:
            # A matching fingerprint means an intact file of another version, not a damaged one.
            is_intact = hashlib.sha256(canonical_json(values)).hexdigest() == fingerprint
            raise (FormatVersionError if is_intact else SpecMismatchError)(
                f"{where}: format is {one_line(repr(found))}, wanted {FORMAT!r}. "
                f"Read it with the version of patchcache that wrote it."
            )
        names = {field.name for field in dataclasses.fields(cls)} - ({"about"} - values.keys())
        if values.keys() != names:
            differing = one_line(sorted(values.keys() ^ names))
            raise IncompleteStoreError(
                f"{where}: fields that differ from a spec's: {differing}. {REMEDY}"
            )
        if wrong := _wrong_fields(values):
            # A forged file can have a matching fingerprint.
            details = "; ".join(f"{name} is {values[name]!r}" for name in wrong)
            raise IncompleteStoreError(f"{where}: no spec has that: {one_line(details)}. {REMEDY}")
        values |= {name: tuple(values[name]) for name in ("mean", "std")}
        spec = cls(**values)
        if spec.fingerprint != fingerprint:
            raise SpecMismatchError(
                f"{where}: fingerprint is {one_line(repr(fingerprint))}, its fields give "
                f"{spec.fingerprint!r}. It was edited or damaged. {REMEDY}"
            )
        return spec


UNSTATED_FIELDS: dict[str, Any] = {
    "activation": "",
    "layer": -1,
    "normalized": False,
    "image_size": 0,
    "resize": "",
    "crop": "",
    "interpolation": "",
    "mean": (),
    "std": (),
    "precision": "",
    "batch_size": 0,
    "preprocess_version": 0,
}
"""Fields that features of other networks need not have."""


def _wrong_fields(values: dict[str, Any]) -> list[str]:
    """Return the names of the fields whose values no spec holds."""
    fields = {field.name: field for field in dataclasses.fields(Spec)}
    is_external = bool(values.get("about"))
    wrong = [n for n in fields if n in values and not _is_valid(fields[n], values[n], is_external)]
    if not wrong and values["patches"] * values["width"] > MAX_ROW_VALUES:
        wrong = ["patches", "width"]
    return wrong


def _is_valid(field: dataclasses.Field[Any], value: Any, is_external: bool) -> bool:
    if field.name in ("mean", "std"):
        return isinstance(value, list | tuple) and all(
            type(number) in (int, float) and abs(number) <= MAX_FLOAT for number in value
        )
    least = 0 if is_external and field.name in UNSTATED else 1
    return type(value) is field.type and not (field.name in COUNTS and value < least)


def check_same_spec(found: Spec, wanted: Spec, where: str) -> None:
    """Refuse features that another encoder made.

    Raises:
        SpecMismatchError: Names every field that differs, with both values.
    """
    theirs, ours = dataclasses.asdict(found), dataclasses.asdict(wanted)
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        details = "; ".join(f"{n} is {theirs[n]!r}, wanted {ours[n]!r}" for n in differing)
        raise SpecMismatchError(f"{where}: {details}. Use features of one encoder only.")
