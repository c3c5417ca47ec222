"""Format version 2 in the verbs of cachectl: copied, merged, cut and converted without a changed value; damage is found."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from cache_factory import FIELDS, SIGNALS, assert_equal_records, make_plan, tree
from several_factory import ANSWER, COLUMNS, MAPS, SHOWN, TEXT, build_several, several_plan, several_record

from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import write_plan
from vlm_distill_cache.common.cache.shared_images import VISUAL_SOURCE
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.remotes.push import push
from vlm_distill_cache.common.tools.convert import convert
from vlm_distill_cache.common.tools.merge import merge
from vlm_distill_cache.common.tools.repair import repair
from vlm_distill_cache.common.tools.select import Selection, pull_partial
from vlm_distill_cache.common.tools.verify import verify


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache of all samples, in two shards."""
    folder = tmp_path_factory.mktemp("several") / "cache"
    build_several(folder, several_plan("webdataset", shard_size=4))
    return folder


@pytest.fixture(scope="module")
def zarr(built, tmp_path_factory):
    """The same in the other store."""
    folder = tmp_path_factory.mktemp("several") / "zarr"
    convert(built, folder, "zarr")
    return folder


def assert_holds(folder, names):
    cache = open_cache(folder)
    assert list(cache.sample_ids) == list(names)
    for name in names:
        expected = several_record(name)
        found = cache.read(name, expected.keys())
        assert_equal_records(found, expected)
    assert verify(folder, deep=True) == []
    return cache


def test_the_other_store_and_back_is_byte_identical_and_keeps_the_version(built, zarr, tmp_path):
    assert assert_holds(zarr, SHOWN).plan.format_version == 2
    assert convert(zarr, tmp_path / "back", "webdataset").format_version == 2
    assert tree(tmp_path / "back") == tree(built)


def test_what_was_stopped_goes_on_to_the_same_bytes(zarr, tmp_path):
    class StopError(Exception):
        pass

    def stop():
        raise StopError

    store = "webdataset"
    build_several(tmp_path / "more", several_plan(store, data={"name": "more"}), ("one",))
    verbs = {
        "convert": lambda to, **how: convert(zarr, to, store, **how),
        "merge": lambda to, **how: merge([zarr, tmp_path / "more"], to, store=store, **how),
    }
    for name, verb in verbs.items():
        verb(tmp_path / f"{name} whole")
        with pytest.raises(StopError):
            verb(tmp_path / f"{name} again", on_shard=stop)
        verb(tmp_path / f"{name} again")
        assert tree(tmp_path / f"{name} again") == tree(tmp_path / f"{name} whole")


def test_a_part_has_the_pictures_that_another_record_held(built, tmp_path):
    pull_partial(str(built), tmp_path / "part", Selection(sample_ids=("two again", "both")), jobs=1)
    assert_holds(tmp_path / "part", ["two again", "both"])


def test_of_chosen_signals_only_those_arrays_are_read_and_what_all_records_have(zarr, tmp_path):
    chosen = Selection(signals=("answer_attention", "logits"), top_k=2)
    assert pull_partial(str(zarr), tmp_path / "few", chosen, jobs=1).format_version == 2
    assert verify(tmp_path / "few", deep=True) == []
    found, expected = open_cache(tmp_path / "few").read("clip"), several_record("clip")
    assert max(found["entry_count"]) == 2
    for name in ("answer_frames", "frame_times", "tile_pictures", "image_hash"):
        assert found[name].tobytes() == expected[name].tobytes()


def test_pushed_and_pulled_it_is_the_same_cache(built, tmp_path):
    push(built, str(tmp_path / "there"), jobs=1)
    pull(str(tmp_path / "there"), tmp_path / "back", jobs=1)
    assert tree(tmp_path / "back") == tree(built)
    assert verify(tmp_path / "back", deep=True) == []


def of_one_picture(folder, names, store="webdataset", **changes):
    """A cache of version 1, of samples with a picture at most."""
    codecs = [
        RowAttentionCodec(grid=ANSWER.grid, groups=ANSWER.groups),
        TextAttentionCodec(grid=TEXT.grid, groups=TEXT.groups),
        COLUMNS,
        MAPS,
    ]
    signals = {"logits": SIGNALS["logits"]} | {codec.signal: codec.to_dict() for codec in codecs}
    fields = {"logits": FIELDS["logits"]} | {codec.signal: codec.fields() for codec in codecs}
    plan = make_plan(
        store, samples=len(names), shard_size=4, signals=signals, fields=fields, **({"data": {"name": "one"}} | changes)
    )
    write_plan(folder, plan)
    for index in range(plan.shard_count):
        writer = open_writer(store, folder, index, plan.all_fields)
        for name in names[plan.shard_range(index).start : plan.shard_range(index).stop]:
            record = several_record(name)
            if not len(record["tiles"]):  # rows look at nothing, which version 1 keeps as zeros
                record["image_hash"] = np.zeros((1, 16), np.uint8)
                rows = len(record["labels"])
                for codec in codecs[:1]:
                    record |= {f.name: np.zeros((rows, *f.trailing), f.numpy_dtype) for f in codec.fields()}
            writer.append(name, {field.name: record[field.name] for field in plan.all_fields})
        finish_shard(writer)
        writer.abort()
    seal(folder)
    assert verify(folder, deep=True) == []
    return folder


@pytest.mark.parametrize("first", ["old", "new"])
def test_version_1_merges_with_2_and_becomes_it(first, tmp_path):
    store = "webdataset"
    old = of_one_picture(tmp_path / "old", ["one", "text"], store)
    new = tmp_path / "new"
    build_several(new, several_plan(store, shard_size=4), ("two", "clip", "one"))
    sources = [old, new] if first == "old" else [new, old]
    merged = merge(sources, tmp_path / "both")
    assert merged.repeated == 1
    names = ["one", "text", "two", "clip"] if first == "old" else ["two", "clip", "one", "text"]
    cache = assert_holds(tmp_path / "both", names)
    assert cache.plan.format_version == cache.manifest.format_version == 2
    assert cache.plan.signals["answer_attention"]["frame_grid"] == [1, 2]
    assert cache.plan.extra["frames"] == {"fps": 2.0, "most": 4}


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_cache_without_videos_does_not_say_of_them_is_no_difference(tmp_path, version):
    """Its plan has no frames, and of a family that reads videos of its own neither geometry nor token of them."""
    plan = several_plan("webdataset", shard_size=4)
    prints = plan.fingerprints | {"geometry": fingerprint(plan.geometry)}
    geometry = plan.geometry | {"video": {"kind": "own"}}
    with_videos = replace(
        plan,
        geometry=geometry,
        teacher=plan.teacher | {"video_token_id": 7},
        fingerprints=prints | {"geometry": fingerprint(geometry)},
    )
    build_several(tmp_path / "clips", with_videos, ("clip", "two"))
    if version == 1:
        of_one_picture(tmp_path / "stills", ["one", "text"], fingerprints=prints)
    else:
        stills = replace(plan, fingerprints=prints, extra={k: v for k, v in plan.extra.items() if k != "frames"})
        build_several(tmp_path / "stills", stills, ("two", "one"))
    for sources in (["stills", "clips"], ["clips", "stills"]):
        to = tmp_path / "-".join(sources)
        merge([tmp_path / source for source in sources], to)
        plan = assert_holds(to, [*dict.fromkeys(n for s in sources for n in open_cache(tmp_path / s).sample_ids)]).plan
        assert (plan.geometry, plan.teacher) == (geometry, with_videos.teacher)
        assert plan.extra["frames"] == with_videos.extra["frames"]
        assert plan.fingerprints["geometry"] == fingerprint(geometry)
        assert verify(to, deep=True) == []


def test_versions_do_not_hide_another_difference(tmp_path):
    old = of_one_picture(tmp_path / "old", ["one"], fingerprints={"teacher": "c" * 32})
    build_several(tmp_path / "new", several_plan("webdataset"), ("two",))
    with pytest.raises(CacheMismatchError, match=r"fingerprints\.teacher") as caught:
        merge([old, tmp_path / "new"], tmp_path / "both")
    assert "format_version" not in str(caught.value)
    assert "several" not in str(caught.value)


def test_a_sample_that_two_versions_tell_differently_is_refused(tmp_path):
    old = of_one_picture(tmp_path / "old", ["one"])

    def other(name, record):
        record["answer_image_mass"][0] = 0.25

    build_several(tmp_path / "new", several_plan("webdataset"), ("one",), change=other)
    with pytest.raises(CacheMismatchError, match="other bytes in answer_image_mass"):
        merge([old, tmp_path / "new"], tmp_path / "both")


def set_to(field, place, value):
    def change(record):
        record[field] = record[field].copy()
        record[field][place] = value

    return change


def cut(*fields):
    """Leave the last entry out of some arrays."""

    def change(record):
        record.update({field: record[field][:-1] for field in fields})

    return change


def empty(*fields):
    def change(record):
        record.update({field: record[field][:0] for field in fields})

    return change


def follow(position):
    """Leave the signals of the pictures to another record."""
    arrays = empty(*(field.name for codec in (COLUMNS, MAPS) for field in codec.fields()))

    def change(record):
        arrays(record)
        record[VISUAL_SOURCE.name] = np.array([position], np.uint32)

    return change


DAMAGES = {
    "a tile of a picture beyond": ("two", set_to("tile_pictures", (1, 0), 7), "tile_pictures"),
    "two stills in one tile": ("two", set_to("tile_pictures", (0, 1), 2), "tile_pictures"),
    "a tile without its pictures": ("two", cut("tile_pictures"), "tile_pictures"),
    "a picture more than tiles": (
        "clip", lambda r: r.update(image_hash=np.concatenate([r["image_hash"]] * 2)), "frame_times"
    ),
    "a frame at no second": ("clip", set_to("frame_times", (1, 1), np.nan), "frame_times"),
    "a frame at infinity": ("clip", set_to("frame_times", (3, 1), np.inf), "frame_times"),
    "a video that is none of the sample's": ("both", set_to("frame_times", ([1, 2], 0), 7), "frame_times"),
    "a tile of no picture": ("two", set_to("tile_pictures", (0, 1), 0), "tile_pictures"),
    "a frame before the video": ("clip", set_to("frame_times", (0, 1), -1.0), "frame_times"),
    "frames that fall": ("clip", set_to("frame_times", (3, 1), 0.25), "frame_times"),
    "a still in a pair of frames": ("clip", set_to("frame_times", (1,), (-1, np.nan)), "tile_pictures"),
    "a frame less": ("clip", cut("frame_times"), "frame_times"),
    "half a video": ("both", set_to("frame_times", (1, 0), 0.5), "frame_times|tile_pictures"),
    "a picture of zeros": ("two", set_to("image_hash", (1,), 0), "image_hash"),
    "a row that looks at one of two pictures": ("two", cut("answer_attention", "answer_image_mass"), "answer attention"),
    "rows that look at nothing": ("two", empty("answer_attention", "answer_image_mass"), "answer attention"),
    "a row without its last frame": ("clip", cut("answer_frames", "answer_frames_mass"), "answer attention"),
    "a text row without a picture": ("both", cut("text_attention", "text_image_mass"), "text attention"),
    "more than all attention": ("clip", set_to("answer_frames_mass", (0,), 0.9), "answer attention"),
    "columns of one picture": ("two", cut("visual_columns"), "visual_columns"),
    "a map less": ("two", cut("map_scale", "map_largest"), "map_"),
    "pairs of one map": ("two", cut("visual_map"), "visual_map|visual map"),
    "another set of pictures as holder": ("both", follow(2), "a record of another image"),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(DAMAGES))
def test_damage_with_checksums_that_fit_is_found(what, tmp_path):
    name, change, told = DAMAGES[what]
    folder = tmp_path / "cache"
    build_several(folder, several_plan("webdataset"), change=lambda of, record: change(record) if of == name else None)
    [damage] = verify(folder, deep=True)
    assert damage.kind == "shard"
    assert f"sample {name!r}: " in damage.reason
    assert any(words in damage.reason for words in told.split("|")), damage.reason
    cache = open_cache(folder)
    for codec in (ANSWER, TEXT, COLUMNS, MAPS):  # whoever reads it unverified gets numbers, or an error of ours
        try:
            codec.decode(cache.read(name))
        except CacheFormatError:
            continue


def test_repair_drops_what_is_damaged_and_keeps_the_other_shards(tmp_path):
    folder, change = tmp_path / "cache", set_to("frame_times", (1, 1), np.nan)
    build_several(
        folder,
        several_plan("webdataset", shard_size=4),
        change=lambda name, record: change(record) if name == "clip" else None,
    )
    removed = {step.path for step in repair(folder, deep=True) if step.action == "remove"}
    assert removed == {"shards/00000.json", "manifest.json"}
    assert {damage.kind for damage in verify(folder, deep=True)} == {"missing", "unsealed"}


def test_a_version_that_was_changed_is_damage_with_and_without_a_checksum_that_fits(tmp_path):
    build_several(tmp_path / "2", several_plan("webdataset"), ("clip",))
    of_one_picture(tmp_path / "1", ["one"])
    for version in (1, 2):
        for name in ("plan.json", "shards/00000.json", "manifest.json"):
            folder = tmp_path / "changed"
            shutil.copytree(tmp_path / str(version), folder)
            path = folder / name
            data = path.read_bytes()
            said, other = (f'"format_version": {number}'.encode() for number in (version, 3 - version))
            if said not in data:
                said, other = said.replace(b" ", b""), other.replace(b" ", b"")
            path.write_bytes(data.replace(said, other))
            assert name in {damage.path for damage in verify(folder)}
            with pytest.raises((CacheFormatError, CacheMismatchError)):
                read_all(folder)
            body = read_document_of(data, folder)
            path.write_bytes(document_bytes(body | {"format_version": 3 - version}))
            assert {damage.path for damage in verify(folder, deep=True)}, (version, name)
            shutil.rmtree(folder)


def read_document_of(data, folder):
    (folder / "as it was.json").write_bytes(data)
    body = read_document(folder / "as it was.json")
    (folder / "as it was.json").unlink()
    return body


def read_all(folder):
    cache = open_cache(folder)
    return [cache.read(name) for name in cache.sample_ids]
