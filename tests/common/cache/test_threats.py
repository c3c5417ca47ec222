"""A pulled cache is data: it names no file outside itself, costs no more than it holds, and runs nothing.

What each test shows is claimed in ``docs/threats.md``; checksums prove nothing here, since an attacker makes
them anew (`forge`).
"""

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from cache_factory import build_cache, build_shard, make_plan, make_record
from numcodecs.zstd import Zstd
from test_stores import ORDINARY, codecs_of, read_all, write

from vlm_distill_cache.common.cache.documents import document_bytes, read_document, safe_path
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import FileEntry, sidecar_path
from vlm_distill_cache.common.cache.stores import finish_shard
from vlm_distill_cache.common.cache.stores.webdataset_store import EXTENSION, decode_member, encode_member
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import MAX_JSON_ITEMS, parse_json, read_json
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify

HOSTILE_PATHS = [
    "/etc/passwd", "../x", "a/../../x", "..", ".", "", "./a", "a/.", "a//b", "a/", "C:/x", "c:x", "a/b:stream",
    "\\\\host\\share", "a\\..\\b", "nul\0x", "new\nline", "esc\x1b[2J", "\uff0e\uff0e/x", "a\uff0fb", "\u2025/x",
    "a\u202eb", "\ud800", "x.", "x ", "x./y", ".tmp-x", "a/.tmp-x", "x" * 2000, 5, None,
]  # fmt: skip


@pytest.fixture(params=["zarr", "webdataset"])
def cache(request, tmp_path):
    build_cache(tmp_path / "cache", make_plan(request.param, samples=4, shard_size=4))
    return tmp_path / "cache"


def forge(path, change):
    """Change a document and give it the checksum that fits."""
    body = read_document(path)
    change(body)
    path.write_bytes(document_bytes(body))


def resign(cache):
    """Make sidecar, index and manifest agree with changed files."""

    def digest(body):
        for name in body["files"]:
            body["files"][name] = FileEntry.of(cache / name).to_dict()

    forge(sidecar_path(cache, 0), digest)
    seal(cache)


def files_of(cache):
    return list(read_document(sidecar_path(cache, 0))["files"])


def assert_refused(cache):
    """Found by `verify`, and never read as if nothing were wrong."""
    assert verify(cache)
    with pytest.raises(CacheFormatError):
        read_everything(cache)


def read_everything(cache):
    opened = open_cache(cache)
    opened.check_side_files()
    for name in opened.sample_ids:
        opened.read(name)


# Paths and links: nothing outside the folder is named, read or written.


@pytest.mark.parametrize("name", HOSTILE_PATHS, ids=ascii)
def test_paths_that_could_leave_the_folder_are_refused(name):
    with pytest.raises(CacheFormatError, match="could leave the cache folder"):
        safe_path(name, "here")


@pytest.mark.parametrize("name", ["a", "a/b.json", "processor/é.txt", "shards/00000.zarr/labels/c/0", "..a/b..c"])
def test_ordinary_paths_are_accepted(name):
    assert safe_path(name, "here") == name


@pytest.mark.parametrize("document", [MANIFEST, "shards/00000.json"])
def test_descriptions_that_list_files_elsewhere_are_refused(cache, document):
    entry = {"bytes": 1, "xxh3_128": "0" * 32, "sha256": "0" * 64}
    forge(cache / document, lambda body: body["files"].update({"../../outside": entry}))
    assert document in {damage.path for damage in verify(cache)}
    assert_refused(cache)


@pytest.mark.parametrize("name", ["shards/00000.json", "shards/x", MANIFEST, "README.md"])
def test_a_manifest_cannot_list_what_others_own(cache, name):
    entry = {"bytes": 1, "xxh3_128": "0" * 32, "sha256": "0" * 64}
    forge(cache / MANIFEST, lambda body: body["files"].update({name: entry}))
    with pytest.raises(CacheFormatError, match="no file beside the shards"):
        open_cache(cache)


def test_no_link_inside_a_cache_is_followed(cache, tmp_path):
    for name in ["plan.json", MANIFEST, "index.bin", "processor/note.json", "processor", "shards",
                 "shards/00000.json", *files_of(cache)[:4]]:  # fmt: skip
        path, moved = cache / name, tmp_path / "moved"
        path.rename(moved)  # with the right content: only that it is a link is wrong
        path.symlink_to(moved)
        assert verify(cache), name
        if name != "shards":  # refused further down: every file's folders are looked at
            assert any(name in damage.path or damage.path in name for damage in verify(cache)), name
        if name not in ("processor", "processor/note.json", "shards"):
            with pytest.raises(CacheFormatError):
                read_everything(cache)
        path.unlink()
        moved.rename(path)
    assert verify(cache) == []


@pytest.mark.parametrize("folder", ["shards", "processor"])
def test_no_linked_folder_is_read_through(cache, tmp_path, folder):
    (cache / folder).rename(tmp_path / "moved")
    (cache / folder).symlink_to(tmp_path / "moved")
    with pytest.raises(CacheFormatError, match="link or device"):
        read_everything(cache)


def test_a_link_as_long_as_the_file_it_replaces_is_not_followed(tmp_path):
    build_cache(tmp_path / "cache", make_plan("zarr", samples=4, shard_size=4))
    path = tmp_path / "cache" / "shards/00000.zarr/labels/c/0"
    size, moved = path.stat().st_size, tmp_path / "m"
    path.rename(moved)
    path.symlink_to("/" * (size - len(str(moved))) + str(moved))
    assert path.lstat().st_size == size
    assert path.read_bytes()
    with pytest.raises(CacheFormatError, match="link or device"):
        read_everything(tmp_path / "cache")
    assert "labels/c/0" in str(verify(tmp_path / "cache")[0])


def test_pipes_and_devices_make_nobody_wait(cache):
    for name in (
        "plan.json",
        MANIFEST,
        "index.bin",
        "processor/note.json",
        "shards/00000.json",
        files_of(cache)[-1],
    ):
        kept = (cache / name).read_bytes()
        (cache / name).unlink()
        os.mkfifo(cache / name)
        assert any(name == damage.path for damage in verify(cache)), name
        with pytest.raises(CacheFormatError):
            read_everything(cache)
        (cache / name).unlink()
        (cache / name).write_bytes(kept)
    assert verify(cache) == []


def hostile_tars():
    data = encode_member("x", make_record(4))

    def tar(change, tar_format=tarfile.USTAR_FORMAT, name="x" + EXTENSION):
        member, file = tarfile.TarInfo(name), io.BytesIO()
        member.size = len(data)
        with tarfile.open(fileobj=file, mode="w", format=tar_format) as archive:
            change(member)
            archive.addfile(member, io.BytesIO(data))
        return file.getvalue()

    def pax(**headers):
        return tar(lambda member: setattr(member, "pax_headers", headers), tarfile.PAX_FORMAT)

    plain = bytearray(tar(lambda member: None))
    assert read_tar(plain)[0] == "x"
    base256 = plain.copy()
    base256[124:136] = b"\x80" + (len(data)).to_bytes(11, "big")
    prefix = plain.copy()
    prefix[345:350] = b"../.."
    return {
        "pax path": pax(path="../../evil"),
        "pax size": pax(size="99999999999"),
        "pax sparse": pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1" * 15}),
        "gnu long name": tar(lambda member: None, tarfile.GNU_FORMAT, "x" * 200 + EXTENSION),
        "set-user-id": tar(lambda member: setattr(member, "mode", 0o4755)),
        "owner": tar(lambda member: setattr(member, "uname", "root")),
        "size in base 256": bytes(base256),
        "prefix": bytes(prefix),
        "behind the end": bytes(plain) + b"\0" * 10240,
        "text behind the end": bytes(plain[:-1]) + b"x",
    }


def read_tar(data):
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        (Path(folder) / "shards").mkdir()
        (Path(folder) / "shards" / "00000.tar").write_bytes(data)
        return list(read_all(Path(folder), "webdataset"))


@pytest.mark.parametrize("kind", list(hostile_tars()))
def test_tars_are_exactly_what_the_writer_writes(kind):
    with pytest.raises(CacheFormatError, match=r"is not a record of a cache|no end-of-archive mark"):
        read_tar(hostile_tars()[kind])


# Bombs: what is small on disk stays small in memory until its size is known and allowed.


def peak_bytes(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def zstd_with_size(declared, actual=100_000):
    """A frame of zeros whose header declares another size."""
    frame = bytearray(Zstd().encode(b"\0" * actual))
    start = 5 if frame[4] & 32 else 6
    frame[start : start + 4] = declared.to_bytes(4, "little")
    return bytes(frame)


@pytest.mark.parametrize(
    "data",
    [
        zstd_with_size(0xFFFFFFFF),  # above any record
        zstd_with_size(900 << 20),  # allowed, but more than so few bytes can hold
        zstd_with_size(50),  # less than it holds
        Zstd().encode(b"\0" * 1000) + Zstd().encode(b"\0" * (200 << 20)),  # decoders read all frames
        Zstd().encode(b"\0" * 1000) + b"junk",
        Zstd().encode((100_000_000).to_bytes(8, "little") + b" " * 1000),  # a header longer than the file
        Zstd().encode((2 << 20).to_bytes(8, "little") + b"[" * (2 << 20)),  # a deep header
        Zstd().encode(safetensors.numpy.save({"a": np.zeros(2)})),  # no sample id
    ],
    ids=["too large", "too large for its bytes", "lies", "second frame", "trailing bytes", "header", "deep", "no id"],
)  # fmt: skip
def test_members_that_are_bombs_cost_little(data):
    def read():
        with pytest.raises(CacheFormatError):
            decode_member(bytes(data), "here")

    assert peak_bytes(read) < 16 << 20


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, "[" + "{}," * MAX_JSON_ITEMS + "{}]", "1e999", "NaN", '"\ud800'],
    ids=["deep", "deep objects", "long number", "many values", "infinite", "not a number", "cut"],
)  # fmt: skip
def test_json_bombs_are_refused(text, tmp_path):
    data = b'{"format_version": 1, "checksum": "0", "a": ' + text.encode("utf-8", "surrogatepass") + b"}"
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(CacheFormatError):
        read_document(tmp_path / "plan.json")
    assert [damage.path for damage in verify(tmp_path)] == ["plan.json"]


def test_json_is_read_up_to_a_size_and_no_further(tmp_path):
    (tmp_path / "a").write_bytes(b"[" + b" " * 1000 + b"]")
    assert read_json(tmp_path / "a", max_bytes=1002) == []
    with pytest.raises(CacheFormatError, match="larger than 1001 bytes"):
        read_json(tmp_path / "a", max_bytes=1001)
    assert parse_json(b"[]", "here") == []


def sharding(metadata):
    return metadata["codecs"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: codecs_of(m).update(codecs=[sharding(json.loads(json.dumps(m)))]), "are not those of a cache"),
        (lambda m: m.update(codecs=[sharding(m), {"name": "gzip"}]), "no metadata of an array"),
        (lambda m: codecs_of(m).update(codecs=[{"name": "bytes"}, {"name": "gzip"}]), "are not those of a cache"),
        (lambda m: codecs_of(m).update(codecs=[{"name": "numcodecs.pickle"}]), "are not those of a cache"),
        (lambda m: codecs_of(m).update(index_location="start"), "are not those of a cache"),
        (lambda m: codecs_of(m)["index_codecs"].pop(), "are not those of a cache"),
        (lambda m: codecs_of(m)["codecs"][0].update(configuration={"endian": "big"}), "byte orders"),
        (lambda m: m.update(chunk_key_encoding={"name": "v2", "configuration": {"separator": "../"}}), "in plain chunks"),
        (lambda m: m.update(storage_transformers=[{"name": "x"}]), "in plain chunks"),
        (lambda m: m.update(data_type="object"), "declares object"),
        (lambda m: m.update(data_type={"name": "numpy.object"}), "declares {'name'"),
        (lambda m: codecs_of(m).update(chunk_shape=[0]), "whole rows"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[1]), "whole rows"),
        (lambda m: (m["chunk_grid"]["configuration"].update(chunk_shape=[60_000]),
                    codecs_of(m).update(chunk_shape=[1])), "whole rows"),  # an index larger than the data
        (lambda m: codecs_of(m).update(chunk_shape=[1]), "chunks of 4096 bytes or more"),
    ],
)  # fmt: skip
def test_zarr_metadata_that_is_no_caches_is_refused_before_zarr_sees_it(tmp_path, change, message):
    finish_shard(write(tmp_path, "zarr", ORDINARY))
    path = tmp_path / "shards/00000.zarr/zarr.json"
    root = json.loads(path.read_text())
    change(root["consolidated_metadata"]["metadata"]["token_ids"])
    path.write_text(json.dumps(root))
    with pytest.raises(CacheFormatError, match=message):
        read_all(tmp_path, "zarr")


@pytest.mark.parametrize("kind", ["blosc header", "place", "length", "never written", "cut"])
def test_chunks_that_lie_are_refused_before_they_are_decoded(tmp_path, kind):
    finish_shard(write(tmp_path, "zarr", ORDINARY))
    path = tmp_path / "shards/00000.zarr/token_ids/c/0"
    data = bytearray(path.read_bytes())
    if kind == "blosc header":
        data[4:8] = (0x7FFFFFFF).to_bytes(4, "little")  # 2 GiB from some hundred bytes
    elif kind == "place":
        data[-20:-12] = (1 << 63).to_bytes(8, "little")
    elif kind == "length":
        data[-12:-4] = (1 << 40).to_bytes(8, "little")
    elif kind == "never written":
        data[-20:-4] = b"\xff" * 16  # zarr would read zeros
    else:
        data = data[:10]
    path.write_bytes(data)

    def read():
        with pytest.raises(CacheFormatError, match=r"a chunk|too short"):
            read_all(tmp_path, "zarr")

    assert peak_bytes(read) < 16 << 20


def test_counts_of_a_plan_are_bounded():
    good = make_plan().to_dict()
    for change in (
        {"sample_count": 1 << 60}, {"shard_size": 0}, {"shard_size": -1}, {"batch_size": 1 << 40}, {"store": "../x"},
        {"sample_count": 1.5}, {"sample_count": True}, {"unknown": 1}, {"signals": {"logits": []}},
        {"fields": {"logits": [{"name": "x", "dtype": "u1", "axis": "row", "trailing": [1 << 40]}]}},
        {"fields": {"logits": [{"name": "x", "dtype": "O", "axis": "row", "trailing": []}]}},
        {"fields": {"logits": [{"name": "../x", "dtype": "u1", "axis": "row", "trailing": []}]}},
        {"fields": {"logits": [{"name": "labels", "dtype": "u1", "axis": "row", "trailing": []}]}},
    ):  # fmt: skip
        with pytest.raises(CacheFormatError):
            Plan.from_dict(good | change)


def test_a_shard_that_holds_more_than_its_plan_says_is_refused(cache):
    forge(sidecar_path(cache, 0), lambda body: body.update(rows=1 << 60))
    assert_refused(cache)
    (cache / "shards" / "00000.json").unlink()
    for path in (cache / "shards").glob("00000.*"):
        path.rename(cache.parent / path.name)
    build_shard(cache, make_plan(open_cache_store(cache), samples=4, shard_size=4), 0)
    forge(sidecar_path(cache, 0), lambda body: body.update(samples=1 << 40))
    assert_refused(cache)


def open_cache_store(cache):
    return json.loads((cache / "plan.json").read_text())["store"]
