import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train.loop.loop
import train.stages.captions
from cache.errors import SettingsError
from cache.files.atomic import sha256_of
from train.model.projector import load_projector, seeded_projector
from train.pretrain import pretrain
from train.run import HISTORY_COLUMNS
from workspace.errors import StageError

ROOT = Path(__file__).parents[2]
FILES = {"projector.safetensors", "metrics.json", "history.csv", "params.yaml", "provenance.json"}
TRAIN, HOLDOUT = set(range(100, 112)), set(range(116, 120))


@pytest.fixture
def models(monkeypatch):
    """Record every language model that a stage loads, as it was loaded."""
    made = []
    load = train.stages.captions.load_language_model

    def recording(*arguments):
        model = load(*arguments)
        made.append((model, {n: t.clone() for n, t in model.state_dict().items()}))
        return model

    monkeypatch.setattr(train.stages.captions, "load_language_model", recording)
    return made


@pytest.fixture
def learned_images(monkeypatch):
    """Record the images of every optimizer step."""
    seen = []
    step = train.loop.loop.optimizer_step

    def recording(model, optimizer, data, **named):
        seen.extend(data.image_ids)
        return step(model, optimizer, data, **named)

    monkeypatch.setattr(train.loop.loop, "optimizer_step", recording)
    return seen


def projector_bytes():
    return Path("runs/pretrain/projector.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["linear", "mlp", "resblock"])
@pytest.mark.parametrize(
    ("quantize", "dtype"), [("none", "fp32"), ("nf4", "fp32"), ("nf4", "bf16")]
)
def test_a_run_is_complete_and_only_the_projector_has_learned(
    workspace, models, quantize, dtype, kind
):
    params = workspace.params(llm={"quantize": quantize, "dtype": dtype}, projector={"kind": kind})
    pretrain(params)
    assert {path.name for path in Path("runs/pretrain").iterdir()} == FILES
    metrics = workspace.json("runs/pretrain/metrics.json")
    assert workspace.json("reports/pretrain.json") == metrics
    assert (metrics["images"], metrics["texts"], metrics["steps"]) == (12, 24, 3)
    assert metrics["image_tokens"] == 4
    history = workspace.history("pretrain")
    assert tuple(history[0]) == HISTORY_COLUMNS
    assert [row["step"] for row in history] == ["1", "2", "3"]
    assert float(history[-1]["validation_loss"]) == metrics["validation_loss"]
    assert Path("runs/pretrain/params.yaml").read_text() == Path("params.yaml").read_text()
    ((model, before),) = models
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    fresh = seeded_projector(kind, 8, 64, 0).state_dict()
    found = load_projector(Path("runs/pretrain/projector.safetensors"), 8, 64).state_dict()
    assert not any(torch.equal(found[name], fresh[name]) for name in fresh)


def test_a_run_pools_patches_and_says_how_many_positions_an_image_takes(workspace):
    pretrain(workspace.params(projector={"kind": "mlp", "pool": 2}))
    assert workspace.json("runs/pretrain/metrics.json")["image_tokens"] == 1
    pooled = projector_bytes()
    assert load_projector(Path("runs/pretrain/projector.safetensors"), 8, 64).pool == 2
    pretrain(workspace.params(projector={"kind": "mlp", "pool": 1}))
    assert projector_bytes() != pooled


def test_a_pool_that_does_not_divide_the_grid_is_refused_before_the_model_is_loaded(
    workspace, models
):
    with pytest.raises(SettingsError, match=r"projector.pool: pool is 4, .* grid of 2 x 2"):
        pretrain(workspace.params(projector={"kind": "mlp", "pool": 4}))
    assert not models


def test_held_out_images_are_never_learned_from(workspace, learned_images):
    pretrain(workspace.params(pretrain={"epochs": 2}))
    assert set(learned_images) == TRAIN
    assert len(learned_images) == 2 * len(TRAIN)
    assert not set(learned_images) & HOLDOUT


def test_the_same_inputs_give_the_same_files(workspace):
    pretrain(workspace.params())
    first = projector_bytes()
    torch.manual_seed(99)
    pretrain(workspace.params())
    assert projector_bytes() == first
    pretrain(workspace.params(seed=1))
    assert projector_bytes() != first


def test_a_run_without_validation_is_published_too(workspace):
    pretrain(workspace.params(pretrain={"validation_images": 0, "samples": 0}))
    assert "validation_loss" not in workspace.json("runs/pretrain/metrics.json")


def test_provenance_is_that_of_the_inputs(workspace):
    pretrain(workspace.params())
    made = workspace.json("runs/pretrain/provenance.json")
    for name in ("captions", "conversations"):
        path = Path(f"data/index/{name}.parquet")
        assert made["index_sha256"][path.name] == sha256_of(path)
    assert made["features_fingerprint"] == workspace.json("data/features/spec.json")["fingerprint"]


def test_a_failed_run_leaves_the_one_before(workspace):
    pretrain(workspace.params())
    before = {path: sha256_of(path) for path in Path("runs/pretrain").iterdir()}
    for epochs, text in ((1, "the validation loss is nan"), (9, "step 2: the loss is nan")):
        workspace.write_index([(100, "train", "x"), (112, "val", "y")], [])
        failing = {"learning_rate": 1e30, "warmup_share": 0.0, "epochs": epochs}
        with pytest.raises(StageError, match=text):
            pretrain(workspace.params(pretrain=failing | {"batch_captions": 1}))
        assert {path: sha256_of(path) for path in Path("runs/pretrain").iterdir()} == before


def test_missing_features_are_one_line_and_exit_code_1(workspace):
    Path("data/features/index.parquet").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "train.pretrain"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: data/features/index.parquet: missing")
    assert "extract" in lines[-1]
    assert "Traceback" not in done.stderr
    assert not Path("runs").exists()


def test_without_captions_of_split_train_stage_2_gets_a_fresh_projector(workspace, models, capsys):
    turns = [("where", "in the box")]
    workspace.write_index([(112, "val", "a cat")], [(100, "train", turns)])
    pretrain(workspace.params(seed=5))
    run = Path("runs/pretrain")
    assert {path.name for path in run.iterdir()} == FILES
    metrics = workspace.json("runs/pretrain/metrics.json")
    assert metrics == {"steps": 0, "images": 0, "texts": 0, "image_tokens": 4}
    assert workspace.json("reports/pretrain.json") == metrics
    assert (run / "history.csv").read_text() == ",".join(HISTORY_COLUMNS) + "\n"
    fresh = seeded_projector("mlp", 8, 64, 5).state_dict()
    found = load_projector(run / "projector.safetensors", 8, 64).state_dict()
    assert all(torch.equal(found[name], fresh[name]) for name in fresh)
    assert "no captions" in workspace.json("runs/pretrain/provenance.json")["untrained"]
    assert not models, "the language model takes gigabytes"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("pretrain: 0 steps, because there are no captions of split train")


def test_without_any_text_there_is_nothing_to_train_on(workspace, models):
    workspace.write_index([(112, "val", "a cat")], [])
    with pytest.raises(
        StageError, match=r"pretrain: nothing to train on: .*features are"
    ) as caught:
        pretrain(workspace.params())
    assert "\n" not in str(caught.value)
    assert not models
    assert not Path("runs").exists()


def test_captions_of_held_out_images_alone_are_an_error(workspace):
    turns = [("where", "in the box")]
    workspace.write_index([(100, "train", "a cat")], [(100, "holdout", turns)])
    with pytest.raises(StageError, match="pretrain: no text to learn from"):
        pretrain(workspace.params())
    assert not Path("runs").exists()


def test_a_trained_run_replaces_an_untrained_one_and_the_other_way_round(workspace):
    turns = [("where", "in the box")]
    for captions in ([], [(100, "train", "a cat")], []):
        workspace.write_index(captions, [(101, "train", turns)])
        pretrain(workspace.params())
        made = workspace.json("runs/pretrain/provenance.json")
        assert ("untrained" in made) == (not captions)
        assert len(workspace.history("pretrain")) == len(captions)


def test_stage_1_validates_on_split_val_whatever_is_in_split_test(workspace, monkeypatch):
    captions = [(100, "train", "a cat"), (112, "val", "a dog"), (113, "test", "a red cat")]
    workspace.write_index(captions, [])
    setups = []
    monkeypatch.setattr(
        train.stages.captions, "train", lambda setup, *_: setups.append(setup) or {}
    )
    pretrain(workspace.params())
    (setup,) = setups
    assert setup.train.image_ids.tolist() == [100]
    assert setup.validation.image_ids.tolist() == [112]
