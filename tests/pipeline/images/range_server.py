"""A web server on this machine that serves a folder and answers range requests."""

import contextlib
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class RangeHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; `server.ignores_ranges` and `server.faults` say what is wrong."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def __init__(self, owner, *arguments):
        self.owner = owner
        super().__init__(*arguments)

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.owner.folder / unquote(self.path).lstrip("/")
        status = self.owner.faults.pop(0) if self.owner.faults else 200
        if status == 200 and not path.exists():
            status = 404
        body = b"no" if status != 200 else b"<html>" if path.is_dir() else path.read_bytes()
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = None
        if wanted and status == 200 and not self.owner.ignores_ranges:
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(body))
            status, part = 206, f"bytes {start}-{end - 1}/{len(body)}"
            body = body[start:end]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        if self.command == "GET":
            self.owner.num_bytes += len(body)
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def log_message(self, *arguments):
        pass

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()


class RangeServer:
    """Serves a folder under `url`."""

    def __init__(self, folder):
        self.folder = folder
        self.faults = []
        self.ignores_ranges = False
        self.num_bytes = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, self))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *arguments: None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
