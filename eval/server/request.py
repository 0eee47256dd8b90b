"""Checks the source of a request, and reads its body within bounds of size and time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HTTP_PORT = 80
MAX_BUFFERED_BYTES = 2**27
"""Of all bodies in memory together."""
MAX_DISCARDED_BYTES = 2**26
"""Read beyond the limit of a body and thrown away, so that the sender gets to read the answer."""
BODY_SECONDS = 60.0


class Refusal(Exception):
    """Ends a request with an HTTP status and a line of text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class AllowedSources:
    """The host names of this server; a request must come from its own page."""

    def __init__(self, port: int, share_host: str | None = None) -> None:
        """Allow this machine's names at a port, and the host of a public link."""
        ports = [f":{port}", ""] if port == HTTP_PORT else [f":{port}"]
        self._hosts = {name + end for name in LOOPBACK for end in (f":{port}", "")}
        self._origins = {f"http://{name}{end}" for name in LOOPBACK for end in ports}
        self._share_host = share_host
        if share_host is not None:
            self._hosts.add(share_host)
            self._origins.add(f"https://{share_host}")

    def check(self, headers: Headers, *, opens_page: bool) -> None:
        """Check the headers of a request.

        Args:
            headers: Host, Origin and the Sec-Fetch headers are read.
            opens_page: Whether the request is for the page itself, to which other pages may link.

        Raises:
            Refusal: The request names another host, or another web page sent it.
        """
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            raise Refusal(403, f"This server answers at {', '.join(sorted(self._origins))} only.")
        # Browsers send no Origin with images, frames and links, but Sec-Fetch-Site.
        site = headers.get("sec-fetch-site", "none")
        follows_link = opens_page and headers.get("sec-fetch-dest") == "document"
        if (
            len(origins) > 1
            or not self._origins.issuperset(map(str.lower, origins))
            or not (site in ("none", "same-origin") or follows_link)
        ):
            raise Refusal(403, "Other web pages cannot use this server.")

    def is_share(self, headers: Headers) -> bool:
        """Return whether a checked request came through the public link."""
        return headers["host"].lower() == self._share_host


class BodyReader:
    """Reads bodies into memory, with a bound on all of them together."""

    def __init__(self) -> None:
        self._num_buffered = 0

    @asynccontextmanager
    async def reading(self, request: Request, max_bytes: int) -> AsyncIterator[bytes]:
        """Give the body of a request; the body counts as buffered until the block is left.

        Raises:
            Refusal: The body has more than `max_bytes`, takes too long, or all bodies together
                exceed `MAX_BUFFERED_BYTES`.
        """
        body = bytearray()
        try:
            await self._read(request, max_bytes, body)
            yield bytes(body)
        finally:
            self._num_buffered -= len(body)

    async def _read(self, request: Request, max_bytes: int, body: bytearray) -> None:
        num_bytes = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    if num_bytes > max_bytes + MAX_DISCARDED_BYTES:
                        break
                    if num_bytes <= max_bytes:
                        body += chunk
                        self._num_buffered += len(chunk)
                    if self._num_buffered > MAX_BUFFERED_BYTES:
                        raise Refusal(503, "The server is busy. Try again later.")
        except TimeoutError:
            raise Refusal(408, f"The body took more than {BODY_SECONDS:.0f} s.") from None
        if num_bytes > max_bytes:
            raise Refusal(413, f"The body has more than {max_bytes} bytes.")


async def read_form_file(body: bytes, scope: Scope) -> tuple[str, bytes]:
    """Return the name and the bytes of the single file in a multipart form.

    Raises:
        Refusal: The body is not such a form.
    """

    async def disconnected() -> Message:
        return {"type": "http.disconnect"}

    request = Request(scope, replay(body, disconnected))
    try:
        async with request.form(max_files=1, max_fields=1) as form:
            (file,) = form.getlist("files")
            if isinstance(file, UploadFile):
                return file.filename or "", await file.read()
    except (MultiPartException, LookupError, ValueError):
        pass
    raise Refusal(400, "Not a form with one file.")


def replay(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI `receive` that first gives a body that was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
