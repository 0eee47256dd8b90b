"""Writes docs/settings.md from the dataclasses of the settings and their docstrings.

python -m tests.documents.settings_page
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from pathlib import Path

from tests.settings_law import alternatives
from tests.test_pipeline_definition import SECTIONS
from workspace.settings import Params

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/settings.md"

HEAD = """# Settings

All settings are in `params.yaml`; `configs/` has whole files. A key that is unknown, or a value of
another type or out of range, is refused before its stage begins, with exit code 2.
`dvc exp run -S section.key=value` changes a setting for one experiment.

`seed` (whole number) decides every random choice. `python -m tests.documents.settings_page` makes
this page from the code.
"""


def render() -> str:
    """Return the page."""
    default, real = (
        Params.read(ROOT / name).values for name in ("params.yaml", "configs/coco.yaml")
    )
    parts = [HEAD]
    for name, cls in SECTIONS.items():
        rows = [
            f"| `{key}` | {kind} | {shown(default[name], key)} | {shown(real[name], key)} "
            f"| {text} |"
            for key, kind, text in fields(cls)
        ]
        summary = inspect.getdoc(cls).partition(f"Section `{name}`")[2].lstrip(":. ")
        head = f"| key | type | `params.yaml` | `configs/coco.yaml` | meaning |\n|{'---|' * 5}"
        intro = [summary[:1].upper() + summary[1:]] if summary else []
        parts.append("\n\n".join([f"## {name}", *intro, "\n".join([head, *rows])]) + "\n")
    return "\n".join(parts)


def fields(cls: type, before: str = "") -> typing.Iterator[tuple[str, str, str]]:
    """Yield key, type and meaning of each setting, those of nested sections too."""
    hints = typing.get_type_hints(cls)
    texts = docstrings(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kinds = alternatives(hint)
        sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        is_list = typing.get_origin(hint) is tuple
        if is_list or len(sections) < len(kinds):
            yield f"{before}{field.name}", type_name(hint), texts.get(field.name, "")
        for section in sections:
            yield from fields(section, f"{before}{field.name}{'[]' * is_list}.")


def docstrings(cls: type) -> dict[str, str]:
    """Return the docstrings behind the fields of a dataclass and its bases, on one line each."""
    found: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, behind in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(behind, ast.Expr):
                found[field.target.id] = " ".join(behind.value.value.split()).replace("|", "\\|")
    return found


def type_name(hint: object) -> str:
    """Return a type as a reader of YAML would write it."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(hint) is tuple:
        return f"list of {type_name(arguments[0])}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments if a is not type(None))
    names = {str: "text", bool: "true or false", int: "whole number", float: "number"}
    return names.get(hint, "section")


def shown(values: object, key: str) -> str:
    """Return a value of a settings file; nothing where the file has a list or nothing."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    if values is None or isinstance(values, list | dict):
        return ""
    return f"`{str(values).lower() if isinstance(values, bool) else values}`"


if __name__ == "__main__":
    PAGE.write_text(render())
