"""Runs an ASGI application at a port of this machine, in a thread of its own."""

import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from workspace.errors import StageError

HOST = "127.0.0.1"
MAX_CONNECTIONS = 200
"""More are answered with 503."""
CLOSING_SECONDS = 1
"""Answers that are still being sent at the end have so long."""
PERIOD_SECONDS = 30.0


def listen(port: int) -> socket.socket:
    """Take a port of this machine.

    Raises:
        StageError: The port is taken.
    """
    listener = socket.socket()
    try:
        # A port that was used a moment ago can be taken again.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise StageError(
            f"cannot serve at {HOST}:{port}: {error}. Name another one: --port."
        ) from None
    return listener


class WebServer:
    """A server at a port that is taken already."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self.address = f"http://{HOST}:{listener.getsockname()[1]}/"
        config = uvicorn.Config(
            app,
            lifespan="on",
            # Its warnings and errors are what any client can cause.
            log_level="critical",
            ws="none",
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start, and return when requests are answered.

        Raises:
            StageError: The application does not start.
        """
        self._thread.start()
        while not self._server.started:
            if self._ended.is_set():
                raise StageError("the web server did not start.")
            time.sleep(0.01)

    def wait(self, periodically: Callable[[float], None]) -> None:
        """Wait for ever, or until the waiting thread is interrupted.

        Args:
            periodically: Is called with the monotonic clock's time now and then.

        Raises:
            StageError: The server ended by itself.
        """
        # Not by joining the thread: an interrupted join can take it for ended (bpo-45274).
        while not self._ended.wait(PERIOD_SECONDS):
            periodically(time.monotonic())
        raise StageError("the web server ended by itself. Start it again.")

    def stop(self) -> None:
        """End the server, and wait for it."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._ended.set()
