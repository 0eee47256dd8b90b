import csv
import json
import time

import pytest

from tests.train.stage_server import without_speeds
from train.loop.history import History
from train.loop.step import StepData
from train.run import HISTORY_COLUMNS, RunDirectory

STEP = {"learning_rate": 0.1, "waited": 0.0}


def data(learned, positions=40, images=2, cut=0):
    """The counts of a step, without tensors."""
    return StepData([], list(range(images)), learned, positions, 2 * positions, cut)


@pytest.fixture
def run(workspace):
    return RunDirectory("pretrain", workspace.params(), {}, {})


def read(run):
    with (run.files / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_columns_are_those_that_plots_and_report_read():
    assert HISTORY_COLUMNS == (
        "step", "loss", "validation_loss", "learning_rate", "tokens_per_second",
        "images_per_second", "data_wait_share", "peak_memory_gib",
    )  # fmt: skip


def test_a_row_without_validation_has_an_empty_cell(run, tracker):
    history = History(run, tracker)
    for step, validation in ((1, None), (2, 1.5), (3, None)):
        history.add(data(3), loss_sum=6.0, **STEP)
        history.write(step, validation)
    rows = read(run)
    assert tuple(rows[0]) == HISTORY_COLUMNS
    assert [row["validation_loss"] for row in rows] == ["", "1.5", ""]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(cell for row in rows for name, cell in row.items() if name != "validation_loss")
    assert (run.files / "history.csv").read_bytes().count(b"\r") == 0


def test_a_row_is_the_token_mean_of_its_own_steps(run, tracker):
    history = History(run, tracker)
    history.add(data(1), loss_sum=10.0, **STEP)
    history.add(data(5), loss_sum=2.0, **STEP)
    history.write(2, None)
    history.add(data(3), loss_sum=9.0, **STEP)
    history.write(3, None)
    assert [float(row["loss"]) for row in read(run)] == [2.0, 3.0]


def test_the_file_is_whole_after_every_row(run, tracker):
    history = History(run, tracker)
    for step in (1, 2, 3):
        history.add(data(1), loss_sum=1.0, **STEP)
        history.write(step, None)
        assert len(read(run)) == step
        assert not list(run.files.glob(".*"))


def test_the_summary_is_the_last_row_and_the_whole_runs_speed(run, tracker):
    history = History(run, tracker)
    history.add(data(1), loss_sum=1.0, **STEP)
    history.write(1, 0.5)
    assert history.summary()["validation_loss"] == 0.5
    history.add(data(2, cut=3), loss_sum=4.0, **STEP)
    history.write(2, None)
    summary = history.summary()
    assert summary["texts_cut"] == 3
    assert (summary["steps"], summary["loss"]) == (2, 2.0)
    assert "validation_loss" not in summary
    assert summary["real_positions"] == 0.5
    assert all(isinstance(value, int | float) for value in summary.values())


def test_a_row_has_the_learning_rate_of_its_last_step(run, tracker):
    history = History(run, tracker)
    for rate in (0.1, 0.3, 0.2):
        history.add(data(1), loss_sum=1.0, learning_rate=rate, waited=0.0)
    history.write(3, None)
    assert read(run)[0]["learning_rate"] == "0.2"


def test_waiting_is_a_share_of_the_time_of_the_steps(run, tracker):
    history = History(run, tracker)
    history.add(data(1), loss_sum=1.0, learning_rate=0.1, waited=0.0)
    history.write(1, None)
    assert float(read(run)[0]["data_wait_share"]) == 0
    time.sleep(0.02)
    history.add(data(1), loss_sum=1.0, learning_rate=0.1, waited=0.01)
    history.write(2, None)
    assert 0 < float(read(run)[1]["data_wait_share"]) <= 0.5
    assert float(read(run)[1]["tokens_per_second"]) < 40 / 0.02


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_history_that_goes_on_elsewhere_says_the_same(run, tracker, stop):
    """It goes through JSON, at every place, in the middle of a row too."""

    def step(history, number):
        rate = 1e-3 / number
        history.add(data(number, cut=1), loss_sum=number * 0.1 / 3, learning_rate=rate, waited=0.0)
        if number % 2 == 0 or number == 5:
            history.write(number, 1 / 3 if number == 4 else None)

    whole = History(run, tracker)
    for number in range(1, 6):
        step(whole, number)
    rows, summary = read(run), whole.summary()
    first = History(run, tracker)
    for number in range(1, stop + 1):
        step(first, number)
    state = json.loads(json.dumps(first.state()))
    (run.files / "history.csv").unlink()
    second = History(run, tracker)
    second.restore(state)
    assert len(read(run)) == (3 if stop == 5 else stop // 2), "rows are there at once"
    for number in range(stop + 1, 6):
        step(second, number)
    assert [without_speeds(row) for row in read(run)] == [without_speeds(row) for row in rows]
    same = "loss", "steps", "texts_cut", "real_positions"
    assert [second.summary()[name] for name in same] == [summary[name] for name in same]


def test_a_state_does_not_change_when_the_run_goes_on(run, tracker):
    history = History(run, tracker)
    history.add(data(1), loss_sum=1.0, **STEP)
    state = history.state()
    before = json.dumps(state)
    history.write(1, None)
    history.add(data(1), loss_sum=1.0, **STEP)
    assert json.dumps(state) == before
