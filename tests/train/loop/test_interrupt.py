import signal

import pytest

from train.loop import interrupt
from train.loop.interrupt import StopRequest

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _no_repeats(monkeypatch):
    monkeypatch.setattr(interrupt, "REPEAT_SECONDS", 0.0)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_that_is_sent_twice_at_once_is_one_request(number, monkeypatch):
    monkeypatch.setattr(interrupt, "REPEAT_SECONDS", 1000.0)
    with StopRequest() as stop:
        for _ in range(3):
            signal.raise_signal(number)
        assert stop.requested


def test_with_nohup_a_run_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_remembered_and_said_the_second_raises(number, capsys):
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        said = capsys.readouterr().err
        assert said.strip() == f"{number.name}: stopping after this step; again to stop at once"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_the_second_signal_may_be_the_other_one():
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_signals_mean_afterwards_what_they_meant_before(error):
    before = [signal.getsignal(number) for number in NUMBERS]
    try:
        with StopRequest():
            assert [signal.getsignal(number) for number in NUMBERS] != before
            if error:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_where_the_caller_can_save_the_first_signal_stops_at_once(number):
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt), stop.at_once():
            signal.raise_signal(number)
        assert stop.requested


def test_a_signal_that_came_before_stops_there_before_anything_is_done():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), stop.at_once():
            pytest.fail("goes on")


def test_behind_such_a_place_the_first_signal_is_only_remembered_again():
    with StopRequest() as stop:
        with stop.at_once():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
