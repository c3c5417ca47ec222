"""Pulling a part: what was asked for, nothing else over the wire, and never mistaken for the whole."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cache_factory import FAILED, SIGNALS, assert_equal_records, build_cache, make_plan, make_record, sample_id, tree
from click.testing import CliRunner

from vlm_distill_cache.common.cache.manifest import read_manifest
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, TransferError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.remotes.directory import DirectoryRemote
from vlm_distill_cache.common.tools import select as partial_module
from vlm_distill_cache.common.tools.derive import carry_fidelity
from vlm_distill_cache.common.tools.select import Selection, parse_selection, pull_partial
from vlm_distill_cache.common.tools.verify import verify

SAMPLES = 18  # 5 shards of 4, the last of 2
FIDELITY = {"samples": 64, "logits_kl": 0.1, "kept_mass": 0.9, "visual_map_cosine": 0.99}
LOGIT_FIELDS = {"entry_count", "token_ids", "log_gap", "top_logprob", "tail_logmass"}
BASE = {"image_hash", "labels", "tiles"}


class CountingRemote(DirectoryRemote):
    """A folder that counts what is fetched from it, and may fail from some shard on."""

    fails_from = 99

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fetched: Counter[str] = Counter()

    def download(self, name, target, *, size, on_bytes=None):
        is_shard = name.startswith("shards/") and name[12:] != ".json"
        if is_shard and int(name[7:12]) >= self.fails_from:
            raise TransferError(f"{self.location}: gone")
        self.fetched[name] += 1
        super().download(name, target, size=size, on_bytes=on_bytes)

    @property
    def shards(self) -> set[int]:
        return {int(name[7:12]) for name in self.fetched if name.startswith("shards/") and name[12:] != ".json"}


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def whole(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "cache"
    build_cache(path, make_plan(request.param, samples=SAMPLES), fidelity=FIDELITY)
    (path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# The whole\n")
    return path


@pytest.fixture
def remote(whole: Path, monkeypatch) -> CountingRemote:
    remote = CountingRemote(whole)
    monkeypatch.setattr(partial_module, "open_remote", lambda _: remote)
    return remote


def assert_holds(path: Path, positions, fields=None) -> None:
    assert verify(path, deep=True) == []
    cache = open_cache(path)
    assert list(cache.sample_ids) == [sample_id(i) for i in positions]
    for i in positions:
        expected = {k: v for k, v in make_record(i).items() if fields is None or k in fields}
        assert_equal_records(cache.read(sample_id(i), expected.keys()), expected)


def derived(path: Path) -> dict:
    return read_plan(path).extra["derived"]


@pytest.mark.slow(quick=("webdataset",))
def test_shards_come_with_their_failed_samples(remote: CountingRemote, tmp_path: Path):
    selection = parse_selection(shards="0, 2-3", samples=None, signals=None, top_k=None)
    pull_partial(remote.location, tmp_path / "part", selection)
    assert_holds(tmp_path / "part", [0, 1, 2, *range(8, 16)])
    assert remote.shards == {0, 2, 3}
    cache = open_cache(tmp_path / "part")
    assert dict(cache.failed) == {sample_id(FAILED): "image is truncated"}
    assert derived(tmp_path / "part") == {
        "kind": "part",
        "sources": [read_manifest(remote.root).hash],
        "selection": {"shards": [0, 2, 3]},
        "of_samples": SAMPLES - 1,
    }
    assert (tmp_path / "part" / "processor" / "note.json").read_text() == "{}\n"
    assert cache.manifest.fidelity == FIDELITY
    card = (tmp_path / "part" / "README.md").read_text()
    assert "> license: cc-by-4.0" in card
    assert "Not a cache as stage one built it" in card


def test_the_command_pulls_and_inspect_says_that_it_is_a_part(whole: Path, tmp_path: Path):
    def run(*words: str) -> str:
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
        return result.output

    target = str(tmp_path / "part")
    output = run("pull", str(whole), target, "--samples", "5", "--signals", "logits", "--shards", "1-3")
    assert f"Pulled 5 samples of {whole} to {target}" in output
    shown = run("inspect", target)
    assert f"only a part of cache {read_manifest(whole).hash[:12]} of {SAMPLES - 1} samples" in shown
    for words in ("shards: 1, 2, 3", "count: 5", "signals: logits"):
        assert words in shown
    assert "only a part" not in run("inspect", str(whole))


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_fewer_entries_are_the_first_ones_and_the_rest_joins_the_tail(store: str, tmp_path: Path):
    source = Path(__file__).parents[1] / "fixtures" / f"cache-v1-{store}"
    pull_partial(source, tmp_path / "part", Selection(signals=("logits",), top_k=4))
    assert verify(tmp_path / "part", deep=True) == []
    before, after = open_cache(source), open_cache(tmp_path / "part")
    assert before.plan.signals["logits"]["max_k"] == 64
    assert after.plan.signals["logits"]["max_k"] == 4
    for name in before.sample_ids:
        large = as_tensors(codec_from_dict(before.plan.signals["logits"]).decode(before.read(name)))
        small = as_tensors(codec_from_dict(after.plan.signals["logits"]).decode(after.read(name)))
        assert small.token_ids.shape[1] == min(4, large.token_ids.shape[1])
        assert torch.equal(small.token_ids[:, :3], large.token_ids[:, :3])  # the fourth may be the ground truth
        assert bool((small.tail_log_mass > large.tail_log_mass).all())
        for temperature in small.temperatures:
            log_probs, tail = small.at(temperature)
            total = log_probs.exp().sum(dim=1) + tail.exp()
            torch.testing.assert_close(total, torch.ones(len(total)), atol=5e-3, rtol=0)


def test_the_first_records_come_from_the_first_shards_alone(remote: CountingRemote, tmp_path: Path):
    selection = parse_selection(shards=None, samples="6", signals=None, top_k=None)
    pull_partial(remote.location, tmp_path / "part", selection)
    assert_holds(tmp_path / "part", [0, 1, 2, 4, 5, 6])
    assert remote.shards == {0, 1}


def test_listed_samples_come_in_the_caches_order(remote: CountingRemote, tmp_path: Path):
    (tmp_path / "ids.txt").write_text("\n".join(sample_id(i) for i in (17, 2, 16, 2, FAILED)) + "\n\n")
    selection = parse_selection(shards=None, samples=str(tmp_path / "ids.txt"), signals=None, top_k=None)
    pull_partial(remote.location, tmp_path / "part", selection)
    assert_holds(tmp_path / "part", [2, 16, 17])
    assert sample_id(FAILED) in open_cache(tmp_path / "part").failed
    assert remote.shards == {0, 4}
    assert {name for name in remote.fetched if name[12:] == ".json"} == {
        "shards/00000.json",
        "shards/00004.json",
    }
    assert derived(tmp_path / "part")["selection"]["sample_ids"]["count"] == 4


def test_of_a_zarr_shard_only_the_arrays_asked_for_come(remote: CountingRemote, tmp_path: Path):
    pull_partial(remote.location, tmp_path / "part", Selection(signals=("logits",)))
    assert_holds(tmp_path / "part", [i for i in range(SAMPLES) if i != FAILED], BASE | LOGIT_FIELDS)
    plan = read_plan(tmp_path / "part")
    assert {f.name for f in plan.all_fields} == BASE | LOGIT_FIELDS
    assert open_cache(tmp_path / "part").manifest.fidelity == {
        k: v for k, v in FIDELITY.items() if k != "visual_map_cosine"
    }
    if plan.store == "zarr":
        fetched = {name.split("/")[2] for name in remote.fetched if ".zarr/" in name}
        assert not {name for name in fetched if name.startswith("visual_")}
        assert {"log_gap", "log_gap_offsets", "zarr.json", "sample_ids"} <= fetched


def test_pulled_twice_it_is_the_same_and_broken_off_it_goes_on(remote: CountingRemote, tmp_path: Path):
    selection = Selection(shards=(1, 2, 4))
    pull_partial(remote.location, tmp_path / "once", selection)
    remote.fails_from = 2
    with pytest.raises(TransferError):
        pull_partial(remote.location, tmp_path / "again", selection)
    assert not (tmp_path / "again" / "manifest.json").exists()
    remote.fails_from, remote.fetched = 99, Counter()
    pull_partial(remote.location, tmp_path / "again", selection)
    assert remote.shards == {2, 4}  # the first was there
    assert tree(tmp_path / "again") == tree(tmp_path / "once")
    pull_partial(remote.location, tmp_path / "again", selection)
    assert tree(tmp_path / "again") == tree(tmp_path / "once")


def test_another_selection_or_a_strangers_folder_is_refused(remote: CountingRemote, tmp_path: Path):
    pull_partial(remote.location, tmp_path / "part", Selection(shards=(1,)))
    with pytest.raises(CacheMismatchError, match=r"selection[\s\S]*Name a new folder") as caught:
        pull_partial(remote.location, tmp_path / "part", Selection(shards=(1, 2)))
    assert "--overwrite" not in str(caught.value)  # which a pull does not have
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        pull_partial(remote.location, tmp_path / "home", Selection(shards=(1,)))


def test_a_part_of_a_part_remembers_both(remote: CountingRemote, tmp_path: Path, monkeypatch):
    pull_partial(remote.location, tmp_path / "part", Selection(shards=(1, 2)))
    monkeypatch.setattr(partial_module, "open_remote", lambda location: DirectoryRemote(Path(location)))
    pull_partial(tmp_path / "part", tmp_path / "less", Selection(count=3))
    assert_holds(tmp_path / "less", [4, 5, 6])
    assert derived(tmp_path / "less")["before"] == derived(tmp_path / "part")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shards": "5"}, ConfigError, "no shard 5; the cache has 5"),
        ({"shards": "3-1"}, ConfigError, "3-1"),
        ({"shards": "all"}, ConfigError, "write them as 0-3,7"),
        ({"shards": "\u00b2"}, ConfigError, "write them as 0-3,7"),  # a digit that is no number
        ({"samples": "\u00b2"}, ConfigError, "neither a number nor"),
        ({"signals": " ,"}, ConfigError, "no name in it"),
        ({"samples": "0"}, ConfigError, "from 1"),
        ({"samples": "/nowhere/ids.txt"}, ConfigError, "neither a number nor"),
        ({"signals": "hidden"}, ConfigError, "it holds logits, visual_map"),
        ({"signals": "visual_map", "top_k": 4}, ConfigError, "no logits are pulled"),
    ],
)
def test_what_the_cache_does_not_have_is_refused(
    remote: CountingRemote, tmp_path: Path, options: dict, error: type, message: str
):
    given = dict.fromkeys(("shards", "samples", "signals", "top_k")) | options
    with pytest.raises(error, match=message):
        pull_partial(remote.location, tmp_path / "part", parse_selection(**given))
    assert not (tmp_path / "part").exists()  # not even an empty folder, which `verify` would call damaged


def test_a_list_of_ids_may_come_from_any_editor(tmp_path: Path):
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfa\r\nb \r\n\r\na\r\nc\xe2\x80\xa8d")
    selection = parse_selection(shards=None, samples=str(tmp_path / "ids.txt"), signals="x,,y,", top_k=None)
    assert selection.sample_ids == ("a", "b ", "c\u2028d")
    assert selection.signals == ("x", "y")


def test_a_part_is_not_written_into_the_cache_it_comes_from(whole: Path):
    before = tree(whole)
    for target in (whole, whole / "part"):
        with pytest.raises(ConfigError, match="inside each other"):
            pull_partial(whole, target, Selection(shards=(1,)))
    assert tree(whole) == before


def test_a_disk_that_fills_up_is_named(remote: CountingRemote, tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlm_distill_cache.common.tools.derive.finish_shard", full)
    with pytest.raises(TransferError, match="part: No space left on device; make room"):
        pull_partial(remote.location, tmp_path / "part", Selection(shards=(1,)))


def test_a_size_beyond_the_disk_is_refused_before_anything_is_fetched(
    remote: CountingRemote, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(TransferError, match="more, but there are 10 free"):
        pull_partial(remote.location, tmp_path / "part", Selection(shards=(1,)))
    assert not remote.fetched


def test_a_sample_that_is_not_there_is_named(remote: CountingRemote, tmp_path: Path):
    with pytest.raises(CacheMismatchError, match=r"1 of 2 samples .* 'nobody'"):
        pull_partial(remote.location, tmp_path / "p", Selection(sample_ids=("nobody", sample_id(5))))


def test_a_damaged_file_of_the_source_never_becomes_part_of_the_new_cache(tmp_path: Path):
    build_cache(tmp_path / "far", make_plan("webdataset", samples=8))
    tar = tmp_path / "far" / "shards" / "00001.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 4
    tar.write_bytes(content)
    with pytest.raises(TransferError, match=r"00001\.tar: damaged or changed"):
        pull_partial(tmp_path / "far", tmp_path / "part", Selection(shards=(0, 1)))
    assert not (tmp_path / "part" / "shards" / "00001.json").exists()


def test_a_plan_of_another_manifest_is_refused(tmp_path: Path):
    manifest = build_cache(tmp_path / "far", make_plan(samples=8))
    build_cache(tmp_path / "other", make_plan(samples=9))
    (tmp_path / "far" / "plan.json").write_bytes((tmp_path / "other" / "plan.json").read_bytes())
    assert manifest.totals["samples"] == 7
    with pytest.raises((CacheFormatError, TransferError), match=r"plan\.json"):
        pull_partial(tmp_path / "far", tmp_path / "part", Selection(count=1))


def test_figures_of_what_changed_are_dropped():
    plan = make_plan(signals=SIGNALS)
    changed = {**SIGNALS, "logits": {"codec": "logits", "max_k": 4}}
    assert carry_fidelity(FIDELITY, plan, signals=changed) == {"samples": 64, "visual_map_cosine": 0.99}
    assert carry_fidelity({"samples": 64, "logits_kl": 0.1}, plan, signals=changed) is None
    assert carry_fidelity(FIDELITY, plan, signals=SIGNALS) == FIDELITY
    assert carry_fidelity(None, plan, signals=SIGNALS) is None


def test_shared_image_arrays_move_to_the_first_record_that_is_pulled(tmp_path: Path):
    """The holder of an image's arrays is left out; what follows it must not lose them."""
    from vlm_distill_cache.common.cache.manifest import seal
    from vlm_distill_cache.common.cache.plan import write_plan
    from vlm_distill_cache.common.cache.shared_images import ImageSharer, SharedImages, with_visual_source
    from vlm_distill_cache.common.cache.stores import finish_shard, open_writer

    plan = make_plan(samples=6, shard_size=6)
    plan = make_plan(samples=6, shard_size=6, fields=with_visual_source(plan.fields))
    write_plan(tmp_path / "far", plan)
    writer = open_writer(plan.store, tmp_path / "far", 0, plan.all_fields)
    images, shared = SharedImages(plan.all_fields), {}
    sharer = ImageSharer(images)
    names = ("image_hash", "tiles", "visual_columns", "visual_map")
    for position in range(6):
        shared = shared or {name: make_record(5)[name] for name in names}
        record = make_record(position + 20) | shared
        writer.append(sample_id(position), sharer.share(record, "one image"))
    finish_shard(writer)
    seal(tmp_path / "far")
    (tmp_path / "ids.txt").write_text(f"{sample_id(2)}\n{sample_id(5)}\n")
    selection = parse_selection(shards=None, samples=str(tmp_path / "ids.txt"), signals="visual_map", top_k=None)
    pull_partial(tmp_path / "far", tmp_path / "part", selection)
    assert verify(tmp_path / "part", deep=True) == []
    cache = open_cache(tmp_path / "part")
    for position in (2, 5):
        found = cache.read(sample_id(position), names)
        for name in names:
            assert np.array_equal(found[name], shared[name]), name
    assert len(cache.read_stored(sample_id(5))["visual_map"]) == 0  # held once
