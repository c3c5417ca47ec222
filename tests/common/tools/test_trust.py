"""No value that a teacher cannot have reaches whoever trains: looked through once, noted where the cache's author cannot write."""

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from cache_factory import build_cache, make_plan, make_record, sample_id
from click.testing import CliRunner
from test_codec_interface import LABELS, TILES, sound
from test_mirror import CountingRemote

import vlm_distill_cache.common.remotes.mirror as mirror_module
from vlm_distill_cache.common.attention.tiles import NOWHERE
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import Plan, read_plan, write_plan
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.codecs.checks import value_damage
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec
from vlm_distill_cache.common.codecs.registry import CODECS
from vlm_distill_cache.common.errors import CacheFormatError, NewerFormatError, SampleNotCachedError
from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.tools import trust
from vlm_distill_cache.common.tools.trust import open_trusted

HOSTILE = 1  # the shard with values that no teacher can have


@pytest.fixture
def looked_at(tmp_path, monkeypatch):
    """Shards that were looked through, in order; notes begin empty."""
    shards: list[int] = []

    def counting(cache_dir, index, *args, **options):
        shards.append(index)
        return real(cache_dir, index, *args, **options)

    real = trust.verify_shard
    monkeypatch.setattr(trust, "verify_shard", counting)
    monkeypatch.setattr(trust, "_noted", set())
    monkeypatch.setenv("VLM_DISTILL_VERIFIED_DIR", str(tmp_path / "notes"))
    return shards


@pytest.fixture(params=["zarr", "webdataset"])
def hostile(request, tmp_path):
    """A cache signed consistently; the first record of one shard has a log-probability of 1."""
    plan = make_plan(request.param)
    write_plan(tmp_path / "hostile", plan)
    for shard in range(plan.shard_count):
        writer = open_writer(plan.store, tmp_path / "hostile", shard, plan.all_fields)
        for position in plan.shard_range(shard):
            record = make_record(position)
            if position == plan.shard_range(HOSTILE).start:
                record["top_logprob"][0] = 1
            writer.append(sample_id(position), record)
        finish_shard(writer)
    seal(tmp_path / "hostile")
    return tmp_path / "hostile"


def test_a_cache_is_looked_through_once_wherever_it_lies(tmp_path, looked_at, monkeypatch):
    build_cache(tmp_path / "a", make_plan())
    open_trusted(tmp_path / "a", verify=False)
    assert looked_at == []
    open_trusted(tmp_path / "a")
    assert looked_at == [0, 1, 2]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(trust, "_noted", set())  # as another process
    open_trusted(tmp_path / "b")
    assert looked_at == [0, 1, 2]
    # Records may be the same and a plan another, which says less of what they may hold.
    other = replace(read_plan(tmp_path / "a"), teacher={"name": "tiny", "vocabulary": 99})
    build_cache(tmp_path / "c", other)
    with pytest.raises(CacheFormatError, match="the vocabulary has 99"):
        open_trusted(tmp_path / "c")


def test_where_nothing_can_be_noted_it_is_said_and_done_again(tmp_path, looked_at, monkeypatch, caplog):
    build_cache(tmp_path / "a", make_plan())
    (tmp_path / "notes").write_text("a file in the folder's place")
    for _ in range(2):
        monkeypatch.setattr(trust, "_noted", set())
        open_trusted(tmp_path / "a")
    assert looked_at == [0, 1, 2] * 2
    assert "set VLM_DISTILL_VERIFIED_DIR to a folder that you may write" in caplog.text


def test_of_many_at_once_each_shard_is_looked_through_by_one(tmp_path, looked_at):
    build_cache(tmp_path / "a", make_plan(samples=20))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: open_trusted(tmp_path / "a"), range(8)))
    assert sorted(looked_at) == [0, 1, 2, 3, 4]
    assert len([*(tmp_path / "notes").iterdir()]) == 1  # no locks are left


def test_impossible_values_are_refused_each_time_and_notes_in_the_cache_are_not_believed(
    hostile, looked_at, monkeypatch
):
    monkeypatch.delenv("VLM_DISTILL_VERIFIED_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(hostile.parent / "home"))
    for _ in range(2):
        with pytest.raises(CacheFormatError, match=r"sample 'set/é.4': top_logprob is .* at most 0.*verify --deep"):
            open_trusted(hostile)
        assert [path.parent.parent for path in (hostile.parent / "home").rglob("verified/*")] == [
            hostile.parent / "home" / "vlm-distill-cache"
        ]
        shutil.copytree(hostile.parent / "home", hostile, dirs_exist_ok=True)
    assert looked_at == [0, HOSTILE, HOSTILE]
    # Whoever looks at nothing is stopped by the decoder, before a step.
    opened = open_trusted(hostile, verify=False)
    with pytest.raises(CacheFormatError, match="no teacher says so"):
        opened.decode("logits", opened.read(sample_id(4)))
    opened.decode("logits", opened.read(sample_id(5)))


def test_shards_of_an_address_are_looked_through_as_they_arrive(hostile, looked_at, monkeypatch):
    remote = CountingRemote(hostile)
    remote.fetched = Counter()
    monkeypatch.setattr(mirror_module, "open_remote", lambda _: remote)
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(hostile.parent / "near"))
    mirror_module._pinned.clear()
    cache = open_trusted("https://example.org/a cache")
    assert (looked_at, remote.shards) == ([], set())
    cache.read(sample_id(9))
    cache.read(sample_id(0))
    for wrong, words in (
        (sample_id(5), "top_logprob"),
        ("nobody", "no sample 'nobody'"),
    ):  # and no folder of this machine
        with pytest.raises(CacheFormatError if wrong == sample_id(5) else SampleNotCachedError) as caught:
            cache.read(wrong)
        assert str(caught.value).startswith("https://example.org/a cache: ")
        assert words in str(caught.value)
        assert str(hostile.parent) not in str(caught.value)
    mirror_module._pinned.clear()
    open_trusted("https://example.org/a cache").read(sample_id(9))
    assert looked_at == [2, 0, HOSTILE]


def test_pull_looks_through_what_it_brought_unless_told_not_to(hostile, looked_at, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(main, ["pull", str(hostile), *map(str, arguments)])

    refused = run(tmp_path / "a")
    assert (refused.exit_code, "top_logprob" in refused.output) == (1, True)
    assert run(tmp_path / "a", "--no-verify").exit_code == 0
    assert run(tmp_path / "b", "--samples", 4).exit_code == 0  # those of the first shard
    assert run(tmp_path / "c", "--samples", 5).exit_code == 1
    with pytest.raises(CacheFormatError, match="top_logprob"):
        open_trusted(tmp_path / "a")
    pull(hostile, tmp_path / "d")  # bytes alone, as a program asks for


def test_signals_that_cannot_be_judged_are_not_trusted(tmp_path, looked_at):
    build_cache(tmp_path / "a", make_plan(signals={**make_plan().signals, "logits": {"codec": "quantum"}}))
    with pytest.raises(NewerFormatError, match=r"signals.logits: codec 'quantum' is not known; update this software"):
        open_trusted(tmp_path / "a")
    assert looked_at == []


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_no_number_of_any_codec_can_be_one_that_no_teacher_has(name, exact):
    codec, encoded = sound(CODECS[name], exact=exact)
    record = encoded | {
        "image_hash": np.ones((1, 16), np.uint8),
        "labels": LABELS.numpy().astype("<u4"),
        "tiles": TILES,
    }
    plan = Plan(store="zarr", sample_count=1, shard_size=1, fingerprints={}, signals={"it": codec.to_dict()},
                fields={"it": codec.fields()}, teacher={"vocabulary": 300}, extra={"max_length": 64})  # fmt: skip
    assert list(value_damage(record, plan)) == []
    rng = np.random.default_rng(5)
    states, tails = isinstance(codec, HiddenCodec), ("tail_logmass", "visual_tail_logmass")
    for field in codec.fields():
        array = record[field.name]
        values = {
            "u4": (300, 1 << 31, array.flat[1]),  # the last: the same id twice in a row
            "f2": (np.nan, np.inf, *(() if states else (2.0, -np.inf))),
            "f4": (np.nan, np.inf, -1e30, 1e30, *(() if states else (2.0,))),
        }.get(field.dtype, ())
        for value in values:
            if field.name in tails and value < -1:
                continue  # so little mass may be left at another temperature
            changed = array.copy()
            changed.flat[0 if field.dtype == "u4" else rng.integers(array.size)] = value
            with np.errstate(all="ignore"):
                assert next(value_damage(record | {field.name: changed}, plan), None), (field.name, value)


@pytest.mark.parametrize(
    "tiles",
    [
        [1e30, 1, 0, 0, 1, 1], [65_536, 65_536, 0, 0, 1, 1], [300, 300, 0, 0, 1, 1], [np.nan, 4, 0, 0, 1, 1], [-3, -4, 0, 0, 1, 1],
        [0, 12, 0, 0, 1, 1], [3.5, 4, 0, 0, 1, 1], [3, np.inf, 0, 0, 1, 1], [3, 4, 0, 0, 0, 1], [3, 4, 1, 1, 0, 0],
        [3, 4, np.nan, 0, 1, 1], [3, 4, 0, 0, 1e30, 1], [3, 4, -np.inf, 0, 1, 1], [7, 10, 0, 0, 1, 1],
    ],
)  # fmt: skip
def test_tiles_of_no_picture_are_damage_whatever_signals_there_are(tiles):
    codec, encoded = sound(CODECS["logits"])
    record = encoded | {"image_hash": np.ones((1, 16), np.uint8), "labels": LABELS.numpy().astype("<u4"),
                        "tiles": np.array([tiles], np.float32)}  # fmt: skip
    plan = Plan(store="zarr", sample_count=1, shard_size=1, fingerprints={}, signals={"it": codec.to_dict()},
                fields={"it": codec.fields()}, extra={"max_length": 64})  # fmt: skip
    assert any("tiles" in line for line in value_damage(record, plan))


def test_tokens_that_nobody_placed_are_possible_only_where_nothing_looks_at_them():
    nowhere = {"image_hash": np.ones((1, 16), np.uint8), "labels": LABELS.numpy().astype("<u4"),
               "tiles": np.array([[1, 36, *NOWHERE]], np.float32)}  # fmt: skip
    for name, codec_type in CODECS.items():
        codec, encoded = sound(codec_type)
        plan = Plan(store="zarr", sample_count=1, shard_size=1, fingerprints={}, signals={"it": codec.to_dict()},
                    fields={"it": codec.fields()}, extra={"max_length": 64})  # fmt: skip
        found = [line for line in value_damage(encoded | nowhere, plan) if "nowhere" in line]
        assert bool(found) == codec_type.of_image, name
