"""As much of the Hugging Face Hub as pushing and pulling a cache needs: files, commits, large files.

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

from servers import Answer, Fault, FaultyServer

TOKEN = "hf_for_tests"
LARGE = 2_000  # bytes from which a file travels beside the commit
_NO_ACCESS: Answer = (401, {"X-Error-Message": "Invalid credentials"}, b"{}")


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
        self._large: dict[str, bytes] = {}

    def answer(self, handler: BaseHTTPRequestHandler, fault: Fault) -> Answer:
        size = int(handler.headers.get("Content-Length", 0))
        body = handler.rfile.read(size)
        parts = [unquote(part) for part in urlsplit(handler.path).path.split("/") if part]
        if handler.command == "PUT":
            self._large[parts[-1]] = body
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
        elif parts[-1] == "validate-yaml":
            found = {"errors": [], "warnings": []}
        elif parts[-2] == "preupload":
            files = json.loads(body)["files"]
            mode = {file["path"]: "lfs" if file["size"] >= LARGE else "regular" for file in files}
            found = {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in mode.items()]}
        elif parts[-1] == "batch":
            found = {"objects": [self._place(entry) for entry in json.loads(body)["objects"]]}
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
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _place(self, entry: dict[str, object]) -> dict[str, object]:
        actions = {"upload": {"href": f"{self.url}/large/{entry['oid']}"}}
        return entry | ({"actions": actions} if entry["oid"] not in self._large else {})

    def _commit(self, folder: Path, body: bytes) -> dict[str, object]:
        names = []
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                continue
            names.append(value["path"])
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if key == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                data = self._large[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                path.write_bytes(data)
            else:
                assert key == "deletedFile"
                path.unlink()
        self.commits.append(names)
        oid = f"{len(self.commits):040x}"
        organisation, name, _ = folder.parts[-3:]
        return {"commitOid": oid, "commitUrl": f"{self.url}/datasets/{organisation}/{name}/commit/{oid}"}
