"""A fake hub: it answers the few requests that huggingface_hub and datasets make, from memory over HTTP.

Uploads use the commit API, and Git LFS for weights (HF_HUB_DISABLE_XET).
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(?:/(?P<verb>revision|tree|paths-info|preupload|commit)/(?P<rest>.*))?$"
)
LFS = re.compile(r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch$")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.*)$")


class FakeHub:
    """Serves repositories while it is entered; `url` is for HF_ENDPOINT.

    Args:
        repositories: (kind, id) -> {path: content}, kind "models" or "datasets".

    Attributes:
        private: names of repositories that were created as private.
        read_only: names of repositories that nobody may write, or of an organisation in which none may be created.
        num_broken: how many of the next uploads of weights are cut off.
        objects: uploads by Git LFS: sha256 -> content.
    """

    def __init__(self, repositories: dict[tuple[str, str], dict[str, bytes]]):
        self.repositories = repositories
        self.requests: list[str] = []
        self.private: set[str] = set()
        self.read_only: set[str] = set()
        self.num_broken = 0
        self.objects: dict[str, bytes] = {}
        self._history: dict[str, dict[str, bytes]] = {}

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, self.command)

            do_HEAD = do_POST = do_PUT = do_GET

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
        """Return a repository's newest commit, which changes with the content; earlier ones stay available."""
        files = self.repositories[kind, name]
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self._history[sha] = dict(files)
        return sha

    def _at(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a revision's commit and files; None if it does not exist."""
        newest = self.commit(kind, name)
        sha = newest if revision in ("", "main") else revision
        return (sha, self._history[sha]) if sha in self._history else None

    def answer(self, request: BaseHTTPRequestHandler, method: str) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{method} {path}")
        body = self._body(request)
        if self._write(request, method, path, body):
            return
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

    @staticmethod
    def _body(request) -> bytes:
        if request.headers.get("Transfer-Encoding") != "chunked":
            return request.rfile.read(int(request.headers.get("Content-Length") or 0))
        content = b""
        while size := int(request.rfile.readline(), 16):
            content += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return content

    def _write(self, request, method: str, path: str, body: bytes) -> bool:
        """Answer a request that belongs to an upload; return whether it does."""
        match, batch = API.match(path), LFS.match(path)
        if path == "/api/validate-yaml":
            self._json(request, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(request, json.loads(body))
        elif method == "PUT":
            if self.num_broken:
                self.num_broken -= 1
                request.close_connection = True
            else:
                self.objects[path.rpartition("/")[2]] = body
                self._json(request, {})
        elif batch:
            objects = [{"oid": one["oid"], "size": one["size"]} for one in json.loads(body)["objects"]]
            for one in objects:
                if one["oid"] not in self.objects:
                    one["actions"] = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
            self._json(request, {"objects": objects, "transfer": "basic"})
        elif match and match["verb"] in ("preupload", "commit"):
            self._write_files(request, match["id"], match["verb"], body)
        else:
            return False
        return True

    def _create(self, request, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if ("models", name) in self.repositories:
            self._json(request, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
        elif self.read_only & {name, asked["organization"]}:
            self._json(request, {"error": "You don't have the rights to create a model there"}, 403)
        else:
            self.repositories["models", name] = {}
            self.private |= {name} if asked.get("visibility") == "private" else set()
            self._json(request, {"url": f"{self.url}/{name}"})

    def _write_files(self, request, name: str, verb: str, body: bytes) -> None:
        if name in self.read_only:
            self._json(request, {"error": "You don't have write access to this repository"}, 403)
        elif verb == "preupload":
            paths = [one["path"] for one in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
            files = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in zip(paths, modes, strict=True)
            ]
            self._json(request, {"files": files})
        else:
            self._commit(name, body)
            sha = self.commit("models", name)
            self._json(request, {"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _commit(self, name: str, body: bytes) -> None:
        files = dict(self.repositories["models", name])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        self.repositories["models", name] = files

    def _json(self, request, answer, status: int = 200) -> None:
        self._send(request, status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

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
                "private": name in self.private,
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
