import csv

import pytest

from train.history import History
from train.run import HISTORY_COLUMNS, RunDirectory
from train.step import StepData


def data(learned, positions=40, images=2, cut=0):
    """The counts of a step, without tensors."""
    return StepData([], list(range(images)), learned, positions, cut)


@pytest.fixture
def run(workspace):
    return RunDirectory("pretrain", workspace.params(), {})


def read(run):
    with (run.path / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_columns_are_those_that_plots_and_report_read():
    assert HISTORY_COLUMNS == (
        "step", "loss", "validation_loss", "learning_rate", "tokens_per_second",
        "images_per_second", "data_wait_share", "peak_memory_gib",
    )  # fmt: skip


def test_a_row_without_validation_has_an_empty_cell(run, tracker):
    history = History(run, tracker)
    for step, validation in ((1, None), (2, 1.5), (3, None)):
        history.add(data(3), loss_sum=6.0, waited=0.0)
        history.write(step, 0.1, validation)
    rows = read(run)
    assert tuple(rows[0]) == HISTORY_COLUMNS
    assert [row["validation_loss"] for row in rows] == ["", "1.5", ""]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(cell for row in rows for name, cell in row.items() if name != "validation_loss")
    assert (run.path / "history.csv").read_bytes().count(b"\r") == 0


def test_a_row_is_the_token_mean_of_its_own_steps(run, tracker):
    history = History(run, tracker)
    history.add(data(1), loss_sum=10.0, waited=0.0)
    history.add(data(5), loss_sum=2.0, waited=0.0)
    history.write(2, 0.1, None)
    history.add(data(3), loss_sum=9.0, waited=0.0)
    history.write(3, 0.1, None)
    assert [float(row["loss"]) for row in read(run)] == [2.0, 3.0]


def test_the_file_is_whole_after_every_row(run, tracker):
    history = History(run, tracker)
    for step in (1, 2, 3):
        history.add(data(1), loss_sum=1.0, waited=0.0)
        history.write(step, 0.1, None)
        assert len(read(run)) == step
        assert not list(run.path.glob(".*"))


def test_the_summary_is_the_last_row_and_the_whole_runs_speed(run, tracker):
    history = History(run, tracker)
    history.add(data(1), loss_sum=1.0, waited=0.0)
    history.write(1, 0.1, 0.5)
    assert history.summary()["validation_loss"] == 0.5
    history.add(data(2, cut=3), loss_sum=4.0, waited=0.0)
    history.write(2, 0.1, None)
    summary = history.summary()
    assert summary["texts_cut"] == 3
    assert (summary["steps"], summary["loss"]) == (2, 2.0)
    assert "validation_loss" not in summary
