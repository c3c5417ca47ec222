"""Values that no teacher can have, in shards that are sound but for them; and data files that are traps."""

from __future__ import annotations

import gzip
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from tests.battery.battery_cases import REFUSED, SAME, Case, Failed, refused
from tests.battery.battery_hostile import LIMITS
from tests.battery.battery_material import Material, build, craft, train, weights_of
from tests.battery.battery_process import GIB, run

Change = Callable[[np.ndarray, random.Random], object]


def _put(value: float) -> Change:
    """One number of an array becomes another."""

    def change(array: np.ndarray, rng: random.Random) -> None:
        array.reshape(-1)[rng.randrange(array.size)] = value

    return change


def _everywhere(value: float) -> Change:
    def change(array: np.ndarray, _: random.Random) -> None:
        array[...] = value

    return change


def _tile(*values: float) -> Change:
    def change(array: np.ndarray, rng: random.Random) -> None:
        array[rng.randrange(len(array))] = values

    return change


def _repeat(array: np.ndarray, _: random.Random) -> None:
    array[1] = array[0]


_NUMBERS = (np.nan, np.inf, -np.inf)
CHANGES: tuple[tuple[str, str, Change], ...] = (
    *(("token_ids", f"{value}", _put(value)) for value in (117, 200, 32_000, 2**31, 2**32 - 1)),
    ("token_ids", "repeated", _repeat),
    ("token_ids", "all alike", _everywhere(7)),
    *(("labels", f"{value}", _put(value)) for value in (117, 32_000, 2**31, 2**32 - 1)),
    *(("top_logprob", f"{value}", _put(value)) for value in (*_NUMBERS, 0.5, 3.0, 6e4)),
    ("top_logprob", "all above 0", _everywhere(1.0)),
    *(("tail_logmass", f"{value}", _put(value)) for value in (np.nan, np.inf, 0.5, 3.0, 6e4)),
    ("tail_logmass", "all 1", _everywhere(0.0)),
    *(("answer_image_mass", f"{value}", _put(value)) for value in (*_NUMBERS, -0.5, -1e3, 2.0, 6e4)),
    *(("text_image_mass", f"{value}", _put(value)) for value in (*_NUMBERS, -0.5, 2.0, 6e4)),
    *(("visual_columns", f"{value}", _put(value)) for value in (*_NUMBERS, -0.5, 2.0, 6e4)),
    *(("hidden", f"{value}", _put(value)) for value in _NUMBERS),
    *(
        ("tiles", f"{values}", _tile(*values))
        for values in (
            (1e30, 1e30, 0, 0, 1, 1), (65_536, 65_536, 0, 0, 1, 1), (6, 6, 0, 0, 1e30, 1e30), (6, 6, 1, 1, 0, 0),
            (np.nan,) * 6, (-6, -6, 0, 0, 1, 1), (0, 0, 0, 0, 1, 1), (6.5, 6, 0, 0, 1, 1), (6, 6, -1e30, 0, 1, 1),
            (6, 6, np.inf, 0, 1, 1), (36, 1, 0, 0, 0, 0), (6, 7, 0, 0, 1, 1),
        )
    ),
)  # fmt: skip


def rewrite_records(
    source: Path, target: Path, field: str, change: Change, rng: random.Random, everywhere: bool
) -> None:
    """Write a cache again with the project's own writer, one array of one record, or of all, changed."""
    import shutil

    from vlm_distill_cache.common.cache.manifest import seal
    from vlm_distill_cache.common.cache.sidecar import read_sidecar
    from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
    from vlm_distill_cache.common.opening import open_cache

    cache = open_cache(source)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("shards", "manifest.json", "index.bin"))
    stored = [
        (shard, name) for shard in range(cache.plan.shard_count) for name in read_sidecar(source, shard).sample_ids
    ]
    chosen = set(stored) if everywhere else {rng.choice(stored)}
    hit = False
    for shard in range(cache.plan.shard_count):
        writer = open_writer(cache.plan.store, target, shard, cache.plan.all_fields)
        for name in read_sidecar(source, shard).sample_ids:
            record = {key: array.copy() for key, array in cache.read(name).items()}
            wanted = (shard, name) in chosen or not hit
            if wanted and record[field].size > 1:
                with np.errstate(all="ignore"):
                    change(record[field], rng)
                hit = True
            writer.append(name, record)
        finish_shard(writer, read_sidecar(source, shard).failed)
    if not hit:
        raise ValueError(f"no record has {field}")
    seal(target)


def hostile_value(
    made: Material, field: str, change: Change, everywhere: bool, folder: Path, rng: random.Random
) -> str:
    """`verify --deep` and `pull` must refuse it; training must refuse it or not have read it."""
    cache = folder / "cache"
    craft(lambda: rewrite_records(made.caches["rich"], cache, field, change, rng, everywhere), folder / "craft.txt")
    believed = []
    for verb in (["verify", "--deep", str(cache)], ["pull", str(cache), str(folder / "pulled")]):
        said = run(["cachectl", *verb], folder / f"{verb[0]}.txt", limit_s=25, memory=GIB)
        if not refused(said, what=verb[0], **LIMITS):
            believed.append(verb[0])
    said = run(train("train", cache, folder / "output"), folder / "train.txt", limit_s=25, memory=GIB)
    how = REFUSED if refused(said, what="train", **LIMITS) else SAME
    if how == SAME and weights_of(folder / "output") != weights_of(made.trained["rich"]):
        believed.append("train")
    if believed:
        raise Failed(f"believed by {', '.join(believed)}")
    return how


def values(made: Material) -> Iterator[Case]:
    """Each change in one record, and in all."""
    for field, what, change in CHANGES:
        for everywhere in (False, True):
            yield Case(
                kind="hostile",
                name=f"{field} {what}{' in all records' if everywhere else ''}",
                work=partial(hostile_value, made, field, change, everywhere),
            )


def _entries(**changes: object) -> str:
    entry = {
        "id": "a",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}],
    }
    return json.dumps([{**entry, **changes}])


def _png(width: int, height: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A picture that says it is so large; its pixels are a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(min(3 * width * height + height, 1 << 24)))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(*e) for e in extra)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


_GIF = (
    b"GIF89a"
    + struct.pack("<HHBBB", 60_000, 60_000, 0x80, 0, 0)
    + bytes(6)
    + (b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02D\x01\x00") * 50_000
    + b";"
)
_BOMB = zlib.compress(bytes(1 << 28), 9)
_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
SOUND_PNG = _png(72, 72)
DATA_FILES: dict[str, tuple[str, str | bytes]] = {
    "JSON, deep": ("data.json", "[" * 200_000 + "]" * 200_000),
    "JSON, deep in an entry": (
        "data.json",
        _entries(extra=0).replace('"extra": 0', f'"extra": {"[" * 99_999}{"]" * 99_999}'),
    ),
    "JSON lines, deep": ("data.jsonl", '{"a":' * 100_000 + "1" + "}" * 100_000 + "\n"),
    "an integer of 5,000 digits": ("data.json", _entries(extra=0).replace('"extra": 0', f'"extra": {"7" * 5000}')),
    "an id of 5,000 digits": ("data.json", _entries(id=0).replace('"id": 0', f'"id": {"7" * 5000}')),
    "1e999": ("data.json", _entries(id=0).replace('"id": 0', '"id": 1e999')),
    "NaN": ("data.json", _entries(id=0).replace('"id": 0', '"id": NaN')),
    "a lone surrogate": ("data.json", _entries(id="\ud800")),
    "an id of 10 MB": ("data.json", _entries(id="i" * 10_000_000)),
    "an id with escapes": ("data.json", _entries(id="\x1b]0;owned\x07\x1b[2K\r")),
    "a question of 40 MB": (
        "data.json",
        _entries(
            conversations=[{"from": "human", "value": "<image>" + "w " * 20_000_000}, {"from": "gpt", "value": "red"}]
        ),
    ),
    "a system prompt of 40 MB": (
        "data.json",
        _entries(
            conversations=[
                {"from": "system", "value": "w " * 20_000_000},
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": "red"},
            ]
        ),
    ),
    "an image beside the folder": ("data.json", _entries(image="../../../../etc/passwd")),
    "an image that is a list": ("data.json", _entries(image=[["a.png"]] * 100_000)),
    "conversations as text": ("data.json", _entries(conversations="x" * 1_000_000)),
    "an object for a list": ("data.json", '{"a": 1}'),
    "null": ("data.json", "null"),
    "nothing": ("data.json", ""),
    "zeros": ("data.json", bytes(1 << 20)),
    "a gzip bomb": ("data.json.gz", gzip.compress(bytes(1 << 28))),
    "one line of 200 MB": ("data.jsonl", "x" * 200_000_000),
    "CSV, a field of 50 MB": ("data.csv", "image,question,answer\na.png,What?," + "x" * 50_000_000 + "\n"),
    "CSV, NUL": ("data.csv", "image,question,answer\na.png,Wh\0at?,red\n"),
    "CSV, an open quote": ("data.csv", 'image,question,answer\na.png,"What?,red\n' * 100_000),
    "YAML, aliases": ("data.yaml", _LAUGHS + "mixture: *i\n"),
    "YAML, deep": ("data.yaml", "[" * 20_000),
    "YAML, an object": ("data.yaml", "!!python/object/apply:os.system ['true']\n"),
    "parquet, garbage": ("data.parquet", b"PAR1" + bytes(1000) + b"PAR1"),
    "parquet, a footer of 2 GB": ("data.parquet", b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1"),
    "tar, garbage": ("data.tar", b"\xff" * 4096),
    "a picture of 65,535 squared": ("a.png", _png(65_535, 65_535)),
    "a picture of 2^31 - 1 squared": ("a.png", _png(2**31 - 1, 2**31 - 1)),
    "a picture of no width": ("a.png", _png(0, 5)),
    "a picture of one line": ("a.png", _png(1_000_000, 1)),
    "a picture with a text bomb": ("a.png", _png(72, 72, (b"zTXt", b"k\0\0" + _BOMB))),
    "a picture with a profile bomb": ("a.png", _png(72, 72, (b"iCCP", b"k\0\0" + _BOMB))),
    "a GIF of 50,000 frames": ("a.png", _GIF),
    "a picture that is text": ("a.png", b"<svg onload=alert(1)>"),
    "two billion drawn pictures": ("", "shapes:images=2000000000"),
    "a number of 5,000 digits": ("", "shapes:images=" + "9" * 5000),
    "an unknown name": ("", "shapes:2000000000"),
}


def hostile_data(made: Material, name: str, content: str | bytes, folder: Path, _rng: random.Random) -> str:
    """A cache is built of it, or not; what is built is sound."""
    place = folder / "data"
    place.mkdir(parents=True)
    (place / "a.png").write_bytes(SOUND_PNG)
    (place / "data.json").write_text(_entries())
    if name:
        (place / name).write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    data = str(place / (name if name and name != "a.png" else "data.json")) if name else str(content)
    command = [
        *build(folder / "cache", store="webdataset", signals="logits", data=data),
        "--set",
        "max_failed_share=0.9",
    ]
    if name:
        command += ["--teacher", str(Path("stage1_teacher/builtin").resolve())]
    said = run(command, folder / "build.txt", limit_s=25, memory=GIB)
    if refused(said, what="build", **LIMITS):
        return REFUSED
    said = run(["cachectl", "verify", "--deep", str(folder / "cache")], folder / "verify.txt", limit_s=25, memory=GIB)
    if refused(said, what="verify --deep", **LIMITS):
        raise Failed(f"build wrote what verify refuses: {said.text[-800:]}")
    return SAME


def data_files(made: Material) -> Iterator[Case]:
    """Each trap, and a sound file."""
    traps = {"data.json": ("data.json", _entries()), **DATA_FILES}
    for what, (name, content) in traps.items():
        yield Case(kind="hostile", name=f"data: {what}", work=partial(hostile_data, made, name, content))
