"""The folders and what may import what."""

import ast
import functools
import os
import re
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "cache": (),
    "workspace": ("cache",),
    "pipeline": ("cache", "workspace"),
    "train": ("cache", "workspace"),
    "eval": ("cache", "workspace", "pipeline", "train"),
    "demo": ("cache", "workspace", "pipeline", "train"),
    "bench": ("cache", "workspace", "pipeline", "train", "eval", "demo"),
}
"""Package to the packages below it."""

EVAL_MAY_IMPORT = (
    "pipeline.images",
    "pipeline.encoding.encoder",
    "pipeline.towers",
    "pipeline.settings",
)
"""Of pipeline: pictures, the tower, and the settings that name it."""

PACKAGES = tuple(MAY_IMPORT)
PATHS = re.compile(r"(data|runs|reports|\.work)/[\w./-]*")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
"""Name of every module of the product to its file."""

COMMANDS = sorted(
    name
    for name, path in MODULES.items()
    if any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        for node in tree_of(path).body
    )
)


def imports_of(name: str, *, at_start_only: bool = False) -> set[str]:
    """The modules of the product that a module imports.

    Args:
        name: The module.
        at_start_only: Leaves out imports within functions and those for type checkers.
    """
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    nodes = [tree_of(path)]
    found = set()
    while nodes:
        node = nodes.pop()
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_start_only and (is_function or for_types):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {module for module in found if module in MODULES}


def test_modules_and_commands_are_found():
    assert len(MODULES) > 100
    assert {"pipeline.extract", "train.pretrain", "eval.ask", "cache.verify"} < set(COMMANDS)
    assert "cache.plan" in imports_of("cache.audit")
    assert "pipeline.encoding.encoder" in imports_of("pipeline.encoding.lazy_encoder")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_from_above(package):
    allowed = {package, *MAY_IMPORT[package]}
    if package != "cache":
        assert MAY_IMPORT[package]
    for name in MODULES:
        if name.split(".")[0] == package:
            tops = {module.split(".")[0] for module in imports_of(name)}
            assert tops <= allowed, name


def test_the_library_imports_itself_by_relative_names_only():
    for name, path in MODULES.items():
        if name.split(".")[0] == "cache":
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.ImportFrom) and not node.level:
                    assert node.module.split(".")[0] not in PACKAGES, name
                if isinstance(node, ast.Import):
                    assert not {a.name.split(".")[0] for a in node.names} & set(PACKAGES), name


def test_modules_do_not_import_each_other_in_a_circle():
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in finished:
            for module in imports_of(name, at_start_only=True) - {name}:
                # A package's __init__ stands for its names, not for the package's modules.
                if MODULES[module].name != "__init__.py":
                    visit(module, (*above, name))
            finished.add(name)

    for name in MODULES:
        visit(name, ())


def test_evaluation_takes_pictures_and_the_tower_from_the_pipeline_alone():
    for name in MODULES:
        if name.split(".")[0] == "eval":
            taken = {module for module in imports_of(name) if module.count(".")}
            for module in (m for m in taken if m.split(".")[0] == "pipeline"):
                assert module.startswith(EVAL_MAY_IMPORT) or module == "pipeline.encoding", name


def test_a_command_is_imported_by_no_other_module():
    for name in MODULES:
        if not name.startswith("bench."):
            assert not imports_of(name) & set(COMMANDS), name


def test_what_computes_takes_nothing_from_what_shows():
    users = {
        name
        for name in MODULES
        if not name.startswith("eval.report")
        if any(module.startswith("eval.report.") for module in imports_of(name))
    }
    assert users == {"eval.evaluate"}


def test_a_path_of_the_workspace_is_written_once():
    for name, path in MODULES.items():
        if name.split(".")[0] not in ("workspace", "bench", "demo"):
            texts = {
                node.value
                for node in ast.walk(tree_of(path))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            assert [text for text in texts if PATHS.fullmatch(text)] == [], name


@pytest.mark.parametrize("room", sorted({path.parent for path in MODULES.values()}))
def test_a_room_is_a_package_whose_docstring_describes_it(room):
    init = room / "__init__.py"
    assert init.is_file()
    assert ast.get_docstring(tree_of(init))


OTHERS = ("cache", "demo", "eval", "pipeline", "train", "workspace")


def help_of(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow("starts commands")
@pytest.mark.parametrize("command", ["pipeline.extract", "train.pretrain", "eval.score"])
def test_a_command_runs_ours_beside_modules_of_the_same_names(tmp_path, command):
    for name in OTHERS:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('another program')")
    safe = help_of(command, tmp_path, PYTHONSAFEPATH="1")
    assert safe.stdout.startswith(f"usage: python -m {command}"), safe.stderr
    # Without that, Python itself looks for the command's own package in the folder first.
    (tmp_path / f"{command.split('.')[0]}.py").unlink()
    usual = help_of(command, tmp_path)
    assert usual.stdout.startswith(f"usage: python -m {command}"), usual.stderr
