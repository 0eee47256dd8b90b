"""Reads the bodies of requests, bounded in size and time, whatever their headers announce."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from eval.server.refusal import Refusal

MAX_BUFFERED_BYTES = 2**27
"""Of all bodies that are being read or worked on."""
MAX_DISCARDED_BYTES = 2**26
"""Most that is read of a body that is too large, so that its sender gets to read the answer."""
SECONDS = 60.0


class BodyReader:
    """Reads bodies into memory; all of them together have a bound, too."""

    def __init__(self) -> None:
        self._num_buffered = 0

    @asynccontextmanager
    async def reading(self, request: Request, most: int) -> AsyncIterator[bytes]:
        """Give the body of a request, which counts as buffered until the block is left.

        Raises:
            Refusal: It has more than `most` bytes, takes too long, or there is no room for it now.
        """
        body = bytearray()
        try:
            await self._read(request, most, body)
            yield bytes(body)
        finally:
            self._num_buffered -= len(body)

    async def _read(self, request: Request, most: int, body: bytearray) -> None:
        num_bytes = 0
        try:
            async with asyncio.timeout(SECONDS):
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    if num_bytes > most + MAX_DISCARDED_BYTES:
                        break
                    if num_bytes <= most:
                        body += chunk
                        self._num_buffered += len(chunk)
                    if self._num_buffered > MAX_BUFFERED_BYTES:
                        raise Refusal(503, "The server is busy. Try again later.")
        except TimeoutError:
            raise Refusal(408, f"The body took more than {SECONDS:.0f} s.") from None
        if num_bytes > most:
            raise Refusal(413, f"The body has more than {most} bytes.")


async def only_file(body: bytes, scope: Scope) -> tuple[str, bytes]:
    """Return the name and the bytes of the one file of a form.

    Raises:
        Refusal: The body is no form with one file.
    """

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    request = Request(scope, replay(body, nothing))
    try:
        async with request.form(max_files=1, max_fields=1) as form:
            (file,) = form.getlist("files")
            if isinstance(file, UploadFile):
                return file.filename or "", await file.read()
    except (MultiPartException, LookupError, ValueError):
        pass
    raise Refusal(400, "Not a form with one file.")


def replay(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI `receive` that gives a body that was read already, and then goes on."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
