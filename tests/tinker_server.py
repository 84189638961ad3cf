"""As much of Tinker's REST API as its SDK asks for to download a checkpoint, and the files, on this machine."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KEY = "tml-of-the-tests"
SIGNATURE = "secret-signature"


@dataclass
class Tinker:
    """The server's state; tests read and change it. Checkpoints are named without tinker://."""

    url: str = ""
    checkpoints: dict[str, dict[str, bytes]] = field(default_factory=dict)
    archives: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    sessions: dict[str, str] = field(default_factory=dict)  # session → the checkpoint that was loaded
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)  # what a request will have led to
    expired: bool = False  # whether signed addresses are refused
    announce: bool = True  # whether the length of a file is said beforehand
    break_after: list[int] = field(default_factory=list)  # bytes after which the next downloads break off
    ranges: bool = True  # whether a download can be taken up again


@contextmanager
def tinker_service() -> Iterator[Tinker]:
    state = Tinker()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"tinker": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    tinker: Tinker

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = self._parts()
        if parts[0] == "files":
            self._file("/".join(parts[1:4]), "/".join(parts[4:]))
        elif parts[0] == "archives":
            self._content(self.tinker.archives["/".join(parts[1:])], "archive")
        elif parts == ["api", "v1", "healthz"]:
            self._answer(200, {"status": "ok"})
        elif parts == ["nothing"]:
            self._answer(404, {})
        elif not self._authorized():
            return
        elif parts[-1] == "external_weights_urls":
            self._sign("/".join((parts[3], *parts[5:-1])))
        elif parts[-1] == "archive":
            name = "/".join((parts[3], *parts[5:-1]))
            if name in self.tinker.archives:
                url = f"{self.tinker.url}/archives/{name}?signature={SIGNATURE}"
                self._answer(302, {}, {"Location": url})
            else:
                self._answer(404, {"detail": "Checkpoint not found"})
        else:
            self._answer(404, {"detail": "Not found"})

    def do_POST(self) -> None:
        parts, body = self._parts(), self._json()
        if not self._authorized():
            return
        match parts[2:]:
            case ["client", "config" | "dynamic_config"] | ["session_heartbeat"]:
                self._answer(200, {})
            case ["telemetry"]:
                self._answer(200, {"status": "accepted"})
            case ["create_session"]:
                self._answer(200, {"type": "create_session", "session_id": uuid.uuid4().hex})
            case ["load_weights"]:
                self._load(body)
            case ["get_info"]:
                data = {"model_name": "a/b", "arch": "llama", "tokenizer_id": "a/b"}
                self._answer(200, {"type": "get_info", "model_data": data, "model_id": body["model_id"]})
            case ["save_weights_external"]:
                run, name = body["model_id"], body["path"]
                exported = f"{run}/external_weights/{name}"
                self.tinker.checkpoints[exported] = self.tinker.checkpoints[self.tinker.sessions[run]]
                self._promise({"type": "save_weights_external", "path": f"tinker://{exported}"})
            case ["retrieve_future"]:
                self._answer(200, self.tinker.answers[body["request_id"]])
            case ["sessions", _, "finish"]:
                self.tinker.finished.append(body["reason"]["type"])
                self._answer(200, {})
            case _:
                self._answer(404, {"detail": "Not found"})

    def do_PUT(self) -> None:
        self._parts()
        self._json()
        self._answer(200, {})

    def do_DELETE(self) -> None:
        parts = self._parts()
        name = "/".join((parts[3], *parts[5:]))
        self.tinker.deleted.append(name)
        del self.tinker.checkpoints[name]
        self._answer(200, {})

    def _load(self, body: dict[str, Any]) -> None:
        source = str(body["path"]).removeprefix("tinker://")
        if source not in self.tinker.checkpoints:
            self._answer(404, {"detail": "Checkpoint not found"})
            return
        run = f"{body['session_id']}:train:{body['model_seq_id']}"
        self.tinker.sessions[run] = source
        self._promise({"type": "load_weights", "path": body["path"], "model_id": run})

    def _promise(self, answer: dict[str, Any]) -> None:
        request = uuid.uuid4().hex
        self.tinker.answers[request] = answer
        self._answer(200, {"request_id": request})

    def _sign(self, name: str) -> None:
        if name not in self.tinker.checkpoints:
            self._answer(404, {"detail": "Checkpoint not found"})
            return
        urls = {
            file: f"{self.tinker.url}/files/{name}/{file.replace('..', '%2E%2E')}?signature={SIGNATURE}"
            for file in self.tinker.checkpoints[name]
        }
        expires = datetime.now(timezone.utc) + timedelta(minutes=15)
        self._answer(200, {"urls": urls, "expires": expires.isoformat()})

    def _file(self, checkpoint: str, name: str) -> None:
        if self.tinker.expired or parse_qs(urlsplit(self.path).query).get("signature") != [SIGNATURE]:
            self._answer(403, {"error": "the address has expired"})
            return
        self._content(self.tinker.checkpoints[checkpoint][name], name)

    def _content(self, content: bytes, name: str) -> None:
        start = 0
        wanted = self.headers.get("Range", "")
        if wanted and self.tinker.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.tinker.fetched.append(f"{name}@{start}" if start else name)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.tinker.announce:
            self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if self.tinker.break_after:
            content = content[: start + self.tinker.break_after.pop(0)]
        self.wfile.write(content[start:])

    def _authorized(self) -> bool:
        if self.headers.get("X-API-Key") == KEY:
            return True
        self._answer(401, {"detail": f"Invalid key {self.headers.get('X-API-Key')}"})
        return False

    def _parts(self) -> list[str]:
        self.tinker.asked.append(f"{self.command} {urlsplit(self.path).path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _json(self) -> dict[str, Any]:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return json.loads(body) if body else {}

    def _answer(self, code: int, answer: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self.send_response(code)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
