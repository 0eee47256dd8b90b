"""The message stream of a session stays open for calls made soon after an answer."""

import asyncio

import pytest

from eval.server import sessions
from eval.server.sessions import MessageStream

START = {"type": "http.response.start", "status": 200, "headers": []}
CLOSE = b'data: {"msg":"close_stream"}\n\n'


@pytest.fixture(autouse=True)
def _soon_quiet(monkeypatch):
    monkeypatch.setattr(sessions, "QUIET_SECONDS", 0.1)


def streamed(bodies, looks):
    """What is sent of streams with these bodies; `looks` says at each look whether there are calls,
    and of all later ones that there are none.
    """
    streams, calls, sent = iter(bodies), iter(looks), []

    async def messages(scope, receive, send):
        await send(START)
        for body in (next(streams), CLOSE):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message):
        sent.append(message)

    asyncio.run(MessageStream(messages, lambda: next(calls, False))({}, None, send))
    return sent


def test_a_stream_without_further_calls_is_unchanged():
    sent = streamed([b"one"], [])
    assert sent[0] == START
    assert [message["body"] for message in sent[1:]] == [b"one", CLOSE, b""]


def test_a_stream_goes_on_while_there_are_calls_and_ends_once():
    sent = streamed([b"one", b"two", b"three"], [True, False, False, True])
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert [message["body"] for message in sent[1:]] == [b"one", b"two", b"three", CLOSE, b""]
    assert [message["more_body"] for message in sent[1:]] == [True, True, True, True, False]
