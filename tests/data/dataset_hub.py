"""A hub that serves data sets: that of the models, by the addresses of data sets, with ranges as readers of tables ask."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from hub_server import ModelHub
from servers import Answer, Fault


class DatasetHub(ModelHub):
    """A hub of data sets, which `publish` makes."""

    def answer(self, handler: BaseHTTPRequestHandler, fault: Fault) -> Answer:
        if "datasets/" not in handler.path:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        path = urlsplit(handler.path).path
        if "/paths-info/" in path:
            return self._paths(handler, path)
        handler.path = handler.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        wanted, status_of = handler.headers.get("Range"), super().answer(handler, fault)
        status, head, data = status_of
        if status == 206 and wanted is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            total = int(first) + len(data)
            data = data[: int(last) + 1 - int(first)] if last else data
            head |= {"Content-Range": f"bytes {first}-{int(first) + len(data) - 1}/{total}"}
        return status, head, data

    def _paths(self, handler: BaseHTTPRequestHandler, path: str) -> Answer:
        size = int(handler.headers.get("Content-Length", 0))
        asked = parse_qs(handler.rfile.read(size).decode()).get("paths", [])
        _, _, organisation, name, _, revision = path.split("/", 6)[1:]
        repository = f"{organisation}/{name}"
        commit = self._commit_of(repository, revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        found = [entry for entry in self._tree(self._commits[repository][commit]) if entry["path"] in asked]
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
