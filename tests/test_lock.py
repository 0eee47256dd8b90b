"""requirements.lock, pyproject.toml, and what is installed."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-bench.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(name: str) -> dict[str, tuple[str, str]]:
    """Package to its version and the rest of its entry: a marker and hashes."""
    entries = re.findall(r"^([\w.-]+)==([^\s;]+)(.*(?:\n    .*)*)", (ROOT / name).read_text(), re.M)
    return {plain(package): (version, rest) for package, version, rest in entries}


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_has_hashes_and_no_address(name):
    text = (ROOT / name).read_text()
    assert "://" not in text
    entries = locked(name)
    assert len(entries) == len(re.findall(r"^\S", text, re.M)) > 10
    assert [package for package, (_, rest) in entries.items() if "--hash=sha256:" not in rest] == []


def test_what_is_installed_is_what_is_locked():
    installed = {plain(found.metadata["Name"]): found.version for found in metadata.distributions()}
    differing = {
        package: (version, installed[package])
        for package, (version, _) in locked("requirements.lock").items()
        if package in installed and installed[package] != version
    }
    assert differing == {}


def test_all_that_the_project_declares_is_locked():
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    extras = project["optional-dependencies"]
    of_extras = [entry for extra in extras.values() for entry in extra]
    declared = [*project["dependencies"], *of_extras, *groups["dev"]]
    names = {plain(re.match(r"[\w.-]+", entry)[0]) for entry in declared} - {"patchcache"}
    assert names <= locked("requirements.lock").keys()


def test_the_wheel_holds_the_library_alone(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if ".dist-info/" not in name}
    wanted = {
        f"patchcache/{path.relative_to(ROOT / 'cache')}" for path in (ROOT / "cache").rglob("*.py")
    }
    assert modules == wanted
