import argparse
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cache.errors import SpecMismatchError
from eval.ask import ask
from eval.evaluate import evaluate
from eval.export import export
from eval.runs import load_run, open_run
from eval.serve import serve
from train.model.projector import seeded_projector
from workspace.errors import StageError

RUN = Path("runs/finetune")
PROVENANCE = RUN / "provenance.json"


def asked(**values):
    return argparse.Namespace(
        run=RUN, image=None, image_id=100, temperature=None, seed=0, question="", **values
    )


COMMANDS = {
    "ask": lambda world: ask(asked()),
    "serve": lambda world: serve(argparse.Namespace(run=RUN, port=1, share=False)),
    "export": lambda world: export(RUN, Path("out")),
    "evaluate": lambda world: evaluate(world.params(**world.now)),
}


@pytest.fixture
def no_model(monkeypatch):
    """Fail where the language model would be loaded."""

    def loaded(*_):
        raise AssertionError("the language model was loaded")

    for module in ("eval.runs", "eval.scoring.evaluated_models"):
        monkeypatch.setattr(f"{module}.load_language_model", loaded)


@pytest.fixture
def copied(world, tmp_path):
    """Both runs beside a copy of the language model, which their settings name."""
    folder = Path(shutil.copytree(world.workspace.phi_dir, tmp_path / "elsewhere"))
    world.now = {"llm": {"model": str(folder)}}
    for path in Path("runs").glob("*/params.yaml"):
        path.write_text(path.read_text().replace(str(world.workspace.phi_dir), str(folder)))
    return folder


def change_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"][-1] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_beside_other_weights_is_refused_before_they_are_loaded(
    world, copied, command, no_model
):
    change_weight(copied)
    with pytest.raises(StageError) as error:
        COMMANDS[command](world)
    words = ("provenance.json", str(world.workspace.phi_dir), str(copied), "weights")
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_the_same_weights_at_another_place_are_taken(world, copied, capsys):
    ask(asked())
    assert capsys.readouterr().err == ""


def test_a_run_of_an_earlier_version_is_taken_with_a_word(world, capsys):
    values = json.loads(PROVENANCE.read_text())
    del values["language_model"]
    PROVENANCE.write_text(json.dumps(values))
    load_run(open_run(RUN))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{PROVENANCE}: ")
    assert "cannot check" in line


def test_cached_features_that_the_run_did_not_learn_from_are_refused_before_the_model(
    world, no_model
):
    values = json.loads(PROVENANCE.read_text())
    PROVENANCE.write_text(json.dumps(values | {"features_fingerprint": "0" * 64}))
    with pytest.raises(SpecMismatchError, match="learned from those of 000000000000"):
        ask(asked())


def test_a_projector_of_stage_1_from_which_stage_2_did_not_start_is_not_scored_beside_it(
    world, no_model
):
    values = json.loads(PROVENANCE.read_text())
    PROVENANCE.write_text(json.dumps(values | {"start_projector_sha256": "1" * 64}))
    path = Path("runs/pretrain/projector.safetensors")
    seeded_projector("mlp", 8, 64, 5).save(path)
    # As if stage 1 had been trained again.
    again = json.loads(path.with_name("provenance.json").read_text())
    again["weights_sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_name("provenance.json").write_text(json.dumps(again))
    with pytest.raises(StageError, match="started from a projector of 111111111111") as error:
        evaluate(world.params())
    assert str(error.value).startswith(str(path))
