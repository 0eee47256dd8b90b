import argparse
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cache.errors import SettingsError, SpecMismatchError
from eval.ask import ask
from eval.compare import compare
from eval.evaluate import evaluate
from eval.export import export
from eval.runs import load_run, open_run, read_trained_on
from eval.serve import serve
from train.finetune import finetune
from train.model.projector import seeded_projector
from train.pretrain import pretrain
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


@pytest.fixture
def captions_only(world):
    """Runs of both stages without conversations."""
    world.workspace.write_index([(100, "train", "a cat")], [])
    pretrain(world.params())
    finetune(world.params())
    return world


@pytest.fixture
def conversations_only(world):
    """Runs of both stages without captions."""
    world.workspace.write_index([], [(100, "train", [("how many", "two")])])
    pretrain(world.params())
    finetune(world.params())
    return world


def answer_of(capsys, folder, question=""):
    arguments = {"image": None, "image_id": 100, "temperature": None, "seed": 0}
    ask(argparse.Namespace(run=Path(folder), question=question, **arguments))
    return capsys.readouterr().out


def test_a_stage_2_without_conversations_captions_as_stage_1_does(captions_only, capsys):
    capsys.readouterr()
    assert answer_of(capsys, RUN) == answer_of(capsys, "runs/pretrain") != ""


def test_a_stage_2_without_conversations_takes_no_question_and_says_why(captions_only, capsys):
    run = open_run(RUN)
    assert (run.answers, run.is_trained) == (False, False)
    words = "runs/finetune: has no adapter.* because there are no conversations"
    with pytest.raises(SettingsError, match=words) as error:
        answer_of(capsys, RUN, "how many")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["ask", "serve", "export"])
def test_a_projector_of_random_weights_is_no_run_to_use(conversations_only, command, no_model):
    path = Path("runs/pretrain")
    commands = {
        "ask": lambda: answer_of(None, path),
        "serve": lambda: serve(argparse.Namespace(run=path, port=1, share=False)),
        "export": lambda: export(path, Path("out")),
    }
    with pytest.raises(StageError, match="runs/pretrain: its projector has random") as error:
        commands[command]()
    assert "runs/finetune" in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("out").exists()


def test_a_stage_2_from_random_weights_answers(conversations_only, capsys):
    capsys.readouterr()
    assert answer_of(capsys, RUN, "how many")


@pytest.mark.parametrize("untrained", ["captions_only", "conversations_only"])
def test_untrained_runs_are_compared(request, untrained, capsys):
    world = request.getfixturevalue(untrained)
    shutil.copytree("runs", "before/runs")
    evaluate(world.params())
    shutil.copytree("reports", "before/reports")
    capsys.readouterr()
    compare("runs/pretrain", "runs/finetune")
    compare("before", ".")
    out = capsys.readouterr().out
    assert "untrained" in out
    assert "facts equal" in out


@pytest.mark.parametrize(
    ("metrics", "found"),
    [
        ({"images": 3, "texts": 5, "loss": 2.5}, {"images": 3, "texts": 5}),
        ({"loss": 2.5}, {}),
        ({"images": 3}, {}),
        ({"images": 3.0, "texts": "5"}, {}),
        ({"images": 0, "texts": 0}, {}),
        (None, {}),
    ],
)
def test_a_run_that_does_not_say_what_it_learned_from_is_no_error(tmp_path, metrics, found):
    if metrics is not None:
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert read_trained_on(tmp_path) == found


def test_damaged_metrics_are_refused(tmp_path):
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(StageError, match=r"metrics\.json: .*Run the .* stage"):
        read_trained_on(tmp_path)
