"""Stage code: writes, for every other stage, which code it runs and a hash of each part.

DVC does not follow Python imports, so every other stage depends on its file in `data/code/`. A file
has one line for each module that the stage imports, directly or not, and for each other file that
this code reads. A module's hash is taken of its syntax tree without docstrings: a comment changes
no file here, and a statement changes the files of exactly those stages that import its module.
"""

import ast
import hashlib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

from cache.cli.command import run_stage
from cache.files.atomic import sha256_of, write_text
from workspace.settings import Params

CODE = Path("data/code")
ROOT = Path(__file__).parents[1]
PACKAGES = ("cache", "demo", "eval", "pipeline", "train", "workspace")

STAGES = {
    "fetch": ("pipeline.fetch", "demo.world"),
    "index": ("pipeline.index",),
    "extract": ("pipeline.extract",),
    "pretrain": ("train.pretrain",),
    "finetune": ("train.finetune",),
    "evaluate": ("eval.evaluate",),
}
"""Modules that a stage starts. The demo's world is drawn in a process of its own."""

FILES = {
    "extract": ("pipeline/encoding/probe_images/*",),
    "evaluate": ("eval/report/templates/*",),
}
"""Patterns of the other files that the code of a stage reads."""


def code(_: Params) -> None:
    """Write the file of every stage; one whose content is the same stays as it is."""
    for stage, modules in STAGES.items():
        paths = modules_of(modules)
        files = [path for pattern in FILES.get(stage, ()) for path in ROOT.glob(pattern)]
        hashes = {path: code_hash(path) for path in paths} | {
            path: sha256_of(path) for path in files
        }
        lines = [f"{hashes[path]}  {path.relative_to(ROOT)}\n" for path in sorted(hashes)]
        write_text(CODE / stage, "".join(lines))
    print(f"code: {len(STAGES)} stages hashed in {CODE}")


def modules_of(names: tuple[str, ...]) -> set[Path]:
    """Return the files of some modules, and of all modules of this project that those import.

    Imports within functions count too.
    """
    found: set[Path] = set()
    waiting = list(names)
    while waiting:
        for path in _files_of(waiting.pop()):
            if path not in found:
                found.add(path)
                waiting += _imports_of(path)
    return found


def _files_of(name: str) -> Iterator[Path]:
    """Yield the files that Python runs for an import: a module's packages and the module.

    Args:
        name: Dotted, of a module or of something in it.
    """
    parts = name.split(".")
    if parts[0] in PACKAGES:
        places = [ROOT.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
        files = [
            file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))
        ]
        yield from (file for file in files if file.is_file())


def _imports_of(path: Path) -> Iterator[str]:
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            # `from package import name`: the name may be a module.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def code_hash(path: Path) -> str:
    """Return the sha256 of what a module does, in hexadecimal.

    Comments, docstrings and layout do not count. The hash is the same under every version of Python
    that can read the module.
    """
    return hashlib.sha256(repr(_plain(ast.parse(path.read_bytes()))).encode()).hexdigest()


def _plain(node: object) -> object:
    """Return a syntax tree as nested lists, without docstrings and other strings on their own."""
    if isinstance(node, ast.AST):
        # Fields without content differ between versions of Python.
        fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return [type(node).__name__, *((name, _plain(value)) for name, value in fields)]
    if isinstance(node, list):
        return [_plain(part) for part in node if not _is_docstring(part)]
    return repr(node)


def _is_docstring(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


if __name__ == "__main__":
    run_stage(code, __doc__)
