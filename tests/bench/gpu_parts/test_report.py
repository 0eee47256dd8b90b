import json

import pytest

from bench.gpu_parts.report import Report, measured


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpu.json"


@pytest.fixture
def report(path, clock):
    return Report(
        path,
        seconds=60,
        about={"machine": "this one"},
        conclude=lambda parts: {"rows so far": sum(map(len, parts.values()))},
        clock=clock,
    )


def written(path):
    return json.loads(path.read_text())


def test_an_older_file_stays_until_the_first_row(report, path):
    path.write_text("older")
    with report.part("chip"):
        assert path.read_text() == "older"
        report.row("a row", 1, dict)
        found = written(path)
        assert found["machine"] == "this one"
        assert found["rows so far"] == 1


def test_a_row_with_a_number_that_is_not_finite_has_failed_and_the_next_one_runs(report, path):
    with report.part("chip"):
        assert report.row("broken", 1, lambda: {"loss": [1.0, float("nan")]}) is None
        assert report.row("fine", 1, lambda: {"loss": 1.0}) is not None
    rows = written(path)["parts"]["chip"]
    assert rows["broken"]["error"].startswith("ValueError: Out of range float values")
    assert rows["fine"]["loss"] == 1.0


def test_the_file_is_whole_after_every_row(report, path, clock):
    with report.part("chip"):
        for number in range(3):
            report.row(f"row {number}", 1, lambda number=number: {"value": number})
            clock.now += 1
            found = written(path)
            assert list(found["parts"]["chip"]) == [f"row {n}" for n in range(number + 1)]
            assert found["parts"]["chip"][f"row {number}"]["value"] == number
            assert found["rows so far"] == number + 1
    assert written(path)["parts"]["chip"]["whole part"] == {"seconds": 3.0}


def test_a_row_that_fails_is_recorded_in_one_line_and_the_next_one_runs(report, path):
    def fail():
        raise RuntimeError("CUDA out of memory.\n  Tried to allocate 7 GiB")

    with report.part("training"):
        assert report.row("first", 1, fail) is None
        assert report.row("second", 1, lambda: {"value": 2})["value"] == 2
    rows = written(path)["parts"]["training"]
    assert rows["first"]["error"] == "RuntimeError: CUDA out of memory. Tried to allocate 7 GiB"
    assert measured(rows, "first") is None
    assert measured(rows, "second")["value"] == 2


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(report, path):
    with report.part("first"):
        report.row("good", 1, lambda: {"value": 1})
        raise ValueError("no model")
    with report.part("second"):
        report.row("good", 1, lambda: {"value": 2})
    parts = written(path)["parts"]
    assert parts["first"]["good"]["value"] == 1
    assert parts["first"]["whole part"]["error"] == "ValueError: no model"
    assert parts["second"]["good"]["value"] == 2
    assert "error" not in parts["second"]["whole part"]


def test_an_interrupt_ends_the_run_and_leaves_the_file(report, path):
    def interrupt():
        raise KeyboardInterrupt

    def run():
        with report.part("chip"):
            report.row("good", 1, lambda: {"value": 1})
            report.row("stopped", 1, interrupt)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(written(path)["parts"]["chip"]) == ["good"]


def test_a_row_without_enough_time_is_skipped_and_a_shorter_one_runs(report, path, clock):
    clock.now += 50
    with report.part("sizes"):
        assert report.row("long", 11, lambda: pytest.fail("it was measured")) is None
        assert report.row("short", 10, lambda: {"value": 1})
        clock.now += 20
        report.row("late", 0, lambda: pytest.fail("it was measured"))
    rows = written(path)["parts"]["sizes"]
    assert rows["long"] == {"skipped": "takes about 11 s, 10 s are left"}
    assert rows["late"] == {"skipped": "takes about 0 s, 0 s are left"}
    assert measured(rows, "long") is None
    assert measured(rows, "no such row") is None
    assert measured(None, "no such part") is None
