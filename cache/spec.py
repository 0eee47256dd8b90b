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

from .errors import REMEDY, FormatVersionError, IncompleteStoreError, SpecMismatchError
from .files.atomic import canonical_json, path_in_errors
from .files.foreign import reading_foreign_file
from .texts import one_line

FORMAT = "patchcache/1"
"""Version of the shard and index layout; a reader refuses any other."""

SPEC_FILE = "spec.json"

MAX_JSON_BYTES = 1 << 16
"""Most bytes of a spec's JSON that are read; it has about 700."""

MAX_FLOAT = sys.float_info.max

MAX_ROW_VALUES = 1 << 30
"""Most values of one image: far more than any encoder gives, and few enough for 64-bit sums."""

COUNTS = ("image_size", "batch_size", "patches", "width")
"""Fields that are at least 1."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything that decides the numbers of a feature store."""

    format: str
    model: str
    """open_clip architecture; `hf:` and a family, or `timm:` and an architecture."""
    weights_sha256: str
    """Over names, types, shapes and values of the vision tower's tensors, not over a file."""
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

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of all fields, in hexadecimal."""
        return hashlib.sha256(canonical_json(dataclasses.asdict(self))).hexdigest()

    def to_json(self) -> bytes:
        """Return the canonical JSON of all fields and the fingerprint: the bytes of spec.json."""
        return canonical_json(dataclasses.asdict(self) | {"fingerprint": self.fingerprint})

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
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            differing = one_line(sorted(values.keys() ^ names))
            raise IncompleteStoreError(
                f"{where}: fields that differ from a spec's: {differing}. {REMEDY}"
            )
        _check_types(values, where)
        values |= {name: tuple(values[name]) for name in ("mean", "std")}
        spec = cls(**values)
        if spec.fingerprint != fingerprint:
            raise SpecMismatchError(
                f"{where}: fingerprint is {one_line(repr(fingerprint))}, its fields give "
                f"{spec.fingerprint!r}. It was edited or damaged. {REMEDY}"
            )
        return spec


def _check_types(values: dict[str, Any], where: str) -> None:
    """Refuse values that no spec holds: a forged file can have a matching fingerprint."""
    wrong = [f.name for f in dataclasses.fields(Spec) if not _is_valid(f, values[f.name])]
    if not wrong and values["patches"] * values["width"] > MAX_ROW_VALUES:
        wrong = ["patches", "width"]
    if wrong:
        details = "; ".join(f"{name} is {values[name]!r}" for name in wrong)
        raise IncompleteStoreError(f"{where}: no spec has that: {one_line(details)}. {REMEDY}")


def _is_valid(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.name in ("mean", "std"):
        return isinstance(value, list) and all(
            type(number) in (int, float) and abs(number) <= MAX_FLOAT for number in value
        )
    return type(value) is field.type and not (field.name in COUNTS and value < 1)


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
