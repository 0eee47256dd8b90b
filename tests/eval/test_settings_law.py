"""Every setting of the evaluation changes what is asked or said."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import eval.scoring.generation
from cache.errors import PatchcacheError
from eval.evaluate import evaluate
from eval.settings import EvaluateSettings
from pipeline.indexing.tables import SCHEMAS
from tests.conftest import HOLDOUT, TRAIN, VAL
from tests.settings_law import ODD_NUMBERS, leaves

pytestmark = pytest.mark.slow("evaluates once for each setting")

CHANGES = {
    "evaluate.caption_images": 2,
    "evaluate.questions": 2,
    "evaluate.pope_images": 1,
    "evaluate.caption_question": "What is where",
    "evaluate.caption_tokens": 3,
    "evaluate.answer_tokens": 2,
    "evaluate.max_text_tokens": 20,
    "evaluate.exclude_contaminated": False,
    "evaluate.stages": ["finetune"],
    "evaluate.minutes": 1e-9,
}
"""A value of each setting that is not the one of `tests/eval/conftest.py`."""

ONLY_ROUNDING = {"evaluate.batch_size": 5}
"""How many texts are made beside each other: it changes the passes, and the texts only where two
tokens are equally likely but for the last bits."""

NUMBERS = [
    (leaf, value)
    for leaf, wanted in leaves(EvaluateSettings, "evaluate").items()
    for value in ODD_NUMBERS.get(wanted, ())
]


@pytest.fixture
def observe(world, monkeypatch):
    """Evaluate with a setting changed and return what came of it, and what was asked for."""
    # One captioned image is trained on as well.
    captions = [
        (i, split, "a red cat") for split, ids in (("train", TRAIN), ("val", VAL)) for i in ids
    ]
    said = [("What is on the box", "a red cat"), ("how many", "the dog")]
    turns = [
        (i, split, said) for split, ids in (("train", TRAIN), ("holdout", HOLDOUT)) for i in ids
    ]
    world.workspace.write_index(captions, [*turns, (VAL[0], "train", said)])
    questions = [
        {"question_id": f"{i}{label}", "image_id": i, "subset": "random", "label": label}
        | {"question": f"Is {label} a dog"}
        for i in VAL
        for label in ("yes", "no")
    ]
    table = pa.Table.from_pylist(questions, SCHEMAS["pope"])
    pq.write_table(table, "data/index/pope.parquet")
    batches = []
    generate = eval.scoring.generation.generate

    def generated(*arguments, batch_size, **named):
        batches.append(batch_size)
        return generate(*arguments, batch_size=batch_size, **named)

    monkeypatch.setattr(eval.scoring.generation, "generate", generated)

    def run(changes):
        batches.clear()
        shutil.rmtree("reports", ignore_errors=True)
        evaluate(world.params(evaluate=changes))
        return {
            "scores": json.loads(Path("reports/eval.json").read_bytes()),
            "texts": pq.read_table("reports/predictions.parquet").to_pylist(),
            "batches": list(batches),
        }

    return run


@pytest.fixture(scope="module")
def usual():
    """What was observed without a change, once it was."""
    return {}


@pytest.mark.parametrize("leaf", [*CHANGES, *ONLY_ROUNDING])
def test_a_setting_changes_what_is_asked_or_said(observe, usual, leaf):
    if not usual:
        usual.update(observe({}))
    name = leaf.partition(".")[2]
    changed = observe({name: (CHANGES | ONLY_ROUNDING)[leaf]})
    assert changed != usual, "the setting is not wired to anything"
    if leaf in ONLY_ROUNDING:
        assert changed["batches"] != usual["batches"]
        about = ("model", "kind", "subset", "image_id", "question")
        asked = [[[row[key] for key in about] for row in one["texts"]] for one in (usual, changed)]
        assert asked[0] == asked[1]
    else:
        assert changed["scores"] != usual["scores"]


def test_the_same_settings_make_the_same_evaluation(observe):
    assert observe({}) == observe({})


@pytest.mark.parametrize(("leaf", "value"), NUMBERS)
def test_an_odd_number_is_refused_by_name_or_works(observe, leaf, value):
    name = leaf.partition(".")[2]
    try:
        observe({name: value})
    except PatchcacheError as error:
        refusal = str(error)
    else:
        return
    assert "\n" not in refusal
    assert name in refusal
