"""An in-memory stand-in for the Hugging Face Hub: the HTTP endpoints that publishing and loading a model use.

The client is the unmodified ``huggingface_hub``; only its endpoint changes. Tensor files follow the Hub's protocol: the
client uploads them by SHA-256 before the commit, and downloads them from another host (here ``localhost``) after a
redirect. Only model repositories are supported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

TOKEN = "hf_of_the_stand_in"
LARGE = ".safetensors"
"""Suffix of the files that are transferred separately (as with Git LFS)."""


class HubError(Exception):
    """An HTTP error response: its status, and the error code that the client recognizes."""

    def __init__(self, status: int, code: str = ""):
        super().__init__(code)
        self.status, self.code = status, code


@dataclass
class Repository:
    """Commits by hash, each with all of its files, and the branches and tags that point to commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return oid

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        text = f"{len(self.commits)} {sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


class HubStandIn:
    """A Hub server that runs inside a ``with`` block.

    Attributes:
        repositories: repository id -> repository.
        requests: "METHOD path" of every request received, in order.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self._uploaded: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> HubStandIn:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.commit_of(revision)]

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables that make a new process use this server as the Hub and ``home`` as its cache."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # Xet uses a different transfer protocol
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Make this process use the server; patches constants that the client read from the environment at import."""
        constants = huggingface_hub.constants
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.endpoint)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # cached at first use
        huggingface_hub.close_session()  # an existing session keeps its old proxies

    # Endpoints --------------------------------------------------------------------------------------

    def answer(self, request: _Request) -> _Answer:
        self.requests.append(f"{request.method} {request.path}")
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in method.split():
                return function(self, request, *map(unquote, match.groups()))
        raise HubError(404)

    def repository(self, request: _Request, name: str) -> Repository:
        """As on the Hub, a private repository looks missing to unauthorized clients."""
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not request.is_authorized):
            raise HubError(401, "RepoNotFound")
        return repository

    def create(self, request):
        request.require_authorized()
        settings = request.json()
        name = f"{settings['organization'] or 'me'}/{settings['name']}"
        exists = name in self.repositories
        if not exists:
            self.repositories[name] = Repository(private=settings.get("visibility") == "private")
            self.repositories[name].commit("main", {})
        return _Answer(409 if exists else 200, {"url": f"{self.endpoint}/{name}"})

    def validate_card(self, request):
        return _Answer(200, {"errors": [], "warnings": []})

    def preupload(self, request, name, revision):
        request.require_authorized()
        self.repository(request, name).commit_of(revision)
        modes = {True: "lfs", False: "regular"}
        files = [
            {"path": file["path"], "uploadMode": modes[file["path"].endswith(LARGE)], "shouldIgnore": False}
            for file in request.json()["files"]
        ]
        return _Answer(200, {"files": files})

    def large_files(self, request, name):
        request.require_authorized()
        self.repository(request, name)
        objects = []
        for item in request.json()["objects"]:
            href = f"{self.endpoint}/large/{item['oid']}"
            actions = {} if item["oid"] in self._uploaded else {"actions": {"upload": {"href": href}}}
            objects.append({**item, **actions})
        return _Answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400)
        self._uploaded[oid] = request.body
        return _Answer(200)

    def commit(self, request, name, revision):
        request.require_authorized()
        repository = self.repository(request, name)
        files = dict(repository.commits[repository.commit_of(revision)])
        for line in request.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self._uploaded[value["oid"]]
        oid = repository.commit(revision, files)
        return _Answer(200, {"commitUrl": f"{self.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def branch(self, request, name, branch):
        request.require_authorized()
        repository = self.repository(request, name)
        if branch in repository.branches:
            raise HubError(409)
        repository.branches[branch] = repository.commit_of(request.json().get("startingPoint", "main"))
        return _Answer(200, {})

    def tag(self, request, name, revision):
        request.require_authorized()
        repository = self.repository(request, name)
        repository.tags[request.json()["tag"]] = repository.commit_of(revision)
        return _Answer(200, {})

    def refs(self, request, name):
        repository = self.repository(request, name)
        refs = {
            kind: [{"name": ref, "ref": f"refs/{prefix}/{ref}", "targetCommit": oid} for ref, oid in names.items()]
            for kind, prefix, names in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        }
        return _Answer(200, {**refs, "converts": []})

    def information(self, request, name, revision="main"):
        repository = self.repository(request, name)
        oid = repository.commit_of(revision)
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        return _Answer(
            200,
            {"id": name, "modelId": name, "sha": oid, "private": repository.private, "tags": [], "siblings": siblings},
        )

    def tree(self, request, name, revision):
        repository = self.repository(request, name)
        files = repository.commits[repository.commit_of(revision)]
        return _Answer(200, [_tree_entry(path, data) for path, data in files.items()])

    def resolve(self, request, name, revision, path):
        repository = self.repository(request, name)
        oid = repository.commit_of(revision)
        headers = {"X-Repo-Commit": oid}
        if path not in repository.commits[oid]:
            return _Answer(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        data = repository.commits[oid][path]
        if not path.endswith(LARGE):
            return _Answer(200, data, {**headers, "ETag": f'"{_blob_id(data)}"'})
        digest = hashlib.sha256(data).hexdigest()
        location = f"http://localhost:{self._server.server_port}/large/{digest}"
        linked = {"Location": location, "X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
        return _Answer(302, headers={**headers, **linked})

    def download(self, request, oid):
        if request.headers.get("authorization"):
            raise HubError(400)  # the client must send its token only to the Hub, not to the storage host
        return _Answer(200, self._uploaded[oid], {"ETag": f'"{oid}"'})


_REPOSITORY = "([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., _Answer]]] = [
    ("POST", "/api/repos/create", HubStandIn.create),
    ("POST", "/api/validate-yaml", HubStandIn.validate_card),
    ("POST", f"/api/models/{_REPOSITORY}/preupload/([^/]+)", HubStandIn.preupload),
    ("POST", rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", HubStandIn.large_files),
    ("PUT", "/large/([0-9a-f]+)", HubStandIn.upload),
    ("GET HEAD", "/large/([0-9a-f]+)", HubStandIn.download),
    ("POST", f"/api/models/{_REPOSITORY}/commit/([^/]+)", HubStandIn.commit),
    ("POST", f"/api/models/{_REPOSITORY}/branch/([^/]+)", HubStandIn.branch),
    ("POST", f"/api/models/{_REPOSITORY}/tag/([^/]+)", HubStandIn.tag),
    ("GET", f"/api/models/{_REPOSITORY}/refs", HubStandIn.refs),
    ("GET", f"/api/models/{_REPOSITORY}", HubStandIn.information),
    ("GET", f"/api/models/{_REPOSITORY}/revision/([^/]+)", HubStandIn.information),
    ("GET", f"/api/models/{_REPOSITORY}/tree/([^/]+)", HubStandIn.tree),
    ("GET HEAD", f"/{_REPOSITORY}/resolve/([^/]+)/(.+)", HubStandIn.resolve),
]


def _blob_id(data: bytes) -> str:
    """The file's Git blob hash."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _tree_entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


@dataclass
class _Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def is_authorized(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def require_authorized(self) -> None:
        if not self.is_authorized:
            raise HubError(401)

    def json(self):
        return json.loads(self.body)


@dataclass
class _Answer:
    status: int
    content: bytes | dict | list = b""
    headers: dict[str, str] = field(default_factory=dict)


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = _Request(self.command, urlsplit(self.path).path, headers, self._body())
            try:
                answer = hub.answer(request)
            except HubError as error:
                answer = _Answer(error.status, headers={"X-Error-Code": error.code} if error.code else {})
            is_json = not isinstance(answer.content, bytes)
            content = json.dumps(answer.content).encode() if is_json else answer.content
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _answer

    return Handler
