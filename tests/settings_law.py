"""What the laws over all settings share: the leaves of a settings class, and odd numbers."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal

ODD_NUMBERS = {
    int: (-(2**70), -1, 0, 2**53, 2**70),
    float: (-1.0, 0.0, 5e-324, 1e300, math.inf, -math.inf, math.nan),
}
"""What a numeric setting may be given by mistake."""


def leaves(cls: type, prefix: str) -> dict[str, Any]:
    """Return the dotted name of every setting below a section, and its type."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name, kinds = f"{prefix}.{field.name}", alternatives(hints[field.name])
        sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if len(sections) < len(kinds):
            found[name] = kinds[0]
        for section in sections:
            found |= leaves(section, name)
    return found


def alternatives(wanted: Any) -> list[Any]:
    """Return the types that a value can have, or the items of a list; None is no type."""
    if typing.get_origin(wanted) not in (tuple, typing.Union, types.UnionType):
        return [wanted]
    inner = [a for a in typing.get_args(wanted) if a not in (type(None), Ellipsis)]
    return list(dict.fromkeys(kind for a in inner for kind in alternatives(a)))


def has_a_choice(wanted: Any) -> bool:
    """Whether a setting can have more than one value."""
    return typing.get_origin(wanted) is not Literal or len(typing.get_args(wanted)) > 1


def section_with(leaf: str, value: Any) -> dict[str, Any]:
    """Return the sections in which only one setting is given; `seed` is one by itself."""
    changes: Any = value
    for name in reversed(leaf.split(".")):
        changes = {name: changes}
    return typing.cast(dict[str, Any], changes)


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested values with some changed."""
    found = dict(values)
    for name, change in changes.items():
        there = found.get(name)
        both = isinstance(there, dict) and isinstance(change, dict)
        found[name] = merged(there, change) if both else change
    return found
