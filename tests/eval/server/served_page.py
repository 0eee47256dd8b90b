"""The served page in its own process, and a client that sends raw HTTP requests."""

import itertools
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import requests

ROOT = Path(__file__).parents[3]
SECONDS = 60
MAX_UPLOADS = 20
"""A lower limit than the command's."""
SAMPLES = {"path": "x", "path_or_url": "x", "url_path": "x", "size": "1", "ext": "ts"}
"""Values of path parameters in Gradio's routes; other parameters get a word."""
COMMAND = f"""
import json
from pathlib import Path
from eval import serve
from eval.server import pictures
from tests.eval.server.served_page import gradio_routes

pictures.MAX_UPLOADS = {MAX_UPLOADS}
make_app = serve.make_app

def make_and_note(page):
    app = make_app(page)
    Path("routes.json").write_text(json.dumps(sorted(gradio_routes(page.app))))
    return app

serve.make_app = make_and_note
serve.main()
"""
"""Runs the command, and writes Gradio's routes to a file."""
TIMES = {
    "event_id",
    "duration",
    "average_duration",
    "cache_duration",
    "eta",
    "rank_eta",
    "avg_time",
}
sessions = itertools.count()


@dataclass
class Served:
    """A served page."""

    address: str
    uploads: Path
    errors: Path
    """File with the server's stderr."""
    routes: list[tuple[str, str]]
    """Method and path of each of Gradio's routes."""
    functions: dict[str, int]
    """Number of each function of the page."""
    example: str


@dataclass
class Client:
    """One visitor."""

    served: Served
    http: requests.Session = field(default_factory=requests.Session)
    session_hash: str = field(default_factory=lambda: f"session{next(sessions)}")

    def send(self, method, path, **options):
        """Send a request without following redirects."""
        return self.http.request(
            method, self.served.address.rstrip("/") + path, allow_redirects=False,
            timeout=SECONDS, **options,
        )  # fmt: skip

    def upload(self, data, name="1.jpg"):
        """Upload a file, and return its path."""
        answer = self.send("POST", "/gradio_api/upload", files={"files": (name, data)})
        assert answer.status_code == 200, answer.text
        return answer.json()[0]

    def join(self, name, values, **changes):
        """Call a function of the page through the queue."""
        call = {"data": values, "fn_index": self.served.functions[name]}
        body = call | {"session_hash": self.session_hash} | changes
        return self.send("POST", "/gradio_api/queue/join", json=body)

    def call(self, name, values, **changes):
        """Call a function, and return what the page is told: messages without times and ids."""
        assert self.join(name, values, **changes).status_code == 200
        query = {"session_hash": self.session_hash}
        answer = self.send("GET", "/gradio_api/queue/data", params=query, stream=True)
        lines = [line[6:] for line in answer.iter_lines() if line.startswith(b"data: ")]
        return [without_times(json.loads(line)) for line in lines]

    def begin(self, path, **more):
        """Choose a picture by its path."""
        return self.call("choose_picture", [{"path": path, **more}])

    def reply(self, question):
        """Ask, and return the messages as text."""
        return json.dumps(self.call("reply", [question, None, 0, 5]))


def without_times(message):
    """Return a message without the fields that differ between equal calls."""
    if isinstance(message, dict):
        return {k: without_times(v) for k, v in message.items() if k not in TIMES}
    return [without_times(v) for v in message] if isinstance(message, list) else message


@contextmanager
def served_page(root, port, temporary):
    """Serve the fine-tuned run of a folder."""
    errors = temporary / "errors.txt"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "--run", "runs/finetune", "--port", str(port)],
            cwd=root, stdout=subprocess.PIPE, stderr=stderr, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        )  # fmt: skip
    try:
        said = process.stdout.readline()
        assert said.startswith("serve: "), errors.read_text()
        address = said.removeprefix("serve: ").strip()
        config = requests.get(f"{address}config", timeout=SECONDS).json()
        (folder,) = temporary.glob("patchcache-*")
        yield Served(
            address, folder / "uploads", errors,
            [tuple(route) for route in json.loads((root / "routes.json").read_text())],
            {call["api_name"]: call["id"] for call in config["dependencies"]},
            str(next(path for path in (folder / "gradio").rglob("*.jpg"))),
        )  # fmt: skip
    finally:
        process.kill()
        process.communicate()


def gradio_routes(app):
    """Yield method and path of every route of Gradio's."""
    for methods, path in walk(app.routes):
        sample = re.sub(r"{(\w+)(:path)?}", lambda m: SAMPLES.get(m[1], "word"), path)
        for method in methods:
            yield method, sample


def walk(routes):
    """Yield the methods and the path of routes, and of those in routers among them."""
    for route in routes:
        if hasattr(route, "methods"):
            yield route.methods, route.path
        elif hasattr(route, "original_router"):
            yield from walk(route.original_router.routes)
