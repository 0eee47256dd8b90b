"""All stages under DVC, in a clone, on a few dozen images: what `make demo` does, smaller."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from cache import FeatureStore
from demo.world import write_world
from eval.scoring.score_names import CONTROLS, GAINS
from tests.checkout import (
    SMALL,
    bytes_of,
    change_params,
    copy_project,
    dvc,
    environment,
    run,
    stages_run,
)

pytestmark = pytest.mark.slow("runs the whole pipeline under DVC")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A git clone of the files as they are now, with a small world beside it."""
    folder = tmp_path_factory.mktemp("newcomer")
    write_world(folder / "world", num_train=60, num_val=12, seed=3)
    clone = folder / "patchcache"
    copy_project(clone)
    return clone


@pytest.fixture(scope="module")
def killed_then_finished(clone) -> dict[str, object]:
    """Kill extract in the middle with SIGKILL, then let `dvc repro` do everything."""
    finished = clone / ".work" / "shards"
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "extract"],
        cwd=clone,
        env=environment(clone),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not list(finished.glob("*.h5")):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    survived = {path.name: path.stat().st_ino for path in finished.glob("*.h5")}
    stdout = dvc(clone, "repro")
    return {"survived": survived, "stdout": stdout}


def test_every_stage_leaves_its_outputs(clone, killed_then_finished):
    wanted = [
        "data/index/images.parquet",
        "data/index/captions.parquet",
        "data/index/conversations.parquet",
        "data/index/rejected.parquet",
        "data/features/spec.json",
        "data/features/index.parquet",
        "runs/pretrain/projector.safetensors",
        "runs/pretrain/history.csv",
        "runs/finetune/adapter/adapter_model.safetensors",
        "runs/finetune/provenance.json",
        "runs/control/metrics.json",
        "reports/eval.json",
        "reports/predictions.parquet",
        "reports/captions_results.json",
        "reports/pope_questions.jsonl",
        "reports/pope_answers.jsonl",
        "reports/contamination.json",
        "reports/index.html",
    ]
    assert [name for name in wanted if not (clone / name).is_file()] == []


def test_finished_shards_of_a_killed_extract_are_not_encoded_again(clone, killed_then_finished):
    survived = killed_then_finished["survived"]
    report = json.loads((clone / "reports/extract.json").read_text())
    assert 0 < len(survived) < report["shards"], "the kill came too late or too early"
    assert report["shards_reused"] == len(survived)
    now = {name: (clone / ".work/shards" / name).stat().st_ino for name in survived}
    assert now == survived


def test_the_store_of_a_killed_extract_equals_one_built_at_once(
    clone, killed_then_finished, tmp_path
):
    shutil.copytree(clone / "data/index", tmp_path / "data/index")
    shutil.copytree(clone.parent / "world", tmp_path.parent / "world", dirs_exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.extract", "--params", "params.yaml"],
        cwd=workspace(clone, tmp_path),
        env=environment(clone),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "data/features") == bytes_of(clone / "data/features")


def workspace(clone: Path, folder: Path) -> Path:
    """Another working directory for the same code, whose settings name files by full paths."""
    shutil.copy(clone / "params.yaml", folder / "params.yaml")
    checkpoints = clone / "demo/checkpoints/clip"
    values = YAML(typ="safe", pure=True).load((clone / "params.yaml").read_text())["encoder"]
    change_params(
        folder,
        {
            "encoder": {
                key: str(checkpoints / Path(values[key]).name) for key in ("model", "pretrained")
            }
        },
    )
    return folder


def test_every_image_has_features_and_every_text_was_scored(clone, killed_then_finished):
    images = pq.read_table(clone / "data/index/images.parquet")
    store = FeatureStore(clone / "data/features")
    assert store.image_ids.tolist() == images["image_id"].to_pylist()
    scores = json.loads((clone / "reports/eval.json").read_text())
    assert scores["captions"]["count"] == scores["pretrain_only"]["captions"]["count"] == 12
    assert scores["answers"]["count"] > 0
    for section in (scores["captions"], scores["answers"], scores["pretrain_only"]["captions"]):
        others = {*CONTROLS, GAINS, "without_features", "too_long", "short_count", "by_type"}
        for control in CONTROLS:
            assert section.keys() - others <= section[control].keys()


def test_with_nothing_changed_no_stage_runs(clone, killed_then_finished):
    stdout = dvc(clone, "repro")
    assert stages_run(stdout) == []
    assert "up to date" in stdout


def test_a_comment_anywhere_runs_the_stage_code_alone(clone, killed_then_finished):
    for name in (
        "pipeline/encoding/encoder.py",
        "cache/audit.py",
        "train/loop/loop.py",
        "eval/report/page.py",
    ):
        append(clone / name, "# A remark.")
    assert stages_run(dvc(clone, "repro")) == ["code"]
    assert "up to date" in dvc(clone, "status")


def test_a_statement_runs_the_stages_that_import_it(clone, killed_then_finished):
    """The encoder's features stay the same, so nothing is encoded or trained again."""
    before = bytes_of(clone / "data/features")
    append(clone / "pipeline/encoding/encoder.py", "CHANGED = True")
    assert stages_run(dvc(clone, "repro")) == ["code", "extract"]
    report = json.loads((clone / "reports/extract.json").read_text())
    assert (report["shards_encoded"], report["shards_reused"]) == (0, report["shards"])
    assert bytes_of(clone / "data/features") == before


def append(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text()}\n{line}\n")


def test_features_lie_on_the_disk_once(clone, killed_then_finished):
    """In the work directory, in data/features and in DVC's cache, as one file."""
    shards = list((clone / "data/features").glob("*.h5"))
    assert shards
    for path in shards:
        assert path.samefile(clone / ".work/shards" / path.name)
        assert path.stat().st_nlink == 3


def test_a_learning_rate_reruns_training_and_evaluation_only(clone, killed_then_finished):
    change_params(clone, {"pretrain": {"learning_rate": 5e-4}})
    stdout = dvc(clone, "repro")
    assert stages_run(stdout) == ["code", "pretrain", "finetune", "control", "evaluate"]


def test_a_control_is_trained_when_the_settings_ask_for_it(clone, killed_then_finished):
    assert not (clone / "runs/control/projector.safetensors").exists()
    change_params(clone, {"controls": {"trained_blind": True}})
    assert stages_run(dvc(clone, "repro")) == ["code", "control", "evaluate"]
    assert (clone / "runs/control/projector.safetensors").is_file()
    scores = json.loads((clone / "reports/eval.json").read_text())
    assert scores["answers"]["trained_blind"]["count"] == scores["answers"]["count"]


def test_a_settings_file_without_controls_trains_none(clone, killed_then_finished):
    path = clone / "params.yaml"
    before, _, after = path.read_text().partition("controls:\n")
    path.write_text(before + after.partition("\n\n")[2])
    assert "controls" not in YAML(typ="safe", pure=True).load(path.read_text())
    # DVC has the outputs of the other stages from before.
    assert stages_run(dvc(clone, "repro")) == ["code"]
    assert not (clone / "runs/control/projector.safetensors").exists()
    assert "up to date" in dvc(clone, "status")


@pytest.mark.parametrize(
    ("changes", "module", "exit_code", "words"),
    [
        ({"pretrain": {"learing_rate": 1}}, "train.pretrain", 2, "unknown key learing_rate"),
        ({"encoder": {"layer": "-2"}}, "pipeline.extract", 2, "encoder.layer is '-2' (str)"),
        (
            {"data": {"train": SMALL["data"]["train"] | {"images": "nowhere"}}},
            "pipeline.index",
            1,
            "nowhere does not exist",
        ),
    ],
)
def test_a_mistake_gets_one_line(clone, tmp_path, changes, module, exit_code, words):
    shutil.copy(clone / "params.yaml", tmp_path / "params.yaml")
    change_params(tmp_path, changes)
    done = run(clone, module, "--params", str(tmp_path / "params.yaml"))
    assert done.returncode == exit_code
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
