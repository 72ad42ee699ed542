"""A Hugging Face Hub of one process: what pushing, loading and resuming ask of it, and the faults of a real one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 10_000  # bytes from which a file is sent apart from its commit, as on the real one


@dataclass
class Repo:
    """Commits as maps of path to content, and the names of some of them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    """Who may read it; None is everyone."""

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[digest] = files
        self.names[revision] = digest
        return digest


class Hub(ThreadingHTTPServer):
    """`repos` is what it holds, `log` what it was asked, `cut` breaks the next download of a file after some bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.log: list[tuple[str, str, str | None]] = []

    def add(self, name: str, folder: Path, revision: str = "main") -> str:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.repos.setdefault(name, Repo()).commit(files, revision)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.names[revision]]


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Answer(Exception):
    """An early answer."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path, self.headers.get("Range")))
        body = self._body()
        try:
            for method, pattern, function in _ROUTES:
                found = re.fullmatch(pattern, path)
                if method == self.command and found:
                    return function(self, body, *found.groups())
            raise _Answer(404, "EntryNotFound", f"no route {path}")
        except _Answer as answer:
            self._send(answer.status, b"", {"X-Error-Code": answer.code, "X-Error-Message": answer.message})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo is not None and repo.token not in (None, given):
            raise _Answer(401, "GatedRepo" if given else "RepoNotFound", "this token may not read it")
        if repo is None:
            raise _Answer(404, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(name)
        digest = repo.names.get(revision, revision)
        if digest not in repo.commits:
            raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return digest, repo.commits[digest]

    def info(self, _: bytes, name: str, revision: str | None) -> None:
        digest, files = self._commit(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        private = self._repo(name).token is not None
        self._json({"id": name, "modelId": name, "sha": digest, "private": private, "tags": [], "siblings": siblings})

    def tree(self, _: bytes, name: str, revision: str) -> None:
        files = self._commit(name, revision)[1].items()
        self._json([{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in files])

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        digest, files = self._commit(name, revision)
        if path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": digest})
            return
        data = files[path]
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": digest,
            "Accept-Ranges": "bytes",
        }
        begin = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            begin = int(asked[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        cut = self.server.cut.pop(path, None) if self.command == "GET" else None
        self._send(206 if asked else 200, data[begin:], headers, cut)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name'].split('/')[-1]}"
        status = 409 if name in self.server.repos else 200
        if status == 200:
            self.server.repos[name] = Repo()
            self.server.repos[name].commit({".gitattributes": b""})
        self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name}, status)

    def yaml(self, _: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        files = self._commit(name, revision)[1]

        def how(file: dict) -> dict:
            mode = "lfs" if file["size"] >= LARGE else "regular"
            known = files.get(file["path"])
            oid = None if known is None else hashlib.sha1(known).hexdigest()
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        self._json({"files": [how(file) for file in json.loads(body)["files"]]})

    def batch(self, body: bytes, _name: str) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.server.url}/objects/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.uploads[oid] = body
        self._send(200, b"")

    def add_commit(self, body: bytes, name: str, revision: str) -> None:
        files = dict(self._commit(name, revision)[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        digest = self.server.repos[name].commit(files, revision)
        self._json({"commitOid": digest, "commitUrl": f"{self.server.url}/{name}/commit/{digest}", "success": True})


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    ("GET", rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.yaml),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/objects/([0-9a-f]+)", _Handler.upload),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.add_commit),
)
