"""As much of the Hugging Face Hub as huggingface_hub asks for to list, fetch and push a model, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


@dataclass
class Repo:
    """Commits (hash → files), and which of them branches and tags point at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        content = json.dumps([len(self.commits), sorted(files)]).encode()
        name = hashlib.sha1(content).hexdigest()
        self.commits[name] = dict(files)
        self.refs[ref] = name
        return name

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs[revision]]


@dataclass
class Hub:
    """The server's state; tests read and change it."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)  # files that were sent, not only asked about
    asked: list[str] = field(default_factory=list)  # every request
    uploaded: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, files: dict[str, bytes], **options: bool) -> Repo:
        repo = self.repos.setdefault(name, Repo(**options))
        repo.commit(files)
        return repo


@contextmanager
def hub() -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self._parts()
        if parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._answer(404, {"error": f"unknown: {self.path}"})

    def do_POST(self) -> None:
        parts, body = self._parts(), self._body()
        if parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            answer = [
                {"path": one["path"], "uploadMode": modes[one["path"].endswith(".safetensors")], "shouldIgnore": False}
                for one in files
            ]
            self._answer(200, {"files": answer})
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif parts[4:5] == ["branch"]:
            repo = self.hub.repos["/".join(parts[2:4])]
            code = 409 if parts[5] in repo.refs else 201
            repo.refs.setdefault(parts[5], repo.refs["main"])
            self._answer(code, {"error": "exists"} if code == 409 else {})
        elif parts[4:5] == ["commit"]:
            self._commit("/".join(parts[2:4]), parts[5], body)
        else:
            self._answer(404, {"error": f"unknown: {self.path}"})

    def do_PUT(self) -> None:
        content = self._body()
        oid = self._parts()[1]
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.uploaded[oid] = content
        self._answer(200, {})

    def _info(self, name: str, revision: str) -> None:
        repo = self._readable(name)
        if repo is None:
            return
        commit = repo.resolve(revision)
        if commit is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": file, "size": len(data)} for file, data in repo.commits[commit].items()]
        self._answer(200, {"_id": "1", "id": name, "sha": commit, "siblings": siblings, "private": repo.private})

    def _file(self, name: str, revision: str, file: str) -> None:
        repo = self._readable(name)
        if repo is None:
            return
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
            return
        commit = repo.resolve(revision)
        if commit is None or file not in repo.commits[commit]:
            code = "EntryNotFound" if commit else "RevisionNotFound"
            self._answer(404, {"error": "not here"}, {"X-Error-Code": code})
            return
        content = repo.commits[commit][file]
        if self.command == "GET":
            self.hub.fetched.append(file)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        self._send(200, content, headers)

    def _create(self, wanted: dict[str, object]) -> None:
        if not self._authorized():
            return
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        repo = self.hub.repos[name] = Repo(private=bool(wanted.get("private")) or wanted.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        if not self._authorized():
            return
        repo = self.hub.repos[name]
        if revision not in repo.refs:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        files = dict(repo.files(revision))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(files, revision)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _readable(self, name: str) -> Repo | None:
        """The repository; or None, and the Hub's answer has been sent."""
        repo = self.hub.repos.get(name)
        hidden = repo is not None and repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if repo is None or hidden:
            self._answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _authorized(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def _parts(self) -> list[str]:
        self.hub.asked.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces: list[bytes] = []
        while size := int(self.rfile.readline().strip(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, code: int, answer: object, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(answer).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
