"""A checkout of the project on a small world, for tests that run the pipeline under DVC."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]

SMALL = {
    "data": {
        "source": "local",
        "train": {
            "images": "../world/train2017.zip",
            "captions": "../world/annotations/captions_train2017.json",
        },
        "val": {
            "images": "../world/val2017.zip",
            "captions": "../world/annotations/captions_val2017.json",
        },
        "instruct": "../world/llava_instruct_150k.json",
    },
    "encoder": {"batch_size": 4},
    "extract": {"shard_rows": 8, "workers": 0},
    "pretrain": {"epochs": 1, "batch_captions": 50},
    "finetune": {"epochs": 1, "batch_examples": 16},
    "evaluate": {"questions": 20},
    "tracking": {"wandb": "disabled"},
}
"""Settings for a world of some dozen images that lies beside the checkout."""

WORLD = {"num_train": 60, "num_val": 12, "seed": 3}
"""Such a world."""


def copy_project(clone: Path) -> None:
    """Make a git repository of the files as they are now, with the small settings."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        # What was made in this folder, `dvc.lock` would claim for the copy.
        if (ROOT / name).is_file() and name != "dvc.lock":
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    subprocess.run(["git", "init", "-q", "."], cwd=clone, check=True)
    change_params(clone, SMALL)


def run(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=clone,
        env=environment(clone),
        capture_output=True,
        text=True,
        check=False,
    )


def environment(clone: Path) -> dict[str, str]:
    """What `make` sets: this Python first on the path, the clone's modules importable."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(clone)}


def dvc(clone: Path, *arguments: str) -> str:
    """Run a DVC command that must succeed, and return what it printed."""
    done = run(clone, "dvc", *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def stages_run(stdout: str) -> list[str]:
    """The stages that `dvc repro` says it ran, in order; `finetune` before `control`.

    Neither of these two depends on the other, so DVC runs them in any order.
    """
    start = "Running stage '"
    lines = stdout.splitlines()
    stages = [line[len(start) :].split("'")[0] for line in lines if line.startswith(start)]
    for at in range(len(stages) - 1):
        if stages[at : at + 2] == ["control", "finetune"]:
            stages[at : at + 2] = ["finetune", "control"]
    return stages


def change_params(clone: Path, changes: dict[str, dict[str, object]]) -> None:
    yaml = YAML()
    path = clone / "params.yaml"
    values = yaml.load(path.read_text())
    for section, keys in changes.items():
        values[section].update(keys)
    yaml.dump(values, path)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
