"""A server on this machine that answers what `huggingface_hub` asks the Hub to read a repository.

The answers have the fields and headers that the client of the locked version reads. It cannot be
written to: a repository is a folder that is served.
"""

import json
import threading
from collections import Counter
from functools import partial
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40
TOKEN = "hf_of_a_reader"


class Repository(NamedTuple):
    folder: Path
    is_private: bool = False
    """Only for `TOKEN`; anybody else is told that there is none."""
    is_gated: bool = False
    """What it is, and its files' names, are for all, the files only for `TOKEN`."""


class HubHandler(BaseHTTPRequestHandler):
    """Answers for `server.repositories`: "datasets/<owner>/<name>" or "buckets/<owner>/<name>"."""

    protocol_version = "HTTP/1.1"

    def __init__(self, repositories, requests, *arguments):
        self.repositories, self.requests = repositories, requests
        super().__init__(*arguments)

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        words = [unquote(word) for word in urlsplit(self.path).path.strip("/").split("/")]
        is_api = words[0] == "api"
        kind, owner, name, *rest = [*words[is_api:], "", ""]
        rest = rest[:-2] if len(words) > 2 + is_api else []
        self.requests[self.command, "/".join(words)] += 1
        repository = self.repositories.get(f"{kind}/{owner}/{name}")
        is_reader = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.is_private and not is_reader):
            # The Hub tells a reader that is logged in 404, anybody else 401.
            self.refuse(404 if "Authorization" in self.headers else 401, "RepoNotFound")
        elif is_api:
            self.answer_api(repository, f"{owner}/{name}", kind, rest, body)
        elif repository.is_gated and not is_reader:
            self.refuse(403 if "Authorization" in self.headers else 401, "GatedRepo")
        else:
            self.answer_file(repository.folder / "/".join(rest[1 if kind == "buckets" else 2 :]))

    def answer_api(self, repository, repo_id, kind, rest, body):
        is_bucket = kind == "buckets"
        what, revision, *path = [*rest, *["main"] * is_bucket, "", ""][:4]
        if revision not in ("", "main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif is_bucket and not rest:
            files = list(repository.folder.iterdir())
            size = sum(path.stat().st_size for path in files)
            about = {"private": False, "createdAt": "2026-01-01T00:00:00.000Z"}
            self.give(about | {"id": repo_id, "size": size, "totalFiles": len(files)})
        elif what in ("", "revision"):
            self.give({"id": repo_id, "sha": COMMIT, "private": repository.is_private})
        elif what == "tree" and not any(path):
            names = [path.name for path in sorted(repository.folder.iterdir())]
            self.give(self.entries(repository.folder, names))
        elif what == "paths-info":
            self.give(self.entries(repository.folder, asked_for(body)))
        else:
            self.refuse(404, "EntryNotFound")

    def entries(self, folder, names):
        return [
            {
                "type": "file",
                "path": name,
                "size": (folder / name).stat().st_size,
                "oid": sha1(name.encode()).hexdigest(),
                "xetHash": "0" * 64,
            }
            for name in names
            if (folder / name).is_file()
        ]

    def answer_file(self, path):
        if not path.is_file():
            self.refuse(404, "EntryNotFound")
            return
        data, status, headers = path.read_bytes(), 200, {}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(data), len(data))
            headers = {"Content-Range": f"bytes {first}-{stop - 1}/{len(data)}"}
            data, status = data[int(first) : stop], 206
        etag = f'"{sha1(path.read_bytes()).hexdigest()}"'
        self.give(data, status, headers | {"X-Repo-Commit": COMMIT, "ETag": etag})

    def refuse(self, status, code):
        self.give({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": "refused"})

    def give(self, body, status=200, headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def asked_for(body):
    """The paths of a request about some files, which is JSON or a form."""
    try:
        return json.loads(body)["paths"]
    except ValueError:
        return parse_qs(body.decode())["paths"]


class PlayedHub:
    """Serves folders as repositories, which are put into `repositories` by name."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests = Counter()
        handler = partial(HubHandler, self.repositories, self.requests)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """What sends a process to this Hub, with a home of its own and no other login."""
        login = {"HF_TOKEN": token} if token else {}
        here = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        return here | {"HF_HUB_DISABLE_UPDATE_CHECK": "1"} | login

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
