"""Reads `params.yaml` into frozen dataclasses, and refuses whatever does not fit them.

Owns the reading and the checking; each section's dataclass lives beside the code that uses it.
YAML 1.2 as DVC reads it, so that `5e-4` is a number here and there.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from cache.errors import SettingsError
from cache.files import naming

SECTIONS = (
    "seed",
    "data",
    "fetch",
    "encoder",
    "extract",
    "llm",
    "projector",
    "pretrain",
    "finetune",
    "evaluate",
    "checkpoints",
    "tracking",
)
"""Top-level keys of a params file, in the order in which the stages use them."""

Section = TypeVar("Section")


@dataclass(frozen=True)
class Params:
    """One params file, read but not yet checked beyond its top-level keys."""

    path: Path
    text: str
    """The file as it was read."""
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Params":
        """Read a params file.

        Raises:
            SettingsError: No such file, not YAML, or an unknown top-level key.
        """
        try:
            with naming(path):
                text = path.read_bytes().decode()
            values = YAML(typ="safe", pure=True).load(text)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
            # Not of a failing disk, which says nothing about the settings.
            raise SettingsError(
                f"{path}: no settings file that can be read. Run in a folder that has one, "
                f"or name one with --params."
            ) from None
        except (YAMLError, ValueError, RecursionError) as error:
            detail = " ".join(str(error).split())
            raise SettingsError(f"{path}: not a YAML file: {detail}") from None
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: wanted sections, found {type(values).__name__}.")
        _check_keys(values, SECTIONS, required=(), where=str(path))
        return cls(path, text, values)

    def section(self, name: str, cls: type[Section]) -> Section:
        """Check one section against its dataclass and build it.

        Raises:
            SettingsError: Section or key missing, unknown key, wrong type, or a value that the
                dataclass itself refuses. Names the key, the file and what is allowed.
        """
        self._require(name)
        return typing.cast(Section, _build(self.values[name], cls, name, self.path))

    def seed(self) -> int:
        """Return the seed of all random choices."""
        self._require("seed")
        seed = typing.cast(int, _build(self.values["seed"], int, "seed", self.path))
        if seed < 0:
            raise SettingsError(f"{self.path}: seed is {seed}, wanted 0 or more.")
        return seed

    def _require(self, name: str) -> None:
        if name not in self.values:
            raise SettingsError(
                f"{self.path}: section {name!r} is missing. Found: {', '.join(self.values)}."
            )


def _check_keys(
    values: dict[str, Any], allowed: tuple[str, ...], required: tuple[str, ...], where: str
) -> None:
    unknown = [str(key) for key in values if key not in allowed]
    if unknown:
        raise SettingsError(
            f"{where}: unknown key {', '.join(unknown)}. Allowed: {', '.join(allowed)}."
        )
    missing = [key for key in required if key not in values]
    if missing:
        raise SettingsError(
            f"{where}: missing key {', '.join(missing)}. Wanted: {', '.join(required)}."
        )


def _build(value: Any, wanted: Any, key: str, path: Path) -> Any:
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return _build_dataclass(value, wanted, key, path)
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        if value not in arguments or type(value) not in map(type, arguments):
            raise _wrong(path, key, f"one of {', '.join(map(str, arguments))}", value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(path, key, "a list", value)
        return tuple(_build(v, arguments[0], f"{key}[{i}]", path) for i, v in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (wanted,) = (a for a in arguments if a is not type(None))
        return _build(value, wanted, key, path)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted:
        raise _wrong(path, key, wanted.__name__, value)
    return value


def _build_dataclass(value: Any, cls: type, key: str, path: Path) -> Any:
    if not isinstance(value, dict):
        raise _wrong(path, key, "a section of keys", value)
    fields = dataclasses.fields(cls)
    required = tuple(f.name for f in fields if f.default is dataclasses.MISSING)
    _check_keys(value, tuple(f.name for f in fields), required, f"{path}: {key}")
    hints = typing.get_type_hints(cls)
    built = {name: _build(value[name], hints[name], f"{key}.{name}", path) for name in value}
    try:
        return cls(**built)
    except ValueError as error:
        raise SettingsError(f"{path}: {key}: {error}") from None


def _wrong(path: Path, key: str, wanted: str, found: object) -> SettingsError:
    return SettingsError(f"{path}: {key} is {found!r} ({type(found).__name__}), wanted {wanted}.")
