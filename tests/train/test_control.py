"""The control learns the texts of a stage bit by bit as the stage does, but for the pictures."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train.loop.loop
import train.run
from tests.train.stage_server import outcome
from train.control import control
from train.data.other_images import derangement
from train.finetune import finetune
from train.pretrain import pretrain
from train.settings import CONTROL
from workspace.errors import StageError
from workspace.settings import Params

ON = {"trained_blind": True}
STAGES = {"pretrain": pretrain, "finetune": finetune}
FILES = {"projector.safetensors", "metrics.json", "history.csv", "params.yaml", "provenance.json"}
CAPTIONS = [(i, s, f"a {c} cat") for i, s in [*((i, "train") for i in range(100, 112)),
            *((i, "val") for i in range(112, 116))] for c in ("red", "blue")]  # fmt: skip


@pytest.fixture
def steps(monkeypatch):
    """Record the data of every optimizer step, in order."""
    seen, step = [], train.loop.loop.optimizer_step

    def recording(model, optimizer, data, **named):
        seen.append((data, named))
        return step(model, optimizer, data, **named)

    monkeypatch.setattr(train.loop.loop, "optimizer_step", recording)
    return seen


@pytest.fixture
def texts_of(workspace):
    """Leave what a stage needs so that it is the last one with texts."""

    def leave(stage):
        if stage == "pretrain":
            workspace.write_index(CAPTIONS, [])
        else:
            workspace.write_stage_1()
        return workspace

    return leave


def run_both(workspace, stage, steps, **sections):
    """Run a stage and its control; return the steps of each."""
    STAGES[stage](workspace.params(**sections))
    own = steps[:]
    steps.clear()
    control(workspace.params(controls=ON, **sections))
    return own, steps[:]


@pytest.mark.parametrize("order", ["global", "windowed"])
@pytest.mark.parametrize("stage", STAGES)
def test_texts_order_and_seeds_are_those_of_the_stage_and_features_are_not(
    texts_of, steps, stage, order
):
    settings = {stage: {"epochs": 2, "order": order, "window_shards": 1}}
    own, others = run_both(texts_of(stage), stage, steps, **settings)
    assert len(own) == len(others) > 1
    for (data, named), (other, other_named) in zip(own, others, strict=True):
        assert data.image_ids == other.image_ids
        assert named == other_named
        for batch, other_batch in zip(data.batches, other.batches, strict=True):
            for name, value in vars(batch).items():
                if torch.is_tensor(value):
                    same = torch.equal(value, getattr(other_batch, name))
                    assert same == (name != "patches_NPD"), name


@pytest.mark.parametrize("stage", STAGES)
def test_every_image_has_the_same_other_features_in_every_step(texts_of, steps, store, stage):
    _, others = run_both(texts_of(stage), stage, steps, **{stage: {"epochs": 3}})
    image_ids = sorted({image_id for data, _ in others for image_id in data.image_ids})
    pairs = derangement(torch.tensor(image_ids).numpy(), 0)
    for data, _ in others:
        for batch in data.batches:
            wanted = store.gather([pairs[image_id] for image_id in batch.image_ids.tolist()])
            assert torch.equal(batch.patches_NPD, torch.from_numpy(wanted))


@pytest.mark.parametrize("stage", STAGES)
def test_the_run_is_complete_and_says_which_stage_it_is_the_control_of(texts_of, steps, stage):
    workspace = texts_of(stage)
    run_both(workspace, stage, steps)
    names = FILES | ({"adapter"} if stage == "finetune" else set())
    assert {path.name for path in Path("runs/control").iterdir()} == names
    metrics, own = (workspace.json(f"runs/{name}/metrics.json") for name in (CONTROL, stage))
    assert workspace.json("reports/control.json") == metrics
    for key in ("steps", "images", "texts"):
        assert metrics[key] == own[key]
    assert metrics["loss"] != own["loss"]
    made, twin = (workspace.json(f"runs/{name}/provenance.json") for name in (CONTROL, stage))
    assert made["control_of"] == stage
    assert "control_of" not in twin
    assert made.get("start_projector_sha256") == twin.get("start_projector_sha256")
    weights = {name: Path(f"runs/{name}/projector.safetensors").read_bytes()
               for name in (CONTROL, stage)}  # fmt: skip
    assert weights[CONTROL] != weights[stage]


def test_the_identity_differs_from_the_stages_in_nothing_but_the_control(texts_of, monkeypatch):
    workspace = texts_of("finetune")
    found = {}
    init = train.run.RunDirectory.__init__

    def recording(self, stage, params, identity, made_from):
        found[stage] = identity
        init(self, stage, params, identity, made_from)

    monkeypatch.setattr(train.run.RunDirectory, "__init__", recording)
    finetune(workspace.params())
    control(workspace.params(controls=ON))
    assert found[CONTROL].items() - found["finetune"].items() == {("control_of", "finetune")}
    assert not found["finetune"].items() - found[CONTROL].items()


def test_the_setting_is_no_part_of_the_other_stages_runs(texts_of):
    workspace = texts_of("finetune")
    made = []
    for controls in ({}, {"controls": ON}, {"controls": {"trained_blind": False}}):
        finetune(workspace.params(**controls))
        made.append({k: v for k, v in outcome("finetune").items() if k != "params"})
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("controls", [{}, {"controls": {"trained_blind": False}}])
def test_off_by_default_it_says_so_and_removes_an_earlier_control(texts_of, controls, capsys):
    workspace = texts_of("finetune")
    control(workspace.params(controls=ON))
    capsys.readouterr()
    workspace.params(**controls)
    # The other sections need not even be there.
    Path("params.yaml").write_text(json.dumps(controls))
    control(Params.read(Path("params.yaml")))
    assert {path.name for path in Path("runs/control").iterdir()} == {"metrics.json"}
    assert workspace.json("runs/control/metrics.json") == {"trained_blind": False}
    assert workspace.json("reports/control.json") == {"trained_blind": False}
    assert capsys.readouterr().out == (
        "control: not trained, because controls.trained_blind is false\n"
    )
    assert [path.name for path in Path(".work/runs/control").iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", ["link", "broken link", "folder on another disk", "file"])
def test_off_it_takes_the_place_of_what_lies_there_but_of_no_file(
    texts_of, tmp_path, monkeypatch, kind
):
    mine, target = tmp_path / "mine", Path("runs/control")
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    params = texts_of("pretrain").params()
    target.parent.mkdir(exist_ok=True)
    if kind == "file":
        target.write_text("mine")
        with pytest.raises(StageError, match=r"runs/control: wanted the folder of a run"):
            control(params)
        assert target.read_text() == "mine"
        return
    if kind == "folder on another disk":
        target.mkdir()
        (target / "params.yaml").write_text("seed: 1\n")
        real = os.replace

        def replace(source, destination):
            if Path(source).parts[0] != Path(destination).parts[0]:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            real(source, destination)

        monkeypatch.setattr(os, "replace", replace)
    else:
        target.symlink_to(mine if kind == "link" else tmp_path / "nowhere")
    for _ in range(2):
        control(params)
        assert [path.name for path in target.iterdir()] == ["metrics.json"]
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_off_the_first_of_several_processes_writes(texts_of, monkeypatch):
    params = texts_of("pretrain").params()
    monkeypatch.setenv("RANK", "1")
    control(params)
    assert not Path("runs/control").exists()
    monkeypatch.setenv("RANK", "0")
    control(params)
    assert Path("runs/control/metrics.json").is_file()


def test_off_it_imports_no_torch(texts_of):
    texts_of("finetune").params()
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from train.control import control\n"
        "from workspace.settings import Params\n"
        "control(Params.read(Path('params.yaml')))\n"
        "assert not {'torch', 'transformers', 'pyarrow', 'h5py'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_single_image_has_no_other_to_learn_from(texts_of):
    workspace = texts_of("finetune")
    workspace.write_index([], [(100, "train", [("where", "in the box")])])
    with pytest.raises(StageError, match=r"controls.trained_blind: image 100 is the only one"):
        control(workspace.params(controls=ON))
    assert not Path("runs/control").exists()


def test_without_any_text_there_is_no_control(texts_of):
    workspace = texts_of("finetune")
    workspace.write_index([], [])
    with pytest.raises(StageError, match="control: nothing to train on"):
        control(workspace.params(controls=ON))


def test_an_error_names_the_settings_of_the_stage(texts_of, monkeypatch):
    workspace = texts_of("finetune")

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(train.loop.loop, "optimizer_step", full)
    with pytest.raises(StageError, match=r"Set finetune.gradient_checkpointing: true"):
        control(workspace.params(controls=ON))
