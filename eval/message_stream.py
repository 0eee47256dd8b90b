"""Keeps the stream of a session's messages open while the session has calls.

Gradio ends the stream when no call is left, and the page's script opens another one for its next
call unless it believes that the first is still open. A call that arrives in between would never be
answered on the page: so the end is held back, and the messages go on in the same stream.
"""

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLOSE = b'"close_stream"'
"""In the last message of a stream."""


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
        is_started = is_held_back = False

        async def pass_on(message: Message) -> None:
            nonlocal is_started, is_held_back
            if message["type"] == "http.response.start":
                if not is_started:
                    await send(message)
                is_started = True
            elif CLOSE in message.get("body", b"") and self._has_calls():
                is_held_back = True
            elif not is_held_back or message.get("more_body"):
                await send(message)

        await self._messages(scope, receive, pass_on)
        while is_held_back:
            is_held_back = False
            await self._messages(scope, receive, pass_on)
