"""A hub on loopback that speaks as much of the Hugging Face hub's protocol as `huggingface_hub` uses.

Model info, tree listings, and files: small ones from the hub itself, large ones (safetensors, pickles) redirected to
what plays the CDN, as the real hub does: another origin, which must not get the token. Repositories can be created and
committed to, large files by way of the CDN again. It also does what hubs and networks do wrong, on demand.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants
from huggingface_hub.utils.sha import git_hash

LARGE = (".safetensors", ".bin")


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Repository:
    """A folder served as the one commit of a repository, which its branch `main` names."""

    folder: Path
    gated: bool = False
    private: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, content in self.files.items():
            digest.update(name.encode() + content)
        return digest.hexdigest()


@dataclass
class Hub:
    """`with Hub() as hub:` serves `hub.repositories` at `hub.endpoint` and keeps what it was asked in `hub.requests`.

    `broken` says after how many bytes a transfer of a file breaks off, and how many transfers do; `wrong` names files
    that arrive with other bytes of the same number; `refused` is a token that the hub does not know; `forbidden` says
    that nobody may read anything, `forbidden_files` that nobody may read files; `down` is the number of requests that
    it will not serve; `answers` are what stands in the place of model `info` and of the `tree`.
    `statuses` answers what is written to a path that ends so with a failure, 0 by closing the connection. Repositories
    that are created get folders in `created`.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    broken: dict[str, tuple[int, int]] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    refused: str | None = None
    forbidden: bool = False
    forbidden_files: bool = False
    down: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    created: Path | None = None
    large: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self.server.server_port}/cdn"

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for, in order."""
        return [request.path.rsplit("/", 1)[-1] for request in self.requests if _is_transfer(request)]


def point_client_at(hub: Hub, folder: Path, monkeypatch) -> None:
    """In this process, `huggingface_hub` asks `hub`, with an empty cache in `folder` and without a token."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def _is_transfer(request: Request) -> bool:
    return request.method == "GET" and ("/resolve/" in request.path or request.path.startswith("/cdn/"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer_write()

    def do_PUT(self) -> None:
        self.answer_write()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        parts = path.strip("/").split("/")
        if self.hub.down:
            self.hub.down -= 1
            return self.fail(503, "", "Service unavailable")
        if self.hub.refused and token == f"Bearer {self.hub.refused}":
            return self.fail(401, "", "Invalid credentials in Authorization header")
        if self.hub.forbidden or (self.hub.forbidden_files and "resolve" in parts):
            return self.fail(403, "", "Forbidden")
        if parts[0] == "cdn":
            return self.send_file(self.hub.repositories["/".join(parts[1:3])], "/".join(parts[3:]))
        if parts[:2] == ["api", "models"]:
            return self.answer_api("/".join(parts[2:4]), parts[4:])
        if parts[2:3] == ["resolve"]:
            return self.answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self.fail(404, "", "Not found")

    def answer_write(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.read_body()
        token = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, path, None, token))
        parts = path.strip("/").split("/")
        status = next((status for end, status in self.hub.statuses.items() if path.endswith(end)), 200)
        if status == 0:
            self.close_connection = True
            return None
        if status != 200:
            return self.fail(status, "", f"Refused with {status}")
        if parts[0] == "cdn":
            return self.store_large(parts[-1], body)
        if not token or token == f"Bearer {self.hub.refused}":
            return self.fail(401, "", "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self.send_json({"objects": [self.large_file(one) for one in json.loads(body)["objects"]]})
        name = "/".join(parts[2:4])
        if (repository := self.find(name, parts[5])) is None:
            return None
        if parts[4] == "preupload":
            files = [(one["path"], one["path"].endswith(LARGE)) for one in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "lfs" if large else "regular"} for path, large in files]
            return self.send_json({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        return self.commit(name, repository, [json.loads(line) for line in body.splitlines()])

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        exists = name in self.hub.repositories
        if not exists:
            (folder := self.hub.created / name).mkdir(parents=True)
            self.hub.repositories[name] = Repository(folder, private=asked.get("visibility") == "private")
        self.send_json({"url": f"{self.hub.endpoint}/{name}"}, 409 if exists else 200)

    def validate(self, card: str) -> None:
        """As much as the hub asks of metadata that has a licence of its own."""
        data = yaml.safe_load(card.split("---\n")[1])
        wrong = data.get("license") == "other" and not data.get("license_name")
        errors = [{"message": '"license_name" is required'}] if wrong else []
        self.send_json({"errors": errors, "warnings": []}, 400 if wrong else 200)

    def large_file(self, asked: dict) -> dict:
        if asked["oid"] in self.hub.large:
            return asked
        return asked | {"actions": {"upload": {"href": f"{self.hub.cdn}/lfs/{asked['oid']}"}}}

    def store_large(self, oid: str, content: bytes) -> None:
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.large[oid] = content
        self.send_json({})

    def commit(self, name: str, repository: Repository, lines: list[dict]) -> None:
        for line in lines:
            value, kind = line["value"], line["key"]
            if kind == "file":
                (repository.folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                (repository.folder / value["path"]).write_bytes(self.hub.large[value["oid"]])
            elif kind == "deletedFile":
                (repository.folder / value["path"]).unlink()
        address = f"{self.hub.endpoint}/{name}/commit/{repository.commit}"
        self.send_json({"success": True, "commitUrl": address, "commitOid": repository.commit})

    def answer_api(self, name: str, rest: list[str]) -> None:
        """Info (after the name nothing, or `revision` and a revision) or a listing (`tree`, a revision, a folder)."""
        if (repository := self.find(name, rest[1] if rest else "main")) is None:
            return None
        if body := self.hub.answers.get("tree" if rest[:1] == ["tree"] else "info"):
            return self.send_body(body)
        if rest[:1] != ["tree"]:
            return self.send_json({"id": name, "sha": repository.commit, "siblings": []})
        inside = "".join(f"{part}/" for part in rest[2:])
        files = [(path, content) for path, content in repository.files.items() if path.startswith(inside)]
        if inside and not files:
            return self.fail(404, "EntryNotFound", "Entry not found")
        return self.send_json([self.entry(path, content) for path, content in files])

    def entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def answer_file(self, name: str, revision: str, path: str) -> None:
        if (repository := self.find(name, revision)) is None:
            return
        if repository.gated and not self.headers.get("Authorization"):
            self.fail(401, "GatedRepo", "Access to this model is restricted.")
        elif path not in repository.files:
            self.fail(404, "EntryNotFound", "Entry not found")
        elif not path.endswith(LARGE):
            self.send_file(repository, path)
        else:
            content = repository.files[path]
            self.send_response(302)
            self.send_header("Location", f"{self.hub.cdn}/{name}/{path}")
            self.send_header("X-Repo-Commit", repository.commit)
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("Content-Length", "0")
            self.end_headers()

    def find(self, name: str, revision: str) -> Repository | None:
        """The repository at a revision it has; else None, after saying so."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.headers.get("Authorization")):
            self.fail(401, "RepoNotFound", "Repository not found")  # what the hub says without a token
        elif revision not in ("main", repository.commit):
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def send_file(self, repository: Repository, path: str) -> None:
        """The file from the byte that a Range header asks for on, as far as it is to get."""
        content = repository.files[path]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("ETag", f'"{git_hash(content)}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.hub.wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        after, times = self.hub.broken.get(path, (0, 0))
        if not times:
            self.wfile.write(content[start:])
            return
        self.hub.broken[path] = after, times - 1
        self.wfile.write(content[start : start + after])
        self.close_connection = True

    def send_json(self, value, status: int = 200) -> None:
        self.send_body(json.dumps(value).encode(), status)

    def send_body(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
