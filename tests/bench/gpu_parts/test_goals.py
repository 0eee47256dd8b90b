from bench.gpu_parts import goals
from bench.gpu_parts.arithmetic import TRAIN_CAPTIONS
from bench.gpu_parts.goals import (
    BF16,
    COCO_STEP,
    COMPARED,
    GENERATION,
    NF4,
    OURS,
    PACKING,
    RIGHT,
    SIZES,
    TRAINING,
    USUAL,
    conclude,
    row_name,
)
from bench.step import FINETUNE, PRETRAIN


def row(rate, **others):
    found = {"texts_per_second": rate, "share_of_bf16": 0.1, "compilations": 0, "host_waits": 1}
    return found | others


def training_rows():
    return {
        row_name(NF4, PRETRAIN, COCO_STEP): row(TRAIN_CAPTIONS / 900),
        row_name(NF4, PRETRAIN, OURS + COMPARED): row(100.0),
        row_name(NF4, PRETRAIN, f"{USUAL}, batches of 32"): row(20.0),
        row_name(NF4, PRETRAIN, f"{PACKING}, supervised logits"): row(50.0),
        row_name(NF4, PRETRAIN, f"gradients of {OURS} and the {USUAL}"): {"difference": 0.01},
        row_name(BF16, PRETRAIN, OURS + COMPARED): row(100.0, share_of_bf16=0.3),
        row_name(BF16, FINETUNE, OURS + COMPARED): row(7.0, share_of_bf16=0.9),
    }


def test_stage_1_is_judged_beside_the_fastest_of_each_kind():
    parts = {TRAINING: training_rows()}
    first = conclude(parts)["goals"]
    assert first[f"stage 1, {NF4}: {OURS} / fastest {USUAL}"] == {
        "wanted": ">= 4.0", "found": 5.0, "met": True,
    }  # fmt: skip
    assert first[f"stage 1, {NF4}: {OURS} / fastest {PACKING}"]["found"] == 2.0
    # Nothing to compare with.
    assert not any(f"stage 1, {BF16}: {OURS} /" in name for name in first)
    parts[SIZES] = {row_name(NF4, PRETRAIN, f"{USUAL}, batches of 128"): row(50.0)}
    later = conclude(parts)["goals"]
    assert later[f"stage 1, {NF4}: {OURS} / fastest {USUAL}"] == {
        "wanted": ">= 4.0", "found": 2.0, "met": False,
    }  # fmt: skip


def test_the_share_of_the_chip_is_the_best_of_stage_1_in_bf16():
    parts = {TRAINING: training_rows()}
    name = "stage 1, bf16: share of the chip's bf16 rate"
    assert conclude(parts)["goals"][name]["found"] == 0.3
    parts[SIZES] = {row_name(BF16, PRETRAIN, f"{OURS}, 32768 a pass"): row(9.0, share_of_bf16=0.45)}
    assert conclude(parts)["goals"][name] == {"wanted": ">= 0.4", "found": 0.45, "met": True}


def test_an_epoch_takes_what_its_own_step_takes():
    found = conclude({TRAINING: training_rows()})
    name = "minutes of stage 1's epoch of coco.yaml"
    assert found["goals"][name] == {"wanted": "<= 30.0", "found": 15.0, "met": True}
    assert found["hours_of_coco_yaml"]["pretrain"] == 0.75
    assert found["hours_of_coco_yaml"]["total"] is None


def test_the_worst_row_decides_what_must_not_happen():
    rows = training_rows()
    rows[row_name(NF4, FINETUNE, OURS + COMPARED)] = row(1.0, compilations=2, host_waits=3)
    # A peer may wait as often as it likes.
    rows[row_name(NF4, FINETUNE, f"{USUAL}, batches of 16")] = row(1.0, host_waits=99)
    rows[row_name(NF4, FINETUNE, f"gradients of {OURS} and the {USUAL}")] = {"difference": 0.5}
    right = {"a": {"within": True}, "b": {"within": False}, "c": {"error": "no"}}
    found = conclude({TRAINING: rows, RIGHT: right})["goals"]
    assert found["compilations after the first steps"] == {
        "wanted": "<= 0", "found": 2, "met": False,
    }  # fmt: skip
    assert found["host waits of a step"]["found"] == 3
    assert found["difference of the gradients"]["found"] == 0.5
    assert found["comparisons with the CPU beyond their limits"]["found"] == 1


def test_rows_without_a_measurement_are_judged_nowhere():
    rows = {name: {"error": "RuntimeError: out of memory"} for name in training_rows()}
    assert conclude({TRAINING: rows, GENERATION: {"a": {"skipped": "no time"}}})["goals"] == {}
    assert conclude({})["goals"] == {}


def test_on_a_cpu_no_waits_are_known():
    rows = {row_name(NF4, PRETRAIN, OURS + COMPARED): row(1.0, host_waits=None)}
    assert "host waits of a step" not in goals.goals_of({TRAINING: rows}, {"pretrain": None})
