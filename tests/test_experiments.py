"""`dvc exp`: another setting costs the stages behind it, in this folder or from DVC's queue."""

import csv
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from demo.world import write_world
from tests.checkout import SMALL, change_params, copy_project, dvc, run, stages_run

TRAINING = ["pretrain", "finetune", "evaluate"]

SHORT = {
    "pretrain": {"samples": 0},
    "finetune": {"samples": 0},
    "evaluate": {"caption_images": 6, "questions": 6, "caption_tokens": 6, "answer_tokens": 6},
}

SCORE = "captions.CIDEr"


Files = dict[str, tuple[int, bytes]]
"""Path to inode and content."""


class Swept(NamedTuple):
    """A sweep from DVC's queue."""

    stdout: str
    before: Files
    after: Files
    outlived: list[str]


def files_below(*places: Path) -> Files:
    paths = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_ino, path.read_bytes()) for path in paths}


def workspace(clone: Path) -> Files:
    names = ("params.yaml", "dvc.lock", "data", "runs", "reports")
    return files_below(*(clone / name for name in names))


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone with features and a committed dvc.lock, and nothing trained."""
    folder = tmp_path_factory.mktemp("experiments")
    write_world(folder / "world", num_train=60, num_val=12, seed=3)
    clone = folder / "patchcache"
    copy_project(clone)
    # A queued experiment runs in a folder of its own: a relative path would lead elsewhere.
    data = json.dumps(SMALL["data"]).replace("../world", str(folder / "world"))
    change_params(clone, SHORT | {"data": json.loads(data)})
    dvc(clone, "repro", "fetch", "extract")
    for arguments in (
        ["config", "user.name", "somebody"],
        ["config", "user.email", "somebody@localhost"],
        ["add", "."],
        ["commit", "--quiet", "--message", "features"],
    ):
        subprocess.run(["git", *arguments], cwd=clone, check=True)
    return clone


@pytest.fixture(scope="module")
def slow(clone) -> dict[str, object]:
    """One experiment in the workspace, which shows its results then."""
    before = files_below(clone / "data/features")
    stdout = dvc(clone, "exp", "run", "--name", "slow", "-S", "pretrain.learning_rate=5e-4")
    return {"stdout": stdout, "before": before, "after": files_below(clone / "data/features")}


@pytest.fixture(scope="module")
def swept(clone, slow) -> Swept:
    """Two experiments from the queue, while somebody goes on editing in the workspace."""
    values = "finetune.learning_rate=1e-3,4e-3"
    dvc(clone, "exp", "run", "--queue", "--name", "sweep", "-S", values)
    before = workspace(clone)
    code = clone / "train/finetune.py"
    shutil.copy(code, clone.parent / code.name)
    code.write_text("raise SystemExit('the code of the workspace was run')\n")
    try:
        stdout = dvc(clone, "exp", "run", "--run-all")
    finally:
        shutil.move(clone.parent / code.name, code)
        outlived = end_workers(clone)
    return Swept(stdout, before, workspace(clone), outlived)


def end_workers(clone: Path) -> list[str]:
    """Wait until the queue's worker has ended by itself, and return what had to be killed."""
    _, alive = psutil.wait_procs(processes_in(clone), timeout=60)
    outlived = [" ".join(process.cmdline()) for process in alive]
    for process in alive:
        process.kill()
    return outlived


def processes_in(clone: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(clone):
                found.append(process)
        except psutil.Error:
            continue
    return found


def listed(clone: Path) -> dict[str, dict[str, str]]:
    """What `dvc exp show` lists: a row a name."""
    rows = csv.DictReader(io.StringIO(dvc(clone, "exp", "show", "--csv")))
    return {row["Experiment"]: row for row in rows if row["Experiment"]}


def differing_settings(stdout: str) -> list[list[str]]:
    """The lines of the part "settings" that name one."""
    part = stdout[stdout.index("settings\n") : stdout.index("metrics\n")]
    return [line.split() for line in part.splitlines()[1:-1]]


def test_an_experiment_runs_training_and_evaluation_only(slow):
    assert stages_run(slow["stdout"]) == TRAINING


def test_an_experiment_leaves_the_features_untouched(slow):
    assert slow["after"] == slow["before"]
    assert any(name.endswith(".h5") for name in slow["before"])


def test_an_experiment_of_a_sweep_trains_what_its_setting_changes_only(swept):
    assert stages_run(swept.stdout) == ["finetune", "evaluate"] * 2


def test_a_queued_experiment_runs_the_code_that_it_was_queued_with(swept):
    assert "the code of the workspace was run" not in swept.stdout
    assert "Failed" not in swept.stdout


def test_a_sweep_leaves_the_workspace_as_it_was(swept):
    assert swept.after == swept.before


def test_no_worker_outlives_the_sweep(clone, swept):
    assert swept.outlived == []
    assert processes_in(clone) == []


def test_settings_and_scores_of_every_experiment_are_listed(clone, swept):
    rows = listed(clone)
    wanted = {"slow": 2e-3, "sweep-1": 1e-3, "sweep-2": 4e-3}
    assert {name: float(rows[name]["finetune.learning_rate"]) for name in wanted} == wanted
    assert {float(rows[name]["pretrain.learning_rate"]) for name in wanted} == {5e-4}
    assert all(float(rows[name][SCORE]) >= 0 for name in wanted)


def test_compare_names_the_setting_of_the_sweep_and_no_other(clone, swept):
    done = run(clone, "train.compare", "sweep-1", "sweep-2")
    assert (done.returncode, done.stderr) == (0, "")
    assert differing_settings(done.stdout) == [["finetune.learning_rate", "0.001", "0.004"]]
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert "finetune.validation_loss" in names
    assert not any(name.startswith("pretrain.") for name in names)


def test_compare_takes_a_revision_without_a_run_for_a_mistake(clone, slow):
    done = run(clone, "train.compare", "HEAD", "slow")
    assert done.returncode == 1
    assert done.stderr.startswith("error: HEAD has no metrics")
    assert done.stderr.count("\n") == 1


def test_compare_shows_the_workspace_beside_an_experiment(clone, swept):
    done = run(clone, "train.compare", "workspace", "sweep-1")
    assert differing_settings(done.stdout) == [["finetune.learning_rate", "0.002", "0.001"]]


def test_compare_of_no_revision_is_one_line(clone):
    done = run(clone, "train.compare", "nowhere", "HEAD")
    assert done.returncode == 2
    assert "error: nowhere is neither a folder nor a revision" in done.stderr
    assert done.stderr.count("\n") == 1
