"""Hundreds of damages at random places: each is found, none crashes anything, none reaches a training step.

The card (README.md) is left out: it is prose for people, which they may edit, and no program reads it.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
from cache_factory import build_cache, make_plan, sample_id, tree

from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.side_files import CARD
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.inspect import describe_cache
from vlm_distill_cache.common.tools.record_view import describe_record
from vlm_distill_cache.common.tools.repair import repair
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.stage1_teacher.config import SIGNALS

FROZEN = Path(__file__).parents[1] / "fixtures"
REFUSED = (CacheFormatError, CacheMismatchError)
PLACES = {  # more than six hundred in all; zarr takes longer
    ("frozen", "zarr"): 60, ("fresh", "zarr"): 60, ("today", "zarr"): 50,
    ("frozen", "webdataset"): 90, ("fresh", "webdataset"): 210, ("today", "webdataset"): 130,
    ("several", "zarr"): 16, ("several", "webdataset"): 90,
}  # fmt: skip


def make(kind, store, folder, build):
    """Make a cache: one written long ago; of format version 2; of several shards; with every signal there is today."""
    if kind == "frozen":
        shutil.copytree(FROZEN / f"cache-v1-{store}", folder)
    elif kind == "several":
        shutil.copytree(FROZEN / f"cache-v2-{store}", folder)
    elif kind == "fresh":
        build_cache(folder, make_plan(store, samples=6, shard_size=3), fidelity={"kl": 0.25})
    else:
        presets = {"zarr": "exact", "webdataset": "blocks"}
        build(folder, store=store, signals=SIGNALS, map_preset=presets[store], limit=3, fidelity_samples=0)


def read_all(folder):
    """Every record, by sample id, as bytes; and why samples failed."""
    cache = open_cache(folder)
    cache.check_side_files()
    records = {name: {k: v.tobytes() for k, v in cache.read(name).items()} for name in cache.sample_ids}
    return records, dict(cache.failed), cache.plan


def damaged(data, rng):
    """Other bytes than ``data``, and what was done to them; None for no file at all."""
    kind = rng.choices(("flip", "cut", "delete"), weights=(70, 20, 10))[0]
    if kind == "delete" or not data:
        return None, "deleted"
    place = rng.randrange(len(data))
    if kind == "cut":
        return data[:place], f"cut at {place}"
    bit = rng.randrange(8)
    return b"".join([data[:place], bytes([data[place] ^ 1 << bit]), data[place + 1 :]]), f"bit {bit} of byte {place}"


@pytest.mark.parametrize(("kind", "store"), list(PLACES))
@pytest.mark.slow(quick=1)
def test_no_damage_anywhere_is_overlooked_or_used(kind, store, tmp_path, request):
    folder, rng = tmp_path / "cache", random.Random(f"{kind} {store}")
    make(kind, store, folder, request.getfixturevalue("build_cache") if kind == "today" else None)
    originals = {name: data for name, data in tree(folder).items() if name != CARD}
    expected = read_all(folder)
    assert verify(folder, deep=True) == []
    unread = 0
    places = PLACES[kind, store]
    for _ in range(places):
        # Files at random, not bytes: most bytes are in few files. Large ones every other time.
        name = rng.choice(sorted(originals)) if rng.random() < 0.5 else max(
            rng.sample(sorted(originals), 3), key=lambda n: len(originals[n])
        )  # fmt: skip
        data, what = damaged(originals[name], rng)
        path = folder / name
        path.unlink()  # a new inode: an older mapping of the file must not change
        if data is not None:
            path.write_bytes(data)
        assert name in {damage.path for damage in verify(folder)}, (name, what)
        try:
            found = read_all(folder)
        except REFUSED:
            pass
        else:
            unread += 1
            assert found == expected, (name, what)  # never other values than the ones written
        path.unlink(missing_ok=True)
        path.write_bytes(originals[name])
    assert verify(folder, deep=True) == []
    assert unread < places / 4  # of files that reading does not need, such as the arrays' own zarr.json


NONSENSE = [
    None,
    True,
    -1,
    0,
    1.5,
    1 << 40,
    1 << 63,
    1e308,
    "",
    "x",
    "../x",
    "\ud800",
    [],
    {},
    [[]],
    [1, "a"],
    {"a": []},
]


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def put(value, path, new):
    if not path:
        return new
    *parents, last = path
    for key in parents:
        value = value[key]
    value[last] = new
    return None


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.slow
def test_nonsense_with_a_checksum_that_fits_is_refused_or_harmless(store, tmp_path):
    """Whoever makes checksums anew can write any JSON: none of it may end a program but by an error of ours."""
    folder, rng = tmp_path / "cache", random.Random(store)
    make("fresh", store, folder, None)
    names = ["plan.json", "manifest.json", "shards/00000.json"] + ["shards/00000.zarr/zarr.json"] * (store == "zarr")
    refused = 0
    rounds = {"zarr": 40, "webdataset": 180}[store]  # zarr takes longer
    for _ in range(rounds):
        name = rng.choice(names)
        path = folder / name
        kept = path.read_bytes()
        body = json.loads(kept) if name.endswith("zarr.json") else read_document(path)
        place, new = rng.choice(list(places(body))[1:]), rng.choice(NONSENSE)
        put(body, place, new)
        path.unlink()
        if name.endswith("zarr.json"):
            path.write_text(json.dumps(body))
        else:
            path.write_bytes(document_bytes(body) if new != "\ud800" else b"{}")
        verify(folder, deep=True)
        repair(folder, dry_run=True)
        for look in (
            read_all,
            describe_cache,
            lambda where: describe_record(open_cache(where), sample_id(0)),
        ):
            try:
                look(folder)
            except REFUSED:
                refused += 1
        path.write_bytes(kept)
    assert verify(folder, deep=True) == []
    assert refused > rounds  # of three looks each
