"""Keeps the stream of a session's messages open until the session has been quiet for a while.

Gradio ends the stream with the last answer, and the page's script opens another one for its next
call unless it believes that the first is still open. The answer to a call that is made at that
moment would never arrive on the page: so the end is held back, and the messages of a call that
follows go on in the same stream.
"""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLOSE = b'"close_stream"'
"""In the last message of a stream."""
QUIET_SECONDS = 1.0
LOOK_SECONDS = 0.02
"""How often the calls of the session are looked at meanwhile."""


class MessageStream:
    """An ASGI application that answers with the messages of a session."""

    def __init__(self, messages: ASGIApp, has_calls: Callable[[], bool]) -> None:
        """Wrap Gradio's stream.

        Args:
            messages: Answers with the messages until no call is left.
            has_calls: Whether the session has a call that is not answered yet.
        """
        self._messages = messages
        self._has_calls = has_calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the messages, from as many of Gradio's streams as it takes."""
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
        """Whether the session makes a call within `QUIET_SECONDS`."""
        for _ in range(round(QUIET_SECONDS / LOOK_SECONDS)):
            if self._has_calls():
                return True
            await asyncio.sleep(LOOK_SECONDS)
        return False
