"""The folder alone, under another name, is the same library and the same commands."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cache

FOLDER = Path(cache.__file__).parent
NAME = "patchcache"

GATHER = """
import sys, numpy as np, patchcache
from patchcache import FeatureStore, MissingImageError, Spec, VerifyReport
store = FeatureStore(sys.argv[1])
np.save(sys.argv[2], store.gather(store.image_ids))
assert store.verify() == VerifyReport(True, num_images=len(store), num_shards=store.num_shards)
assert not {"cache", "pipeline", "train", "eval", "workspace", "torch"} & sys.modules.keys()
"""


WRITE = """
import sys, numpy as np, patchcache
spec = patchcache.Spec.external(model="net", about="last map", patches=4, width=6)
row = np.ones((4, 6), np.float16)
store = patchcache.write_store(sys.argv[1], spec, [(5, 1, row), (3, 2, row * 2)])
assert store.image_ids.tolist() == [3, 5] and store.verify().ok
assert not {"cache", "pipeline", "train", "eval", "workspace", "torch"} & sys.modules.keys()
"""


@pytest.fixture
def run(tmp_path):
    """Runs Python in a folder that holds a copy of the package, and sees nothing else of ours."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(FOLDER, tmp_path / "site" / NAME, ignore=ignored)

    def run(*arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-P", *map(str, arguments)],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path / "site"), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    return run


def test_a_store_is_read_and_verified_by_the_renamed_library(run, store, tmp_path):
    run("-c", GATHER, store.root, tmp_path / "features.npy")
    assert np.array_equal(np.load(tmp_path / "features.npy"), store.features)


def test_a_store_is_written_by_the_renamed_library(run, tmp_path):
    run("-c", WRITE, tmp_path / "mine")
    shown = run("-m", f"{NAME}.inspect", tmp_path / "mine").stdout
    assert "about                'last map'" in shown


def test_the_renamed_commands_work_and_name_themselves(run, store):
    count = len(store.names)
    assert f"{count} shards" in run("-m", f"{NAME}.inspect", store.root).stdout
    assert f"{count} shards, all bytes" in run("-m", f"{NAME}.verify", store.root).stdout
    assert f"python -m {NAME}.verify " in run("-m", f"{NAME}.verify", "--help").stdout
    (store.root / store.names[0]).write_bytes(b"")
    failed = run("-m", f"{NAME}.verify", store.root, code=1)
    assert f"python -m {NAME}.verify --repair" in failed.stdout
    assert "cache.verify" not in failed.stdout.replace(f"{NAME}.verify", "")


@pytest.mark.parametrize("module", [NAME, f"{NAME}.errors"])
def test_importing_the_package_loads_nothing_that_must_be_installed(run, module):
    code = (
        f"import sys; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    )
    loaded = {name.partition(".")[0] for name in run("-S", "-c", code).stdout.split()}
    assert loaded <= {NAME} | sys.stdlib_module_names


def test_no_module_imports_the_package_by_its_name_or_others_of_the_project():
    ours = {path.parent.name for path in FOLDER.parent.glob("*/__init__.py")}
    assert "pipeline" in ours
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert not {name.partition(".")[0] for name in names} & ours, path
