"""Reads `params.yaml` into frozen dataclasses, and refuses unknown keys and wrong types.

The dataclass of each section is defined beside the code that uses it. Files are YAML 1.2, as for
DVC, so that `5e-4` is a number.
"""

import dataclasses
import math
import reprlib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from cache.errors import SettingsError
from cache.files.atomic import check_ordinary, path_in_errors
from cache.files.foreign import reading_foreign_file
from cache.texts import one_line

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
    "controls",
    "evaluate",
    "checkpoints",
    "tracking",
)
"""Top-level keys of a params file, in the order in which the stages use them."""

MAX_BYTES = 1 << 16
"""Largest params file. The project's own have a tenth; more would take seconds to parse."""

MAX_VALUES = 10_000
"""Most values of a params file, with aliases expanded, which can multiply without bound."""

MAX_DEPTH = 32
"""Most levels of nesting."""

MAX_WHOLE_NUMBER = 1 << 53
"""Largest integer, exact in YAML, JSON and every number type it is converted to."""

MAX_TEXT = 4096
"""Most characters of a text: the longest path of Linux."""

MAX_SHOWN = 100
"""Most characters of a text, and bits of a number, that an error repeats."""

Section = TypeVar("Section")


@dataclass(frozen=True)
class Params:
    """A params file with checked top-level keys and unchecked sections."""

    path: Path
    text: str
    """Content of the file."""
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Params":
        """Read a params file.

        Raises:
            SettingsError: No such file, not YAML, too large, or an unknown top-level key.
            OSError: The system cannot read the file.
        """
        with reading_foreign_file(lambda why: SettingsError(f"{path}: not a YAML file: {why}")):
            text = _read_bytes(path).decode()
            values = parse_yaml(text, str(path))
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: wanted sections, found {type(values).__name__}.")
        _check_keys(values, SECTIONS, required=(), where=str(path))
        return cls(path, text, values)

    def section(self, name: str, cls: type[Section]) -> Section:
        """Check one section against its dataclass and build it.

        A section whose keys all have defaults may be absent.

        Raises:
            SettingsError: Section or key missing, unknown key, wrong type, or a value that the
                dataclass refuses. Names the key, the file and what is allowed.
        """
        if name not in self.values and not _required(cls):
            return cls()
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


def _read_bytes(path: Path) -> bytes:
    check_ordinary(path, lambda why: SettingsError(f"{path}: {why}."))
    try:
        with path_in_errors(path), path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise SettingsError(
            f"{path}: no such settings file. Run in a folder that has one, or name one with "
            f"--params."
        ) from None
    except IsADirectoryError:
        raise SettingsError(f"{path}: a folder, wanted a settings file.") from None
    if len(content) > MAX_BYTES:
        raise SettingsError(f"{path}: more than {MAX_BYTES} bytes: this is no settings file.")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML of bounded size.

    Args:
        text: The YAML.
        where: Name of its file, for the error text.

    Raises:
        SettingsError: Too many values or levels.
    """
    if not _is_bounded(text):
        raise SettingsError(
            f"{where}: wanted at most {MAX_VALUES} values, aliases written out, and {MAX_DEPTH} "
            f"levels: this is no settings file."
        )
    return YAML(typ="safe", pure=True).load(text)


def _is_bounded(text: str) -> bool:
    """Return whether YAML is within MAX_VALUES and MAX_DEPTH, without building the values."""
    sizes: dict[str | None, float] = {}
    anchors: list[str | None] = [None]
    counts: list[float] = [0]
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, CollectionStartEvent):
            # An alias within its own anchor would be infinite.
            sizes[event.anchor] = math.inf
            anchors.append(event.anchor)
            counts.append(1)
        elif isinstance(event, CollectionEndEvent):
            size = sizes[anchors.pop()] = counts.pop()
            counts[-1] += size
        elif isinstance(event, AliasEvent):
            counts[-1] += sizes.get(event.anchor, 0)
        elif isinstance(event, ScalarEvent):
            sizes[event.anchor] = 1
            counts[-1] += 1
        if counts[-1] > MAX_VALUES or len(counts) > MAX_DEPTH:
            return False
    return True


def _check_keys(
    values: dict[str, Any], allowed: tuple[str, ...], required: tuple[str, ...], where: str
) -> None:
    # YAML's keys can be of any type.
    unknown = [key if isinstance(key, str) else shown(key) for key in values if key not in allowed]
    if unknown:
        raise SettingsError(
            f"{where}: unknown key {one_line(', '.join(unknown))}. Allowed: {', '.join(allowed)}."
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
        return _build_alternative(value, arguments, key, path)
    if wanted is float and type(value) is int:
        _check_extent(value, key, path)
        return float(value)
    if type(value) is not wanted:
        # YAML 1.2 takes `yes` and `on` for texts.
        raise _wrong(path, key, "true or false" if wanted is bool else wanted.__name__, value)
    _check_extent(value, key, path)
    return value


def _build_alternative(value: Any, alternatives: tuple[Any, ...], key: str, path: Path) -> Any:
    """Build a value of one of some types: by its form a section, a list, a word, a text or none."""
    words = [w for a in alternatives if typing.get_origin(a) is Literal for w in typing.get_args(a)]
    if isinstance(value, str) and value in words:
        return value
    if value is None and type(None) in alternatives:
        return None
    others = (a for a in alternatives if typing.get_origin(a) is not Literal)
    typed = [a for a in others if a is not type(None)]
    wanted = next((t for t in typed if _has_form(value, t)), typed[0])
    if (words or len(typed) > 1) and not (_has_form(value, wanted) or type(value) is int):
        forms = [*map(_form, typed), ", ".join(words)] if words else map(_form, typed)
        raise _wrong(path, key, " or ".join(forms), value)
    return _build(value, wanted, key, path)


def _has_form(value: Any, wanted: Any) -> bool:
    """Return whether a value has the form of a type, whatever is in it."""
    if dataclasses.is_dataclass(wanted):
        return isinstance(value, dict)
    return type(value) is (list if typing.get_origin(wanted) is tuple else wanted)


def _form(wanted: Any) -> str:
    if dataclasses.is_dataclass(wanted):
        return "a section of keys"
    return "a list" if typing.get_origin(wanted) is tuple else str(wanted.__name__)


def _check_extent(value: Any, key: str, path: Path) -> None:
    """Refuse numbers and texts that no field can use."""
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(path, key, "a finite number", value)
    if type(value) is int and abs(value) > MAX_WHOLE_NUMBER:
        raise _wrong(path, key, f"at most {MAX_WHOLE_NUMBER} either way", value)
    if isinstance(value, str) and (len(value) > MAX_TEXT or not _is_text(value)):
        raise _wrong(path, key, f"a text of at most {MAX_TEXT} characters of UTF-8", value)


def _is_text(value: str) -> bool:
    """Return whether a text can be encoded as UTF-8 and used as a path."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _required(cls: type) -> tuple[str, ...]:
    """Return the keys of a section that have no default."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING)


def _build_dataclass(value: Any, cls: type, key: str, path: Path) -> Any:
    if not isinstance(value, dict):
        raise _wrong(path, key, "a section of keys", value)
    fields = dataclasses.fields(cls)
    _check_keys(value, tuple(f.name for f in fields), _required(cls), f"{path}: {key}")
    hints = typing.get_type_hints(cls)
    built = {name: _build(value[name], hints[name], f"{key}.{name}", path) for name in value}
    try:
        return cls(**built)
    except ValueError as error:
        raise SettingsError(f"{path}: {key}: {one_line(error)}") from None


def _wrong(path: Path, key: str, wanted: str, found: object) -> SettingsError:
    return SettingsError(
        f"{path}: {key} is {shown(found)} ({type(found).__name__}), wanted {wanted}."
    )


class _Short(reprlib.Repr):
    """A `repr` that leaves out parts of long values."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = MAX_SHOWN

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print very large integers.
        bits = value.bit_length()
        return repr(value) if bits <= MAX_SHOWN else f"a whole number of {bits} bits"


def shown(value: object) -> str:
    """Return a value's `repr` on one line, shortened if it is long."""
    return one_line(_Short().repr(value))
