"""Evaluation beside the control that was trained without sight, and without one."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from eval.evaluate import evaluate
from eval.runs import open_control, open_stages
from eval.scoring.answers import exact_match
from eval.scoring.score_names import TRAINED_BLIND
from tests.conftest import sign_weights
from tests.eval.picture_world import change_tensor
from tests.eval.report.report_page import Page
from tests.eval.test_evaluate import ASKED, write_index, write_pope
from train.control import publish_none
from train.settings import LlmSettings
from workspace.errors import StageError

pytestmark = pytest.mark.slow("runs the whole evaluation")

NOW = "2026-03-02T10:00:00Z"
SENTENCE = "trained without sight"
FINETUNE, CONTROL = Path("runs/finetune"), Path("runs/control")


@pytest.fixture
def asked(world):
    """A world with questions of all kinds."""
    write_index(world)
    write_pope(ASKED)
    return world


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def make_control(folder, stage="finetune"):
    """Let the control be what a run is."""
    shutil.copytree(folder, CONTROL)
    rewrite(CONTROL / "provenance.json", lambda values: values | {"control_of": stage})


def ignore_pictures(folder):
    """Let a run give every picture the same embeddings."""
    change_tensor(folder / "projector.safetensors", "layers.2.weight", torch.zeros_like)
    sign_weights(folder)


def results(world):
    """Evaluate, and return the scores, the predictions, the page, and the bytes of all reports."""
    evaluate(world.params(), lambda: NOW)
    found = {path.name: path.read_bytes() for path in Path("reports").iterdir()}
    table = pq.read_table("reports/predictions.parquet").to_pylist()
    return json.loads(found["eval.json"]), table, Page(found["index.html"].decode()), found


def without_control(values):
    """Return scores without all that a control adds."""
    if not isinstance(values, dict):
        return values
    return {
        key: without_control(value)
        for key, value in values.items()
        if key not in (TRAINED_BLIND, "controls")
    }


def test_where_none_was_trained_nothing_is_different(asked):
    *_, before = results(asked)
    publish_none()
    Path("reports/control.json").unlink()
    scores, rows, page, after = results(asked)
    assert after == before
    assert TRAINED_BLIND not in json.dumps(scores)
    assert SENTENCE not in " ".join(page.texts)
    assert not [name for name in rows[0] if "sight" in name or TRAINED_BLIND in name]


def test_a_control_adds_its_scores_and_changes_no_other(asked):
    before, old_rows, *_ = results(asked)
    asked.write_run("control", 5, origin={"control_of": "finetune"})
    index = json.loads((FINETUNE / "provenance.json").read_text())["index_sha256"]
    rewrite(CONTROL / "provenance.json", lambda values: values | {"index_sha256": index})
    scores, rows, page, _ = results(asked)
    assert without_control(scores) == before
    weights = json.loads((CONTROL / "provenance.json").read_text())["weights_sha256"]
    assert scores["controls"] == {TRAINED_BLIND: {"weights_sha256": weights}}
    for section in (scores["captions"], scores["answers"], *scores["pope"].values()):
        assert section[TRAINED_BLIND].keys() == section["blind"].keys()
        assert section["gains"][TRAINED_BLIND].keys() == section["gains"]["blind"].keys()
    # Stage 1 alone is no twin of it.
    assert TRAINED_BLIND not in scores["pretrain_only"]["captions"]
    assert [{name: row[name] for name in old_rows[0]} for row in rows] == old_rows
    assert SENTENCE in " ".join(page.texts)
    # Its texts are those of its own weights.
    wanted = [row[f"{TRAINED_BLIND}_prediction"] for row in rows if row["model"] == "finetune"]
    shutil.rmtree(FINETUNE)
    CONTROL.rename(FINETUNE)
    _, rows, *_ = results(asked)
    found = [row["prediction"] for row in rows if row["model"] == "finetune"]
    assert found == wanted
    assert found != [row["prediction"] for row in old_rows if row["model"] == "finetune"]


def test_what_the_control_answers_right_is_counted_and_listed(asked):
    make_control(FINETUNE)
    _, rows, *_ = results(asked)
    texts = {row["image_id"]: row["prediction"] for row in rows if row["kind"] == "answer"}
    # What it says of two images becomes the right answer.
    targets = dict(list(texts.items())[:2])
    write_index(
        asked, conversations=[(i, [("how many", targets.get(i) or "two")]) for i in sorted(texts)]
    )
    shutil.copy(FINETUNE / "provenance.json", CONTROL / "provenance.json")
    rewrite(CONTROL / "provenance.json", lambda values: values | {"control_of": "finetune"})
    scores, rows, page, _ = results(asked)
    for row in rows:
        if row["kind"] == "answer":
            said = row[f"{TRAINED_BLIND}_prediction"]
            assert row["right_without_sight"] == bool(exact_match(row["targets"][0], said))
    assert all(r["right_without_sight"] is None for r in rows if r["kind"] == "caption")
    right = [r["right_without_sight"] for r in rows if r["kind"] == "answer"]
    assert 0 < sum(right) < len(right)
    assert scores["answers"][TRAINED_BLIND]["exact_match"] == sum(right) / len(right)
    for subset, section in scores["pope"].items():
        yes_no = [r["right_without_sight"] for r in rows if r["subset"] == subset]
        assert section[TRAINED_BLIND]["accuracy"] == sum(yes_no) / len(yes_no)
    assert any(
        text.startswith(f"Answers: {sum(right)} of {len(right)}")
        and text.endswith("answered right without looking")
        for text in page.texts
    )


def test_a_model_that_ignores_the_picture_does_not_beat_it(asked):
    ignore_pictures(FINETUNE)
    make_control(FINETUNE)
    scores, _, page, _ = results(asked)
    for section in (scores["captions"], scores["answers"], *scores["pope"].values()):
        for gain in section["gains"][TRAINED_BLIND].values():
            assert (gain["gain"], gain["interval"]) == (0.0, [0.0, 0.0])
    text = " ".join(page.texts)
    assert "main scores gain over the model trained without sight" in text
    assert "Uses the picture" not in text


def test_a_control_of_stage_1_stands_beside_stage_1(asked):
    def untrained(values):
        return values | {"untrained": "there are no conversations"}

    shutil.rmtree(FINETUNE)
    shutil.copytree("runs/pretrain", FINETUNE)
    rewrite(FINETUNE / "provenance.json", untrained)
    make_control(Path("runs/pretrain"), "pretrain")
    scores, rows, *_ = results(asked)
    captions = scores["pretrain_only"]["captions"]
    assert captions[TRAINED_BLIND]["CIDEr"] == captions["CIDEr"]
    assert all(row[f"{TRAINED_BLIND}_prediction"] == row["prediction"] for row in rows)


def open_beside(world):
    runs = open_stages(world.params().section("llm", LlmSettings), world.store)
    return open_control(runs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("control_of", "pretrain"),
        ("control_of", ["finetune"]),
        ("start_projector_sha256", "0" * 64),
        ("index_sha256", {"captions.parquet": "0"}),
        ("features_fingerprint", "0" * 64),
        ("language_model", None),
    ],
)
def test_a_control_of_another_run_is_refused(asked, name, value):
    make_control(FINETUNE)
    rewrite(CONTROL / "provenance.json", lambda values: values | {name: value})
    with pytest.raises(StageError, match=f"runs/control: is no control of runs/finetune.*{name}"):
        open_beside(asked)


def test_a_control_with_other_settings_is_refused(asked):
    make_control(FINETUNE)
    rewrite(CONTROL / "params.yaml", lambda v: v | {"finetune": v["finetune"] | {"epochs": 7}})
    with pytest.raises(StageError, match=r"they differ in finetune.epochs 7"):
        open_beside(asked)


def test_a_setting_that_changes_no_bit_makes_no_other_control(asked):
    make_control(FINETUNE)
    saved = {"gradient_checkpointing": True}
    rewrite(CONTROL / "params.yaml", lambda v: v | {"finetune": v["finetune"] | saved})
    assert open_beside(asked).folder == CONTROL


def test_a_control_of_stage_2_without_an_adapter_is_refused(asked):
    """The stage's own adapter would answer in its place."""
    make_control(FINETUNE)
    shutil.rmtree(CONTROL / "adapter")
    rewrite(
        CONTROL / "provenance.json",
        lambda values: {name: v for name, v in values.items() if name != "weights_sha256"},
    )
    with pytest.raises(StageError, match=r"is no control of runs/finetune.*adapter"):
        open_beside(asked)


def test_without_a_control_there_is_none_to_open(asked):
    assert open_beside(asked) is None
    publish_none()
    assert open_beside(asked) is None
