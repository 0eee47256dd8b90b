"""Finds the modules of this project that a module imports, and hashes their code."""

import ast
import hashlib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("cache", "demo", "eval", "pipeline", "train", "workspace")


def modules_of(names: tuple[str, ...]) -> set[Path]:
    """Return the files of some modules and of all modules of this project that they import, also
    indirectly or within functions.
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
    """Yield the files that Python runs for an import: the packages around a module, and the module.

    Args:
        name: Dotted name of a module, or of an object in it.
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
    """Return the sha256 of a module's syntax tree, in hexadecimal.

    Comments, docstrings and layout do not count. All versions of Python give the same hash.
    """
    return hashlib.sha256(repr(_plain(ast.parse(path.read_bytes()))).encode()).hexdigest()


def _plain(node: object) -> object:
    """Return a syntax tree as nested lists, without docstrings and other strings on their own."""
    if isinstance(node, ast.AST):
        # Empty fields differ between versions of Python.
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
