"""A web server on this machine that serves a folder, with faults as planned."""

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; `server.faults` says for a file name what is wrong, and how often."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def __init__(self, folder, faults, requests, served, connections, *arguments):
        self.folder, self.faults, self.requests, self.served = folder, faults, requests, served
        connections.append(arguments[0])
        super().__init__(*arguments)

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        name = self.path.rsplit("/", 1)[-1]
        self.requests[self.command, name] += 1
        fault, argument = self.next_fault(name, with_body)
        path = self.folder / name
        status = 200 if path.is_file() else 404
        body = path.read_bytes() if status == 200 else b""
        headers = {}
        if status == 200 and (asked := self.headers.get("Range")) and fault != "whole":
            start, stop = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            stop = min(stop + 1, len(body))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            if fault == "slice":
                # As if the answer to another request came.
                start, stop = (n - argument for n in (start, stop))
                start, stop = (start, stop) if start >= 0 else (0, stop - start)
            status, body = 206, body[start:stop]
        if fault == "status":
            status, body = argument, b"no"
        if fault == "later":
            status, body, headers = argument, b"", {"Retry-After": "30"}
        if fault == "range":
            headers["Content-Range"] = argument
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "delay":
            time.sleep(argument)
        if fault == "flip" and with_body:
            body = bytearray(body)
            body[argument % len(body)] ^= 1
        if fault == "reset":
            # With no time to linger, closing sends a reset.
            option = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body and fault == "drip":
            with contextlib.suppress(OSError):
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(argument)
        elif with_body:
            cut = fault in ("cut", "stall")
            with contextlib.suppress(OSError):
                self.served.append((name, len(body)))
                self.wfile.write(body[: len(body) // 2] if cut else body)
                self.wfile.flush()
                if fault == "stall":
                    argument.wait(10)
            self.close_connection = cut

    def next_fault(self, name, with_body):
        kind, argument, left = self.faults.get(name, (None, None, 0))
        of_bodies = ("cut", "stall", "flip", "short", "slice", "whole", "delay", "drip")
        if left <= 0 or (kind in of_bodies and not with_body):
            return None, None
        self.faults[name] = kind, argument, left - 1
        return kind, argument

    def log_message(self, *arguments):
        pass

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()


class FaultServer:
    """Serves a folder; `fail(name, kind)` plans a fault."""

    def __init__(self, folder):
        self.faults = {}
        self.requests = Counter()
        self.served = []
        """Name and number of bytes of each answer with a body, faults included."""
        self._connections = []
        handler = partial(
            FaultyHandler, folder, self.faults, self.requests, self.served, self._connections
        )
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.handle_error = lambda *arguments: None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/features"

    def fail(self, name, kind, argument=None, times=10**6):
        self.faults[name] = kind, argument, times

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
