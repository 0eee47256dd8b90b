"""A checkout in which everything was made once; each module works in a copy of its own."""

import shutil
from pathlib import Path

import pytest

from demo.world import write_world
from tests.checkout import SMALL, WORLD, change_params, copy_project
from tests.documents.pages import run_commands

SHORT = {
    "pretrain": {"log_every_steps": 1, "validate_every_steps": 3, "samples": 0},
    "finetune": {"log_every_steps": 1, "validate_every_steps": 3, "samples": 0},
    "evaluate": {"caption_images": 12, "questions": 6, "caption_tokens": 6, "answer_tokens": 6},
}


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "world"
    write_world(folder, **WORLD)
    return folder


@pytest.fixture(scope="session")
def reproduced(world, tmp_path_factory) -> Path:
    """A git repository whose second commit has the `dvc.lock` of a whole run."""
    clone = tmp_path_factory.mktemp("reproduced") / "patchcache"
    copy_project(clone)
    # Queued experiments run in folders of their own, from which a relative path leads elsewhere.
    data = {key: _below(world, value) for key, value in SMALL["data"].items()}
    change_params(clone, SHORT | {"data": data})
    commit = "git add . && git commit --quiet --message"
    run_commands([f"{commit} settings", "dvc repro", f"{commit} results"], clone)
    return clone


def _below(world: Path, value: object) -> object:
    if isinstance(value, dict):
        return {key: _below(world, name) for key, name in value.items()}
    return str(value).replace("../world", str(world))


@pytest.fixture(scope="module")
def checkout(reproduced, tmp_path_factory) -> Path:
    """A copy of the checkout, for this module alone."""
    clone = tmp_path_factory.mktemp("copy") / "patchcache"
    shutil.copytree(reproduced, clone, symlinks=True)
    return clone
