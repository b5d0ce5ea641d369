"""A small stand-in of the Hugging Face Hub's HTTP API on loopback, for what this project asks of it.

Repositories are folders; each has one commit (40 hex) that `main` names and that a test may move.
Routes: repo info at a revision, file tree, file download with the headers that huggingface_hub wants.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

GATED_TOKEN = "hf_" + "stand1n" * 4


@dataclass
class Repository:
    """Files by path, the commits that exist, what `main` names now, and whether a token is asked for."""

    kind: str
    folder: Path
    commits: list[str]
    gated: bool = False

    @property
    def main(self) -> str:
        return self.commits[-1]

    def resolve(self, revision: str) -> str | None:
        return self.main if revision == "main" else revision if revision in self.commits else None


@dataclass
class Hub:
    """The stand-in: add repositories, then point HF_ENDPOINT at `endpoint`; `requests` are the paths asked for.

    One that `lost_files` names repositories, and answers nothing to whoever asks for a file.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    lost_files: bool = False

    def add(self, name: str, kind: str, folder: Path, *, gated: bool = False) -> Repository:
        """Serve `folder` as repository `name`; its first commit is derived from the name."""
        repository = Repository(kind, folder, [hashlib.sha1(name.encode()).hexdigest()], gated)
        self.repositories[f"{kind}s/{name}"] = repository
        return repository


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(path)
        if path.startswith("api/"):
            return self._answer_api(path.removeprefix("api/"), with_body)
        if self.hub.lost_files:
            self.close_connection = True
            return None
        kind = "datasets" if path.startswith("datasets/") else "models"
        name, _, rest = path.removeprefix("datasets/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if not self._admit(repository, revision):
            return
        target = repository.folder / file
        if not target.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        body = target.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": repository.resolve(revision)}
        self._send(200, body, headers, with_body)

    def _answer_api(self, path: str, with_body: bool) -> None:
        for marker in ("/revision/", "/tree/"):
            if marker in path:
                name, _, revision = path.partition(marker)
                break
        else:
            name, marker, revision = path, "", "main"
        repository = self.hub.repositories.get(name)
        if not self._admit(repository, revision):
            return
        files = sorted(p.relative_to(repository.folder).as_posix() for p in repository.folder.rglob("*") if p.is_file())
        if marker == "/tree/":
            value = [
                {"type": "file", "path": f, "size": (repository.folder / f).stat().st_size, "oid": "0" * 40}
                for f in files
            ]
        else:
            short = name.partition("/")[2]
            siblings = [{"rfilename": file} for file in files]
            value = {
                "_id": "0",
                "id": short,
                "sha": repository.resolve(revision),
                "siblings": siblings,
                "private": False,
            }
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, with_body)

    def _admit(self, repository: Repository | None, revision: str) -> bool:
        """Refuse what does not exist or needs a token, with the Hub's own error codes."""
        if repository is None:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, True)
        elif repository.gated and self.headers.get("Authorization") != f"Bearer {GATED_TOKEN}":
            self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, True)
        elif repository.resolve(revision) is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, True)
        else:
            return True
        return False

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a Hub without repositories on a free loopback port."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
