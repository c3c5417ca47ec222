"""Caches of somebody who can make every checksum fit: each leaf of each document replaced, headers that lie, templates."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import load_file

from tests.battery.battery_cases import REFUSED, SAME, Case, Failed, refused
from tests.battery.battery_material import Material, refuse_differences, train, tree, weights_of
from tests.battery.battery_process import GIB, run

LIMITS: dict[str, Any] = {"limit_s": 20.0, "memory": GIB}
_RAW = "@raw@"  # stands for text that no JSON writer writes
_DEEP = 100_000


class Raw(str):
    """A value as it shall stand in the file."""

    __slots__ = ()


VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**18, 0.0, -0.5, 1e308, "", "x", "nan", "../../../etc/passwd",
    "/etc/passwd", "\x1b]0;owned\x07\x1b[2K\rok", "\u202e", "\x00", "a" * 100_000, "{{ 7*7 }}", "shapes:images=2000000000",
    "org/name", "https://127.0.0.1:9/x", [], {}, [[]], [1, "a"], {"a": {}}, [0] * 100_000, Raw("NaN"), Raw("1e999"),
    Raw("-Infinity"), Raw("7" * 5000), Raw("[" * _DEEP + "]" * _DEEP), Raw('{"a":' * _DEEP + "1" + "}" * _DEEP),
)  # fmt: skip


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The place of every value below a JSON value, objects and lists included."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(min(2, len(value))):
            yield from leaves(value[key], (*path, key))


def replace(body: Any, path: tuple, new: Any) -> None:
    """Put another value in a place."""
    for key in path[:-1]:
        body = body[key]
    body[path[-1]] = new


def text_of(body: Any, raw: str, **how: Any) -> bytes:
    """JSON, with raw text where its mark stands."""
    return json.dumps(body, sort_keys=True, **how).replace(f'"{_RAW}"', raw).encode("utf-8", "surrogatepass")


def fingerprint_of(body: Any, raw: str = "") -> str:
    """The checksum that a document states, made anew."""
    return xxhash.xxh3_128_hexdigest(text_of(body, raw, separators=(",", ":")))


def write_signed(path: Path, body: dict[str, Any], raw: str = "") -> None:
    """Write a document with the checksum that fits."""
    body = {key: value for key, value in body.items() if key != "checksum"}
    signed = {**body, "checksum": fingerprint_of(body, raw)}
    path.write_bytes(text_of(signed, raw, indent=1, ensure_ascii=False) + b"\n")


def entry_of(path: Path) -> dict[str, Any]:
    """Size and digests of a file, as documents state them."""
    data = path.read_bytes()
    digests = {"sha256": hashlib.sha256(data).hexdigest(), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    return {"bytes": len(data), **digests}


def sign_all(cache: Path, *, plan_hash: str | None = None) -> None:
    """Make the manifest agree with every file of a cache."""
    manifest = json.loads((cache / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = entry_of(cache / name)
    for shard in manifest["shards"]:
        shard["sidecar"] = entry_of(cache / "shards" / f"{shard['index']:05d}.json")
    if plan_hash is not None:
        manifest["plan_hash"] = plan_hash
    write_signed(cache / "manifest.json", manifest)


def change(cache: Path, name: str, path: tuple, new: Any) -> None:
    """Replace one value of a document and sign everything."""
    body, raw = json.loads((cache / name).read_text()), new if isinstance(new, Raw) else ""
    replace(body, path, _RAW if raw else new)
    if name in ("plan.json", "manifest.json") or name.startswith("shards/"):
        write_signed(cache / name, body, raw)
    else:
        (cache / name).write_bytes(text_of(body, raw, indent=1))
    if name != "manifest.json":
        body.pop("checksum", None)
        sign_all(cache, plan_hash=fingerprint_of(body, raw) if name == "plan.json" else None)


def look_at(cache: Path, folder: Path, *, verb: str = "train", **changes: object) -> str:
    """Inspect, verify and train; every one of them refuses or does its work within bounds, with a student of finite weights."""
    said = run(["cachectl", "inspect", str(cache)], folder / "inspect.txt", limit_s=25, memory=GIB)
    refused(said, what="inspect", **LIMITS)
    said = run(["cachectl", "verify", "--deep", str(cache)], folder / "verify.txt", limit_s=25, memory=GIB)
    refused(said, what="verify --deep", **LIMITS)
    output = folder / "output"
    said = run(train(verb, cache, output, **changes), folder / "train.txt", limit_s=25, memory=GIB)
    if refused(said, what=verb, **LIMITS):
        if verb == "run" and any(output.rglob("model.safetensors")):
            raise Failed(f"run refused after a training: {said.text[-800:]}")
        return REFUSED
    students = list(output.rglob("final/model.safetensors"))
    if not students:
        raise Failed("train ended with 0 and left no student")
    for path in students:
        if not all(np.isfinite(weights).all() for weights in load_file(path).values()):
            raise Failed("train ended with 0 and a student that is not finite")
    return SAME


def hostile_leaf(made: Material, name: str, path: tuple, new: Any, folder: Path, _rng: random.Random) -> str:
    """One value of one document replaced."""
    shutil.copytree(made.caches["rich"], folder / "cache")
    change(folder / "cache", name, path, new)
    if "evaluation" in path:
        return look_at(folder / "cache", folder, verb="run")
    return look_at(folder / "cache", folder, **with_projector(name))


def documents(made: Material) -> Iterator[Case]:
    """Each leaf of each document with a few of the values, all values in turn."""
    rng, cache = random.Random("documents"), made.caches["rich"]
    names = ["plan.json", "manifest.json", "shards/00000.json", "projector.json", "vision_tower.json"]
    names += sorted(f"processor/{path.name}" for path in (cache / "processor").glob("*config.json"))
    values: list[Any] = []
    for name in names:
        body = json.loads((cache / name).read_text())
        for path in leaves(body):
            if path == ("checksum",):
                continue
            for _ in range(2 if name.startswith(("projector", "vision")) else 1):
                if not values:
                    values = rng.sample(VALUES, len(VALUES))
                new = values.pop()
                shown = new[:30] if isinstance(new, str) else str(new)[:30]
                yield Case(
                    kind="hostile",
                    name=f"{name} {'.'.join(map(str, path))} = {shown!r}",
                    work=partial(hostile_leaf, made, name, path, new),
                )


def with_header(data: bytes, edit: Callable[[dict[str, Any]], object], size: int | None = None) -> bytes:
    """A safetensors file with another header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data[8 + length :]


def _of_first(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def edit(header: dict[str, Any]) -> None:
        first = next(name for name in header if name != "__metadata__")
        header[first][key] = value

    return edit


def _nothing(_: dict[str, Any]) -> None:
    pass


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "a header of 1 TB": lambda data: with_header(data, _nothing, size=1 << 40),
    "a header of 2^64 - 1": lambda data: with_header(data, _nothing, size=(1 << 64) - 1),
    "a header of nothing": lambda data: with_header(data, _nothing, size=0),
    "another dtype": lambda data: with_header(data, _of_first("dtype", "F16")),
    "an unknown dtype": lambda data: with_header(data, _of_first("dtype", "Q9")),
    "a shape of 10^12": lambda data: with_header(data, _of_first("shape", [10**6, 10**6])),
    "a negative shape": lambda data: with_header(data, _of_first("shape", [-1])),
    "offsets beyond the file": lambda data: with_header(data, _of_first("data_offsets", [0, 1 << 50])),
    "offsets that overlap": lambda data: with_header(data, _of_first("data_offsets", [4, 8])),
    "a tensor less": lambda data: with_header(data, lambda header: header.pop(next(iter(header)))),
    "no tensors": lambda data: with_header(data, lambda header: header.clear()),
    "names of 1 MB": lambda data: with_header(data, lambda header: header.update({"a" * 2**20: {}})),
    "a list": lambda data: struct.pack("<Q", 2) + b"[]" + data,
    "only NaN": lambda data: (
        data[: 8 + struct.unpack("<Q", data[:8])[0]] + b"\xff" * (len(data) - 8 - struct.unpack("<Q", data[:8])[0])
    ),
    "cut": lambda data: data[: len(data) // 2],
    "no bytes": lambda data: b"",
    "a pickle": lambda data: b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.",
}


def hostile_header(
    made: Material, name: str, write: Callable[[bytes], bytes], folder: Path, _rng: random.Random
) -> str:
    """A safetensors file whose header lies."""
    shutil.copytree(made.caches["rich"], folder / "cache")
    path = folder / "cache" / name
    path.write_bytes(write(path.read_bytes()))
    sign_all(folder / "cache")
    return look_at(folder / "cache", folder, **with_projector(name))


def with_projector(name: str) -> dict[str, str]:
    """Options with which a student reads a file of the projector, which others do not."""
    return {"projector": "taf"} if name.startswith("projector") else {}


_BIG = 10**10
TEMPLATES = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}{{ messages }}",
    "a long text": f"{{{{ 'A' * {_BIG} }}}}",
    "a wide format": "{{ '%" + str(_BIG) + "d' % 1 }}",
    "centre": f"{{{{ 'x'|center({_BIG}) }}}}",
    "doubling": "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(64) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a shift": "{{ 2 ** 4000000000 }}",
    "lists": f"{{{{ [0] * {_BIG} }}}}",
    "tojson": "{{ ([messages] * 10000000) | tojson }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep ifs": "{% if 1 %}" * 3000 + "x" + "{% endif %}" * 3000,
    "40 MB": "x" * 40_000_000,
    "no template": "{% if",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch /tmp/owned') }}",
    "raises": "{{ raise_exception('\x1b]0;owned\x07') }}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}{{ os.environ }}",
    "divides": "{{ 1 / 0 }}",
    "nothing": "{% for m in messages %}{% endfor %}",
    "joined": "{{ (range(99999) | map('string') | join) * 99999 }}",
    "indent": "{{ ('a\n' * 99999) | indent(99999) }}",
    "regular": "{{ ('a' * 40000) | wordwrap(1) | urlize }}{% for i in range(99999) %}{{ ('a ' * 40000) | title }}{% endfor %}",
    "on one answer": "{% for m in messages %}{{ m.role }}{% if 'red' in m.content|string or loop.index > 1 %}{{ 'A' * "
    + str(_BIG)
    + " }}{% endif %}{% endfor %}",
}


def hostile_template(made: Material, source: str, folder: Path, _rng: random.Random) -> str:
    """A plan with a chat template that never ends, grows, or reaches for more."""
    shutil.copytree(made.caches["rich"], folder / "cache")
    plan = json.loads((folder / "cache" / "plan.json").read_text())
    plan["template"] |= {"name": "chat", "chat_template": source}
    plan["fingerprints"]["template"] = fingerprint_of(plan["template"])
    plan.pop("checksum")
    write_signed(folder / "cache" / "plan.json", plan)
    sign_all(folder / "cache", plan_hash=fingerprint_of(plan))
    owned = Path("/tmp/owned")  # what the templates would write
    owned.unlink(missing_ok=True)
    how = look_at(folder / "cache", folder)
    if owned.exists():
        raise Failed("a template ran a command")
    if how != REFUSED:
        raise Failed("a template that writes nothing of the conversation was believed")
    return how


def hostile_system(made: Material, folder: Path, _rng: random.Random) -> str:
    """A system prompt of 40 MB in the stored template."""
    shutil.copytree(made.caches["rich"], folder / "cache")
    change(folder / "cache", "plan.json", ("template", "system"), "s" * 40_000_000)
    return look_at(folder / "cache", folder)


def untouched(made: Material, folder: Path, _rng: random.Random) -> str:
    """The judges themselves: a sound cache, signed anew, trains to the same student under the same limits."""
    shutil.copytree(made.caches["rich"], folder / "cache")
    sign_all(folder / "cache")
    if tree(folder / "cache") != tree(made.caches["rich"]):
        raise Failed("signing a sound cache anew changes it")
    if look_at(folder / "cache", folder) != SAME:
        raise Failed(f"a sound cache is refused: {(folder / 'train.txt').read_text()[-800:]}")
    refuse_differences(weights_of(folder / "output"), weights_of(made.trained["rich"]), "a sound cache")
    shutil.rmtree(folder / "output")
    if look_at(folder / "cache", folder, projector="taf") != SAME:
        raise Failed(f"a sound cache is refused: {(folder / 'train.txt').read_text()[-800:]}")
    return SAME


def hostile(made: Material) -> list[Case]:
    """All cases of caches; those of values and data are in `battery_values`."""
    from tests.battery.battery_values import data_files, values

    cases = [Case(kind="hostile", name="a sound cache", work=partial(untouched, made)), *documents(made)]
    for name in ("projector.safetensors", "vision_tower.safetensors"):
        cases += [
            Case(kind="hostile", name=f"{name}: {what}", work=partial(hostile_header, made, name, write))
            for what, write in HEADERS.items()
        ]
    cases += [
        Case(kind="hostile", name=f"chat template: {what}", work=partial(hostile_template, made, source))
        for what, source in TEMPLATES.items()
    ]
    cases.append(Case(kind="hostile", name="a system prompt of 40 MB", work=partial(hostile_system, made)))
    return [*cases, *values(made), *data_files(made)]
