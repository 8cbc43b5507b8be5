"""A hub of one's own: the few requests that huggingface_hub and datasets make, answered from memory over HTTP."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(?:/(?P<verb>revision|tree|paths-info)/(?P<rest>.*))?$"
)
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.*)$")


class FakeHub:
    """Serves repositories while it is entered; `url` is for HF_ENDPOINT.

    Args:
        repositories: (kind, id) -> {path: content}, kind "models" or "datasets".
    """

    def __init__(self, repositories: dict[tuple[str, str], dict[str, bytes]]):
        self.repositories = repositories
        self.requests: list[str] = []
        self._history: dict[str, dict[str, bytes]] = {}

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, self.command)

            do_HEAD = do_POST = do_GET

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, kind: str, name: str) -> str:
        """The newest commit of a repository; it changes with the content, and older ones that were asked for stay."""
        files = self.repositories[kind, name]
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self._history[sha] = dict(files)
        return sha

    def _at(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision, None for one that there is not."""
        newest = self.commit(kind, name)
        sha = newest if revision in ("", "main") else revision
        return (sha, self._history[sha]) if sha in self._history else None

    def answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{method} {path}")
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        match = API.match(path)
        if match and (match["kind"], match["id"]) in self.repositories:
            self._api(request, match, body)
            return
        match = FILE.match(path)
        key = ("datasets" if match and match["kind"] else "models", match["id"] if match else "")
        found = self._at(*key, match["revision"]) if key in self.repositories else None
        if found is None or match["path"] not in found[1]:
            code = "EntryNotFound" if found else "RepoNotFound"
            self._send(request, 404, b"{}", {"X-Error-Code": code})
            return
        content = found[1][match["path"]]
        etag = hashlib.sha256(content).hexdigest()
        self._send(request, 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]})

    def _api(self, request, match, body: bytes) -> None:
        kind, name, verb, rest = match["kind"], match["id"], match["verb"], match["rest"] or ""
        found = self._at(kind, name, rest.partition("/")[0])
        if found is None:
            self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        sha, files = found
        rows = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        if verb == "tree":
            answer = rows
        elif verb == "paths-info":
            asked = {unquote(part.partition("=")[2]) for part in body.decode().split("&")}
            asked |= {*json.loads(body)["paths"]} if body.startswith(b"{") else set()
            answer = [row for row in rows if row["path"] in asked]
        else:
            answer = {
                "id": name,
                "sha": sha,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in files],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
        self._send(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def _send(request, status: int, content: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)
