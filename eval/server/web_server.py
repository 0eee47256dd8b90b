"""Serves an ASGI application on a port of this machine, in its own thread."""

import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from workspace.errors import StageError

HOST = "127.0.0.1"
MAX_CONNECTIONS = 200
"""uvicorn answers further ones with 503."""
CLOSING_SECONDS = 1
"""Grace period for answers that are still being sent when the server stops."""
PERIOD_SECONDS = 30.0


def listen(port: int) -> socket.socket:
    """Bind a socket to a port of the loopback interface.

    Raises:
        StageError: The port is taken.
    """
    listener = socket.socket()
    try:
        # Otherwise a port stays unusable for a minute after a server's end.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise StageError(
            f"cannot serve at {HOST}:{port}: {error}. Choose another port with --port."
        ) from None
    return listener


class WebServer:
    """Serves on a socket that `listen` bound."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self.address = f"http://{HOST}:{listener.getsockname()[1]}/"
        config = uvicorn.Config(
            app,
            lifespan="on",
            # Any client can cause uvicorn's warnings and errors.
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
        """Start the thread, and wait until the server answers requests.

        Raises:
            StageError: The application does not start.
        """
        self._thread.start()
        while not self._server.started:
            if self._ended.is_set():
                raise StageError("the web server did not start.")
            time.sleep(0.01)

    def wait(self, periodically: Callable[[float], None]) -> None:
        """Block until the calling thread is interrupted.

        Args:
            periodically: Called every `PERIOD_SECONDS` with the time of the monotonic clock.

        Raises:
            StageError: The server ended by itself.
        """
        # Not Thread.join: an interrupted join can mark a running thread as ended (bpo-45274).
        while not self._ended.wait(PERIOD_SECONDS):
            periodically(time.monotonic())
        raise StageError("the web server ended by itself. Start it again.")

    def stop(self) -> None:
        """Stop the server, and wait for its thread."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._ended.set()
