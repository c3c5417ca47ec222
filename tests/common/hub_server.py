"""As much of the Hugging Face Hub as pushing and pulling caches and models needs: files, commits, large files.

The real client library talks to it (``HF_ENDPOINT``); its answers have the keys which that library checks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from servers import Answer, Fault, FaultyServer

TOKEN = "hf_for_tests"
LARGE = 2_000  # bytes from which a file travels beside the commit
_NO_ACCESS: Answer = (401, {"X-Error-Message": "Invalid credentials"}, b"{}")


class Sent:
    """What a client sends beside and in a commit, and the answers to it that all repositories have in common."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.large: dict[str, bytes] = {}

    def answer(self, parts: list[str], body: bytes) -> object | None:
        """The answer to what does not depend on what a repository holds; else None."""
        if parts[-1] == "validate-yaml":
            errors = [{"message": "license: unknown"}] if "license: nonsense" in json.loads(body)["content"] else []
            return {"errors": errors, "warnings": []}
        if parts[-2] == "preupload":
            files = json.loads(body)["files"]
            mode = {file["path"]: "lfs" if file["size"] >= LARGE else "regular" for file in files}
            return {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in mode.items()]}
        if parts[-1] == "batch":
            return {"objects": [self._place(entry) for entry in json.loads(body)["objects"]]}
        return None

    def _place(self, entry: dict[str, object]) -> dict[str, object]:
        actions = {"upload": {"href": f"{self.url}/large/{entry['oid']}"}}
        return entry | ({"actions": actions} if entry["oid"] not in self.large else {})

    def operations(self, body: bytes) -> tuple[str | None, dict[str, bytes | None]]:
        """The commit that one is to follow, and the files by name; None: one to delete."""
        parent, files = None, {}
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                parent = value.get("parentCommit")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = data = self.large[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
            else:
                assert key == "deletedFile"
                files[value["path"]] = None
        return parent, files


class HubServer(FaultyServer):
    """A hub whose repositories are folders ``root/ORG/NAME/REVISION``.

    Attributes:
        commits: The files added or deleted by each commit, in order.
        created: The body of each request to create a repository.
        redirect: Send readers of files to this other address, as hubs do.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.commits: list[list[str]] = []
        self.created: list[dict[str, object]] = []
        self.redirect: str | None = None
        self._sent: Sent | None = None

    def answer(self, handler: BaseHTTPRequestHandler, fault: Fault) -> Answer:
        size = int(handler.headers.get("Content-Length", 0))
        body = handler.rfile.read(size)
        parts = [unquote(part) for part in urlsplit(handler.path).path.split("/") if part]
        self._sent = self._sent or Sent(self.url)
        if handler.command == "PUT":
            self._sent.large[parts[-1]] = body
            return 200, {}, b""
        if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _NO_ACCESS
        if handler.command == "GET":
            return self._file(handler, parts, fault)
        return self._interface(parts, body)

    def _file(self, handler: BaseHTTPRequestHandler, parts: list[str], fault: Fault) -> Answer:
        if len(parts) < 5 or parts[0] != "datasets" or parts[3] != "resolve":
            return 404, {}, b"{}"  # the library asks for other things too
        _, organisation, name, _, revision, *path = parts
        place = "/".join((organisation, name, revision, *path))
        if self.redirect is not None and (self.root / place).is_file():
            return 302, {"Location": f"{self.redirect}/{quote(place)}"}, b""
        handler.path = f"/{quote(place)}"
        return super().answer(handler, fault)

    def _interface(self, parts: list[str], body: bytes) -> Answer:
        assert self._sent is not None
        if (known := self._sent.answer(parts, body)) is not None:
            return 200, {"Content-Type": "application/json"}, json.dumps(known).encode()
        if parts[-1] == "create":
            request = json.loads(body)
            self.created.append(request)
            folder = self.root / request["organization"] / request["name"] / "main"
            if folder.exists():
                return (
                    409,
                    {},
                    json.dumps({"error": "You already created it", "url": f"{self.url}/datasets/o/n"}).encode(),
                )
            folder.mkdir(parents=True)
            found: object = {"url": f"{self.url}/datasets/{request['organization']}/{request['name']}"}
        elif parts[-2] == "paths-info":
            folder, asked = self.root / parts[2] / parts[3] / parts[-1], parse_qs(body.decode())["paths"]
            found = [
                {"type": "file", "path": path, "size": 1, "oid": "0"} for path in asked if (folder / path).is_file()
            ]
        elif parts[-2] == "branch":
            folder = self.root / parts[2] / parts[3] / parts[-1]
            if folder.exists():
                return 409, {}, b'{"error": "Reference already exists"}'
            shutil.copytree(folder.with_name("main"), folder)
            found = {}
        else:
            assert parts[-2] == "commit", parts
            found = self._commit(self.root / parts[2] / parts[3] / parts[-1], body)
            if found is None:
                return 412, {}, b'{"error": "A commit has happened since. Please refresh and try again."}'
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _head(self) -> str:
        return f"{len(self.commits):040x}"

    def _commit(self, folder: Path, body: bytes) -> dict[str, object] | None:
        assert self._sent is not None
        parent, files = self._sent.operations(body)
        if parent not in (None, self._head()):
            return None
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
        self.commits.append(list(files))
        oid = self._head()
        organisation, name, _ = folder.parts[-3:]
        return {"commitOid": oid, "commitUrl": f"{self.url}/datasets/{organisation}/{name}/commit/{oid}"}


class ModelHub(FaultyServer):
    """A hub that serves models: repositories of commits, with branches and tags, gated ones for a token alone.

    Files of `LARGE` bytes or more are named by their sha256, as those that travel outside of git.

    Attributes:
        gated: Repositories whose files are given to a known token only; what is in them everybody may know.
        private: Repositories that do not exist for those without a token.
        made: The body of each request to create a repository.
        commits: Titles of the commits that clients made, in order.
        spoil: Keep this of every large file instead of what was sent.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.made: list[dict[str, object]] = []
        self.commits: list[str] = []
        self.spoil: bytes | None = None
        self._sent: Sent | None = None
        self._commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self._refs: dict[str, dict[str, str]] = {}

    def publish(self, name: str, source: Path | dict[str, bytes], *, ref: str = "main") -> str:
        """Commit all files of a folder, move a branch or tag there, and return the commit."""
        files = source if isinstance(source, dict) else _files_of(source)
        digest = hashlib.sha1(usedforsecurity=False)
        for path, data in sorted(files.items()):
            digest.update(f"{path} {_git_oid(data)}\n".encode())
        commit = digest.hexdigest()
        self._commits.setdefault(name, {})[commit] = files
        self._refs.setdefault(name, {})[ref] = commit
        return commit

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        """What a branch holds now."""
        return self._commits[name][self._refs[name][ref]]

    def answer(self, handler: BaseHTTPRequestHandler, fault: Fault) -> Answer:
        parts = [unquote(part) for part in urlsplit(handler.path).path.split("/") if part]
        if handler.command in ("PUT", "POST"):
            return self._take(handler, parts, handler.rfile.read(int(handler.headers.get("Content-Length", 0))))
        of_interface = parts[:2] == ["api", "models"]
        name, rest = ("/".join(parts[2:4]), parts[4:]) if of_interface else ("/".join(parts[:2]), parts[2:])
        known = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self._commits or (name in self.private and not known):
            # As the hub: who is not logged in learns no more than that.
            return (404, {"X-Error-Code": "RepoNotFound"}, b"{}") if known else _NO_ACCESS
        commit = self._commit_of(name, rest[1]) if len(rest) > 1 else self._refs[name]["main"]
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}"
        files = self._commits[name][commit]
        if of_interface:
            below = "".join(f"{part}/" for part in rest[2:]) if rest[:1] == ["tree"] else ""
            files = {path: data for path, data in files.items() if path.startswith(below)}
            if not files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
            found = self._tree(files) if rest[:1] == ["tree"] else self._info(name, commit)
            return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
        path = "/".join(rest[2:])
        head = {"X-Repo-Commit": commit}
        if path not in files:
            return 404, head | {"X-Error-Code": "EntryNotFound"}, b"{}"
        if name in self.gated and not known:
            return (
                401,
                head | {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted."},
                b"{}",
            )
        data = files[path]
        head |= {"ETag": f'"{_oid(data)}"', "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}
        wanted = handler.headers.get("Range")
        if wanted is None or handler.command == "HEAD":
            return 200, head, data
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        return 206, head | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:]

    def _take(self, handler: BaseHTTPRequestHandler, parts: list[str], body: bytes) -> Answer:
        """What a client sends: repositories to make, branches, large files and commits."""
        self._sent = self._sent or Sent(self.url)
        if handler.command == "PUT":
            self._sent.large[parts[-1]] = body
            return 200, {}, b""
        if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _NO_ACCESS
        found = self._sent.answer(parts, body)
        if parts[-1] == "validate-yaml" and found["errors"]:
            return 400, {"Content-Type": "application/json"}, json.dumps(found).encode()
        name = "/".join(parts[2:4])
        if parts[-1] == "create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            if name in self._commits:
                return 409, {}, b'{"error": "You already created it"}'
            self.made.append(request)
            self.publish(name, {".gitattributes": b"*.bin filter=lfs\n"})
            if request.get("visibility") == "private":
                self.private.add(name)
            found = {"url": f"{self.url}/{name}"}
        elif parts[-2] == "branch":
            self._refs[name].setdefault(parts[-1], self._refs[name]["main"])
            found = {}
        elif parts[-2] == "commit":
            old = self._refs[name][parts[-1]]
            parent, files = self._sent.operations(body)
            if parent not in (None, old):
                return 412, {}, b'{"error": "A commit has happened since. Please refresh and try again."}'
            kept = {path: data for path, data in (self._commits[name][old] | files).items() if data is not None}
            if self.spoil is not None:
                kept |= {path: self.spoil for path in files if len(kept.get(path, b"")) >= LARGE}
            oid = self.publish(name, kept, ref=parts[-1])
            self.commits.append(json.loads(body.splitlines()[0])["value"]["summary"])
            found = {"commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _commit_of(self, name: str, revision: str) -> str | None:
        return self._refs[name].get(revision) or (revision if revision in self._commits[name] else None)

    def _info(self, name: str, commit: str) -> dict[str, object]:
        siblings = [{"rfilename": path} for path in self._commits[name][commit]]
        return {"id": name, "modelId": name, "sha": commit, "private": name in self.private, "gated": name in self.gated,
                "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip

    def _tree(self, files: dict[str, bytes]) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
            | ({"lfs": {"oid": _oid(data), "size": len(data), "pointerSize": 134}} if len(data) >= LARGE else {})
            for path, data in files.items()
        ]


def use_models(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Let the client library of this process talk to a hub, and keep its cache in a folder."""
    for name, value in {
        "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache),
    }.items():  # fmt: skip
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    # The client that transformers keeps for good would ask the hub of an earlier test, and wait for it four times.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def _files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if len(data) >= LARGE else _git_oid(data)
