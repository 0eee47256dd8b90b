import logging

import pytest
from huggingface_hub import constants

from pipeline.towers import hub as module
from pipeline.towers.hub import hub_failure, logging_disabled, offline_if_hub_unreachable


class Session:
    """Answers a request, or raises."""

    def __init__(self, error=None):
        self.error, self.requests = error, 0

    def head(self, address, timeout):
        assert timeout <= 10
        self.requests += 1
        if self.error:
            raise self.error


@pytest.fixture
def session(monkeypatch):
    made = Session()
    monkeypatch.setattr(module, "get_session", lambda: made)
    return made


@pytest.mark.parametrize(
    "error",
    [OSError("no\nnetwork"), OSError(101, "no network"), RuntimeError("no network"), KeyError(1)],
)
def test_an_unreachable_hub_is_asked_only_once(session, error):
    session.error = error
    with offline_if_hub_unreachable() as failure:
        assert failure
        assert "\n" not in failure
        assert constants.is_offline_mode()
    assert session.requests == 1
    assert not constants.is_offline_mode()


def test_a_hub_that_answers_is_used(session):
    with offline_if_hub_unreachable() as failure:
        assert failure == ""
        assert not constants.is_offline_mode()


def test_an_interrupt_is_no_failure_of_the_hub(session):
    session.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        hub_failure()


def test_offline_mode_uses_the_local_cache_alone(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with offline_if_hub_unreachable() as failure:
        assert "HF_HUB_OFFLINE" in failure
    assert constants.is_offline_mode()


def test_nothing_is_logged_in_the_block_alone(caplog):
    with logging_disabled():
        logging.getLogger("library").error("inside")
    logging.getLogger("library").error("behind")
    assert [record.message for record in caplog.records] == ["behind"]
