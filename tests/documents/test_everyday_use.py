"""Everyday use: another setting costs the stages behind it, in this folder or from DVC's queue."""

import csv
import io
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.checkout import change_params, dvc, run, stages_run
from tests.documents.pages import run_commands, section

pytestmark = pytest.mark.slow("runs experiments and a sweep under DVC")

TRAINING = ["pretrain", "finetune", "control", "evaluate"]
SCORE = "captions.CIDEr"

Files = dict[str, tuple[int, bytes]]
"""Path to inode and content."""


class Experiment(NamedTuple):
    """What came before and after `dvc exp run` in the block, and the features around it."""

    reproduced: str
    stdout: str
    others: list[str]
    before: Files
    after: Files

    @property
    def name(self) -> str:
        return re.search(r"Ran experiment\(s\): ([\w-]+)", self.stdout)[1]


class Swept(NamedTuple):
    """A sweep from DVC's queue."""

    stdout: str
    compared: str
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
def words(checkout, tmp_path_factory) -> dict[str, str]:
    """Another workspace, with settings and an index, for the code of the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(checkout / "data/index", folder / "data/index")
    shutil.copy(checkout / "params.yaml", folder / "params.yaml")
    clip = checkout / "demo/checkpoints/clip/ViT-demo-32"
    files = {"model": f"{clip}.json", "pretrained": f"{clip}.safetensors"}
    change_params(folder, {"encoder": files})
    (folder / "params.yaml").rename(folder / "my.yaml")
    return {"<elsewhere>": str(folder), "<checkout>": str(checkout)}


@pytest.fixture(scope="module")
def experiment(checkout, words) -> Experiment:
    """The first block of the section: it trains with another learning rate. Then the store's."""
    block, _ = section("Experiments")
    (reproduced,) = run_commands(block.commands[:1], checkout)
    before = files_below(checkout / "data/features")
    (stdout,) = run_commands(block.commands[1:2], checkout)
    after = files_below(checkout / "data/features")
    (features,) = section("Features")
    others = run_commands(block.commands[2:] + features.commands, checkout, words)
    return Experiment(reproduced, stdout, others, before, after)


@pytest.fixture(scope="module")
def swept(checkout, experiment) -> Swept:
    """The second block, while somebody goes on editing in the workspace."""
    _, block = section("Experiments")
    run_commands(block.commands[:1], checkout)
    before = workspace(checkout)
    code = checkout / "train/finetune.py"
    shutil.copy(code, checkout.parent / code.name)
    code.write_text("raise SystemExit('the code of the workspace was run')\n")
    try:
        stdout, compared = run_commands(block.commands[1:], checkout)
    finally:
        shutil.move(checkout.parent / code.name, code)
        outlived = end_workers(checkout)
    return Swept(stdout, compared, before, workspace(checkout), outlived)


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


def test_nothing_is_made_again_while_nothing_changed(experiment):
    assert stages_run(experiment.reproduced) == []


def test_an_experiment_runs_training_and_evaluation_only(experiment):
    assert stages_run(experiment.stdout) == ["code", *TRAINING]


def test_an_experiment_leaves_the_features_untouched(experiment):
    assert experiment.after == experiment.before
    assert any(name.endswith(".h5") for name in experiment.before)


def test_every_other_command_of_the_block_prints_something(experiment):
    assert len(experiment.others) > 5
    assert all(experiment.others)


def test_features_of_another_workspace_are_the_same_bytes(checkout, experiment, words):
    other = Path(words["<elsewhere>"]) / "data/features"
    names = {path.name for path in other.iterdir()}
    assert names == {path.name for path in (checkout / "data/features").iterdir()}
    assert all(
        (other / name).read_bytes() == (checkout / "data/features" / name).read_bytes()
        for name in names
    )


def test_an_experiment_of_a_sweep_trains_what_its_setting_changes_only(swept):
    # An experiment has a folder of its own, and links to the inputs of its own.
    assert stages_run(swept.stdout) == ["code", "inputs", "finetune", "control", "evaluate"] * 2


def test_a_queued_experiment_runs_the_code_that_it_was_queued_with(swept):
    assert "the code of the workspace was run" not in swept.stdout
    assert "Failed" not in swept.stdout


def test_a_sweep_leaves_the_workspace_as_it_was(swept):
    assert swept.after == swept.before


def test_no_worker_outlives_the_sweep(checkout, swept):
    assert swept.outlived == []
    assert processes_in(checkout) == []


def test_settings_and_scores_of_every_experiment_are_listed(checkout, experiment, swept):
    rows = listed(checkout)
    wanted = {experiment.name: 2e-3, "sweep-1": 1e-3, "sweep-2": 4e-3}
    assert {name: float(rows[name]["finetune.learning_rate"]) for name in wanted} == wanted
    assert {float(rows[name]["pretrain.learning_rate"]) for name in wanted} == {5e-4}
    assert all(float(rows[name][SCORE]) >= 0 for name in wanted)


def test_compare_names_the_setting_of_the_sweep_and_no_other(swept):
    assert differing_settings(swept.compared) == [["finetune.learning_rate", "0.001", "0.004"]]
    names = [line.split()[0] for line in swept.compared.splitlines() if line]
    assert "finetune.validation_loss" in names
    assert not any(name.startswith("pretrain.") for name in names)


def test_compare_takes_a_revision_without_a_run_for_a_mistake(checkout, experiment):
    done = run(checkout, "eval.compare", "HEAD~1", experiment.name)
    assert done.returncode == 1
    assert done.stderr.startswith("error: HEAD~1 has no metrics")
    assert done.stderr.count("\n") == 1


def test_compare_shows_the_workspace_beside_an_experiment(checkout, swept):
    done = run(checkout, "eval.compare", "workspace", "sweep-1")
    assert differing_settings(done.stdout) == [["finetune.learning_rate", "0.002", "0.001"]]


def test_compare_of_no_revision_is_one_line(checkout):
    done = run(checkout, "eval.compare", "nowhere", "HEAD")
    assert done.returncode == 2
    assert "error: nowhere is neither a folder nor a revision" in done.stderr
    assert done.stderr.count("\n") == 1
