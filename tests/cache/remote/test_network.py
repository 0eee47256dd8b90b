"""Exceptions of several libraries are explained, and retried if another attempt can help."""

import errno
import socket

import pytest

from cache.errors import CorruptShardError, UnreachableStoreError
from cache.remote import network
from cache.remote.network import attempt, fault_of

URL = "s3://bucket/features/spec.json"


class ForeignError(Exception):
    """Of a library whose exceptions are not OSErrors; its attributes explain it."""

    def __init__(self, text="it failed", **attributes):
        super().__init__(text)
        self.__dict__ |= attributes


def with_cause(error, cause):
    error.__cause__ = cause
    return error


BOTOCORE = {"Error": {"Code": "403"}, "ResponseMetadata": {"HTTPStatusCode": 403}}

MEANINGS = [
    (ForeignError(status=403), "access is refused: 403 Forbidden"),
    (ForeignError(code="403"), "access is refused: 403 Forbidden"),
    (ForeignError(response=BOTOCORE), "access is refused: 403 Forbidden"),
    (ForeignError(response=ForeignError(status_code=401)), "access is refused: 401 Unauthorized"),
    (PermissionError("no such key for you"), "access is refused: no such key for you"),
    (PermissionError(errno.EACCES, "Permission denied"), "access is refused: Permission denied"),
    (ForeignError(status=500), "the server answers 500 Internal Server Error"),
    (ForeignError(status=599), "the server answers 599 unknown status"),
    (ForeignError(status=451), "the server answers 451 Unavailable For Legal Reasons"),
    (socket.gaierror(-2, "Name or service not known"), "the host is not found: Name or service"),
    (with_cause(FileNotFoundError("x"), ForeignError(status=500)), "the server answers 500"),
    (with_cause(FileNotFoundError("x"), ConnectionRefusedError()), "the host refuses connections"),
    (TimeoutError(), "no answer in time"),
    (with_cause(TimeoutError(), ForeignError()), "no answer in time"),
    (ConnectionResetError(errno.ECONNRESET, "reset"), "the connection was lost"),
    (ForeignError("no credentials"), "cannot be read: ForeignError: no credentials"),
    (OSError(errno.EIO, "Input/output error"), "cannot be read: [Errno 5] Input/output error"),
    (ForeignError(status=True), "cannot be read: ForeignError"),
    (ForeignError(code=7), "cannot be read: ForeignError"),
]


@pytest.mark.parametrize(("error", "reason"), MEANINGS, ids=lambda value: str(value)[:30])
def test_an_exception_says_what_it_means(error, reason):
    fault = fault_of(error)
    assert fault.reason.startswith(reason)
    assert not fault.is_missing
    assert fault.remedy.endswith(".")


@pytest.mark.parametrize(
    "error",
    [
        ForeignError(status=404),
        ForeignError(status=410),
        FileNotFoundError("x"),
        NotADirectoryError("x"),
        with_cause(FileNotFoundError("x"), ForeignError(status=404)),
        with_cause(FileNotFoundError("x"), KeyError("x")),
        ForeignError(response={"ResponseMetadata": {"HTTPStatusCode": 404}}),
    ],
)
def test_a_missing_file_is_reported_as_missing(error):
    assert fault_of(error).is_missing
    with pytest.raises(FileNotFoundError):
        attempt(raising([error]), URL, folder=None)


def raising(errors, calls=None):
    """An action that raises these one after the other, then returns."""
    left = list(errors)

    def action():
        if calls is not None:
            calls.append(1)
        if left:
            raise left.pop(0)
        return "done"

    return action


@pytest.fixture
def pauses(monkeypatch):
    waited = []
    monkeypatch.setattr(network.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_temporary_faults_are_retried_after_ever_longer_pauses(tmp_path, pauses, times):
    errors = [ForeignError(status=503)] * times
    assert attempt(raising(errors), URL, tmp_path) == "done"
    assert pauses == list(network.BACK_OFF[:times])
    assert sorted(network.BACK_OFF) == list(network.BACK_OFF)


def test_the_last_attempt_says_what_it_was_in_one_line(tmp_path, pauses):
    with pytest.raises(UnreachableStoreError) as caught:
        attempt(raising([ForeignError("a\n b")] * 9), URL, tmp_path)
    line = (
        f"{URL}: cannot be read: ForeignError: a b (4 attempts). Check the address and the network."
    )
    assert str(caught.value) == line
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_permanent_faults_are_not_retried(tmp_path, pauses, status):
    calls = []
    with pytest.raises((UnreachableStoreError, FileNotFoundError)):
        attempt(raising([ForeignError(status=status)] * 9, calls), URL, tmp_path)
    assert len(calls) == 1
    assert pauses == []


def test_retries_can_be_turned_off(tmp_path, pauses):
    with pytest.raises(UnreachableStoreError, match="503"):
        attempt(raising([ForeignError(status=503)]), URL, tmp_path, retry=False)
    assert pauses == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        CorruptShardError("ours"),
        KeyboardInterrupt(),
    ],
)
def test_errors_of_this_machine_pass_unchanged(tmp_path, pauses, error):
    with pytest.raises(type(error)) as caught:
        attempt(raising([error]), URL, tmp_path)
    assert caught.value is error
    assert pauses == []


def test_a_failure_to_write_the_copy_passes(tmp_path, pauses):
    error = OSError(errno.EIO, "Input/output error", str(tmp_path / "copy"))
    with pytest.raises(OSError, match="Input/output") as caught:
        attempt(raising([error]), URL, tmp_path)
    assert caught.value is error
