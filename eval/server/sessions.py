"""Gives each visitor sessions of their own, and keeps a session's message stream open long enough.

Gradio identifies a session by a hash that the browser chose, and accepts the hash from anybody. So
each browser also gets a random secret as a cookie; the secret's hash is the visitor's id, and
Gradio sees a session name made of both.
Clients without cookies share their sessions.
"""

import asyncio
import re
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SESSION_HASH = re.compile(r"[A-Za-z0-9_]{1,64}", re.ASCII)
"""Session hashes that the page's own script makes."""
CLOSE = b'"close_stream"'
"""Part of the last message of a stream."""
QUIET_SECONDS = 1.0
POLL_SECONDS = 0.02


def session_of(visitor: str, session_hash: str) -> str:
    """Return the session name that Gradio sees."""
    return f"{visitor}-{session_hash}"


def visitor_of_session(session: str) -> str:
    """Return the visitor id in a session name."""
    return session.partition("-")[0]


class MessageStream:
    """An ASGI application that sends a session's messages until no call came for a while.

    Gradio ends the stream with the last answer. The page's script opens a new stream for its next
    call, unless it believes that the old one is still open: the answer to a call made at that
    moment would never arrive. So the end is held back for `QUIET_SECONDS`, and the messages of a
    call made meanwhile go on in the same stream.
    """

    def __init__(self, messages: ASGIApp, has_calls: Callable[[], bool]) -> None:
        """Wrap Gradio's stream.

        Args:
            messages: Gradio's stream, which ends when no call is left.
            has_calls: Whether a call of the session is still unanswered.
        """
        self._messages = messages
        self._has_calls = has_calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the messages of as many of Gradio's streams as needed."""
        end: list[Message] = []
        is_started = False

        async def pass_on(message: Message) -> None:
            nonlocal is_started
            is_repeated = is_started and message["type"] == "http.response.start"
            is_started = True
            if end or CLOSE in message.get("body", b""):
                end.append(message)
            elif not is_repeated:
                await send(message)

        await self._messages(scope, receive, pass_on)
        while end and await self._is_called():
            end.clear()
            await self._messages(scope, receive, pass_on)
        for message in end:
            await send(message)

    async def _is_called(self) -> bool:
        """Return whether the session makes a call within `QUIET_SECONDS`."""
        for _ in range(round(QUIET_SECONDS / POLL_SECONDS)):
            if self._has_calls():
                return True
            await asyncio.sleep(POLL_SECONDS)
        return False
