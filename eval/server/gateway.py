"""An ASGI application around Gradio's that answers only the requests that the page itself makes.

All other endpoints of Gradio are refused. Uploads and pictures are answered here, without Gradio.
Calls, sessions and headers are reduced to what the page's own script would send.
"""

import asyncio
import hashlib
import json
import mimetypes
import re
import secrets
import sys

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cache.files.foreign import describe
from eval.server.calls import UnknownFunctionError, clean_call
from eval.server.pictures import MAX_UPLOAD_BYTES, PagePictures
from eval.server.request import AllowedSources, BodyReader, Refusal, read_form_file, replay
from eval.server.sessions import SESSION_HASH, MessageStream, session_of
from workspace.errors import StageError

API = "/gradio_api"
STATIC = re.compile(r"/(assets|static)(/[\w@-][\w@.-]{0,99}){1,6}", re.ASCII)
FIXED = {"/theme.css", "/favicon.ico", "/config", f"{API}/info", f"{API}/app_id"}
"""Paths with the same answer for every visitor. The page polls app_id to detect a restart."""
FORWARDED_HEADERS = (b"host", b"accept", b"accept-encoding")
"""Gradio sees no other header, such as X-Forwarded-Host or Range."""
MAX_CALL_BYTES = 2**16
MAX_FORM_BYTES = MAX_UPLOAD_BYTES + 2**16


class Gateway:
    """The outer application of the server."""

    def __init__(
        self,
        app: ASGIApp,
        page: gr.Blocks,
        pictures: PagePictures,
        sources: AllowedSources,
        port: int,
    ) -> None:
        self._app = app
        self._page = page
        self._pictures = pictures
        self._sources = sources
        # Browsers share cookies between the ports of a host.
        self._cookie = f"patchcache-{port}"
        self._bodies = BodyReader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with one line of text."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        is_started = False

        async def tracked_send(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            response = await self._respond(Request(scope, receive))
            await response(scope, receive, tracked_send)
        except (ClientDisconnect, asyncio.CancelledError):
            # The client left, or the server stops.
            pass
        except Refusal as refusal:
            await PlainTextResponse(str(refusal), refusal.status)(scope, receive, send)
        except Exception as error:
            # A client must not fill the terminal with Gradio's tracebacks.
            target = f"{scope['method']} {scope['path']}"[:200]
            print(f"serve: {target!a}: {describe(error)}", file=sys.stderr, flush=True)
            if not is_started:
                await PlainTextResponse("error", 500)(scope, receive, send)

    async def _respond(self, request: Request) -> ASGIApp:
        method, path = request.method, request.scope["path"]
        self._sources.check(request.headers, opens_page=(method, path) == ("GET", "/"))
        if method in ("GET", "HEAD"):
            return self._respond_to_get(request, path)
        if method == "POST" and path == f"{API}/upload":
            return await self._upload(request)
        if method == "POST" and path in (f"{API}/queue/join", f"{API}/run/predict"):
            return await self._call(request, queued=path.endswith("join"))
        raise _not_found()

    def _respond_to_get(self, request: Request, path: str) -> ASGIApp:
        if path == "/":
            # Forwarded without the query, where Gradio would look for a saved state.
            return self._forward(request, sets_cookie=self._cookie not in request.cookies)
        if path in FIXED or STATIC.fullmatch(path):
            return self._forward(request)
        if path.startswith(f"{API}/file="):
            return self._picture(request, path.removeprefix(f"{API}/file="))
        if path.startswith(f"{API}/heartbeat/"):
            session = self._session(request, path.removeprefix(f"{API}/heartbeat/"))
            return self._forward(request, path=f"{API}/heartbeat/{session}")
        if path == f"{API}/queue/data":
            return self._messages(request)
        if path == f"{API}/upload_progress":
            # The page asks for progress while an upload runs; no progress is reported.
            return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")
        raise _not_found()

    def _messages(self, request: Request) -> ASGIApp:
        session = self._session(request, request.query_params.get("session_hash", ""))
        # Gradio fails for a session without calls.
        if session not in self._page._queue.pending_messages_per_session:
            raise _not_found()
        messages = self._forward(request, query=f"session_hash={session}")

        def has_calls() -> bool:
            return bool(self._page._queue.pending_event_ids_session.get(session))

        return MessageStream(messages, has_calls)

    def _picture(self, request: Request, path: str) -> Response:
        try:
            name, data = self._pictures.read(path, self._visitor(request))
        except StageError:
            raise Refusal(403, "not allowed") from None
        media_type = mimetypes.guess_type(name)[0] or ""
        headers = {"x-content-type-options": "nosniff", "cache-control": "private, no-store"}
        # A browser would run the scripts of an HTML or SVG document in the visitor's session.
        if not media_type.startswith("image/") or "xml" in media_type:
            media_type = "application/octet-stream"
            headers["content-disposition"] = "attachment"
        return Response(data, media_type=media_type, headers=headers)

    async def _upload(self, request: Request) -> Response:
        async with self._bodies.reading(request, MAX_FORM_BYTES) as body:
            name, data = await read_form_file(body, request.scope)
        if len(data) > MAX_UPLOAD_BYTES:
            raise Refusal(413, f"The file has more than {MAX_UPLOAD_BYTES} bytes.")
        try:
            path = self._pictures.add_upload(name, data, self._visitor(request))
        except OSError as error:
            raise Refusal(507, f"The file cannot be stored: {error.strerror}.") from None
        return JSONResponse([path])

    async def _call(self, request: Request, *, queued: bool) -> ASGIApp:
        async with self._bodies.reading(request, MAX_CALL_BYTES) as body:
            try:
                call = clean_call(self._page, body, queued=queued)
            except UnknownFunctionError:
                raise _not_found() from None
            except ValueError:
                raise Refusal(400, "Not a call that the page makes.") from None
        call["session_hash"] = self._session(request, call["session_hash"])
        return self._forward(request, body=json.dumps(call).encode())

    def _visitor(self, request: Request) -> str:
        secret = request.cookies.get(self._cookie, "")
        return hashlib.sha256(secret.encode()).hexdigest()[:32]

    def _session(self, request: Request, session_hash: str) -> str:
        if not SESSION_HASH.fullmatch(session_hash):
            raise _not_found()
        return session_of(self._visitor(request), session_hash)

    def _forward(
        self,
        request: Request,
        *,
        path: str | None = None,
        query: str = "",
        body: bytes = b"",
        sets_cookie: bool = False,
    ) -> ASGIApp:
        """Return Gradio's answer to a request of which it sees only the necessary parts."""
        path = path or request.scope["path"]
        headers = [pair for pair in request.scope["headers"] if pair[0] in FORWARDED_HEADERS]
        if self._sources.is_share(request.headers):
            headers.append((b"x-forwarded-proto", b"https"))
        if body:
            headers.append((b"content-type", b"application/json"))
            headers.append((b"content-length", str(len(body)).encode()))
        reduced = {"path": path, "raw_path": path.encode(), "query_string": query.encode()}

        async def forward(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_with_cookie(message: Message) -> None:
                if sets_cookie and message["type"] == "http.response.start":
                    cookie = f"{self._cookie}={secrets.token_urlsafe(32)}"
                    attributes = "HttpOnly; SameSite=Lax; Path=/"
                    MutableHeaders(scope=message).append("set-cookie", f"{cookie}; {attributes}")
                await send(message)

            inner_scope = {**scope, **reduced, "headers": headers}
            await self._app(inner_scope, replay(body, receive), send_with_cookie)

        return forward


def _not_found() -> Refusal:
    """Return the same refusal for what does not exist and for what belongs to others."""
    return Refusal(404, "not found")
