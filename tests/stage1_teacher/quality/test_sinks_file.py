"""``sinks.json``: what it says is in the records, for every kind of layout; it is no part of what a cache is."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from hostile_documents import hostile_documents, sign

from vlm_distill_cache.common.attention.sinks import SinkMap, sink_scores
from vlm_distill_cache.common.attention.tiles import (
    Tile,
    box_array,
    carries_image,
    grid_tile,
    tiles_from_array,
    tiles_of,
    tiles_to_array,
)
from vlm_distill_cache.common.cache.manifest import read_manifest, seal
from vlm_distill_cache.common.cache.side_files import CARD, SINKS
from vlm_distill_cache.common.cli import main as cachectl
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, DistillError
from vlm_distill_cache.common.files.signed import document_bytes
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.remotes.push import push
from vlm_distill_cache.common.tools.convert import convert
from vlm_distill_cache.common.tools.merge import merge
from vlm_distill_cache.common.tools.select import Selection, pull_partial
from vlm_distill_cache.common.tools.sinks import Sinks, _find, _received, _together, read_sinks, sink_map, write_sinks
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.stage1_teacher.cli import main as teacher_cache

PLACES = {
    "llava": "token", "mobilevlm_v2": "token", "compodistill": "token", "gemma3": "token", "smolvlm": "tile",
    "internvl": "tile", "qwen2_5_vl": "cell", "llava_onevision": "cell",
}  # fmt: skip


def run(*arguments, main=cachectl, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def read_again(path):
    """The sinks of a copy of a cache that was sealed before there was such a file."""
    (path / SINKS).unlink()
    seal(path, rewritten=True)
    return read_sinks(open_cache(path))


def slow(cache, signal: str) -> tuple[np.ndarray, np.ndarray]:
    """What each token of each picture receives, and whether it carries image, ``[P, N]``, record by record."""
    received, present, seen = [], [], []
    for sample in cache:
        record = cache.read(sample)
        if len(record["tiles"]) and record["image_hash"].tolist() not in seen:
            seen.append(record["image_hash"].tolist())
            values = np.asarray(record[signal], np.float64)
            received.append(values if values.ndim == 1 else [row.sum() / len(row) for row in values])
            present.append(carries_image(box_array(tiles_from_array(record["tiles"]))))
    return np.array(received), np.array(present)


@pytest.mark.parametrize(("name", "places"), PLACES.items())
@pytest.mark.slow(quick=1)
def test_a_build_writes_the_sinks_of_every_kind_of_layout_beside_its_shards(family_cache, tmp_path, name, places):
    cache = family_cache(name)
    found = read_sinks(cache)
    assert SINKS in cache.manifest.files
    assert list(found.maps) == ["tower", "language_model", "visual_rows"]
    assert found.signals["language_model"] == "answer_attention"
    assert [found.maps[part].places for part in found.maps] == [places, "cell", places]
    assert (cache.path / CARD).read_text().count("a sink in |") == 3
    if places == "token":
        for part, signal in (("tower", "tower_attention"), ("visual_rows", "visual_columns")):
            received, present = slow(cache, signal)
            expected = sink_scores(received, present=present)
            np.testing.assert_allclose(found.maps[part].scores, expected, atol=1e-5)
            np.testing.assert_allclose(found.maps[part].shares.sum(), 1)
            assert found.maps[part].pictures == len(received) == 8
    # A cache from before has none, is the same cache, and its records say the same.
    shutil.copytree(cache.path, tmp_path / "old")
    again = read_again(tmp_path / "old")
    assert SINKS not in read_manifest(tmp_path / "old").files
    assert read_manifest(tmp_path / "old").hash == cache.manifest_hash
    for part, sinks in found.maps.items():
        np.testing.assert_allclose(again.maps[part].scores, sinks.scores, atol=1e-5)
        assert again.maps[part].often.tolist() == sinks.often.tolist()
        # Any student's layout gets a score for each of its tokens.
        tiles = (Tile(2, 2, (0.0, 0.0, 0.5, 1.0)), grid_tile(3, 3))
        scores = sink_map(cache, part, tiles)
        assert len(scores) == 13
        assert 0 <= min(scores) <= max(scores) <= 1


def test_maps_say_what_their_column_means_say(family_cache):
    cache = family_cache("llava")
    maps, columns = cache.codec("visual_map"), cache.codec("visual_columns")
    for sample in list(cache)[:3]:
        record = cache.read(sample)
        tiles = tiles_of(record)
        if not tiles:
            continue  # without a picture
        [(_, of_map)], [(_, of_columns)] = (_received(codec, record, tiles) for codec in (maps, columns))
        np.testing.assert_allclose(of_map, of_columns, rtol=2e-2, atol=2e-4)


def test_maps_that_were_pooled_over_the_picture_where_it_has_several_tiles_are_of_its_cells():
    codec = VisualMapCodec(groups=1, preset="f4", grid=2)
    frame = Tile(
        4, 4, (0.0, -0.5, 1.0, 1.5)
    )  # half of it is padding: each of its two rows of cells sees half of the picture
    layouts = ((frame,), (grid_tile(2, 2), grid_tile(4, 4)))
    maps = np.random.default_rng(0).random((2, 1, 4, 4)) / 8
    records = []
    for number, (tiles, values) in enumerate(zip(layouts, maps, strict=True)):
        record = {"tiles": tiles_to_array(tiles), "image_hash": np.full((1, 16), number, np.uint8)}
        records.append((str(number), record | codec.encode(values, tiles=tiles)))

    def found(shown):
        signals, fields = {codec.signal: codec.to_dict()}, {codec.signal: codec.fields()}
        plan = SimpleNamespace(signals=signals, fields=fields, format_version=1)
        return _find(plan, lambda names, most: shown).maps["visual_rows"]

    assert found(records[:1]).places == "token"
    both = found(records)
    assert both.places == "cell"
    assert both.tiles == (grid_tile(2, 2),)
    first, second = (found([record]).received for record in records)
    np.testing.assert_allclose(both.received, (first + second) / 2)


@pytest.mark.slow
def test_it_is_the_same_after_sealing_again_repair_and_conversion_and_own_for_what_is_derived(family_cache, tmp_path):
    source = family_cache("llava").path
    known = (source / SINKS).read_bytes()
    shutil.copytree(source, tmp_path / "cache")
    (tmp_path / "cache" / SINKS).unlink()
    run("seal", tmp_path / "cache", main=teacher_cache)
    assert (tmp_path / "cache" / SINKS).read_bytes() == known
    (tmp_path / "cache" / SINKS).write_bytes(known[:-9] + b"0" + known[-8:])
    assert any(damage.path == SINKS for damage in verify(tmp_path / "cache"))
    with pytest.raises(CacheFormatError, match=r"sinks.json: damaged"):
        read_sinks(open_cache(tmp_path / "cache"))
    run("repair", tmp_path / "cache")
    run("seal", tmp_path / "cache", main=teacher_cache)
    assert (tmp_path / "cache" / SINKS).read_bytes() == known
    assert verify(tmp_path / "cache", deep=True) == []
    said = "has other sinks of the vision tower than the records"
    for change, reason in (
        (lambda tower, whole: tower["scores"].reverse(), said),
        (lambda tower, whole: tower["received"].reverse(), said),
        (lambda tower, whole: tower["often"].__setitem__(0, 8 - tower["often"][0]), said),
        (lambda tower, whole: tower["tiles"][0].__setitem__(2, 0.5), said),
        (lambda tower, whole: tower["tiles"][0].__setitem__(slice(2), (1, 9)), said),
        (lambda tower, whole: whole.update(gamma=3.0), "has scores of gamma 3; this version finds those of gamma 1.1"),
    ):
        changed = json.loads(known)
        change(changed["maps"]["tower"], changed)
        (tmp_path / "cache" / SINKS).write_bytes(document_bytes({k: v for k, v in changed.items() if k != "checksum"}))
        sign(tmp_path / "cache", SINKS)  # an author who knows this code
        assert verify(tmp_path / "cache") == []
        assert [(one.path, one.reason) for one in verify(tmp_path / "cache", deep=True)] == [(SINKS, reason)]
    changed = json.loads(known)
    tower = changed["maps"]["tower"]
    tower |= {name: tower[name] * 2 for name in ("tiles", "received", "often", "scores")} | {"places": "tile"}
    with pytest.raises(CacheFormatError, match=r"maps.tower has 2 tiles; expected one"):
        Sinks.from_dict({k: v for k, v in changed.items() if k != "checksum"}, "it")
    convert(source, tmp_path / "tar", "webdataset")
    assert (tmp_path / "tar" / SINKS).read_bytes() == known
    halves = []
    ids = list(family_cache("llava"))
    for number, wanted in enumerate((ids[:5], ids[5:])):
        halves.append(tmp_path / f"half-{number}")
        pull_partial(str(source), halves[-1], Selection(sample_ids=tuple(wanted)))
        assert (halves[-1] / SINKS).read_bytes() != known
        assert verify(halves[-1], deep=True) == []
    merge(halves, tmp_path / "merged")
    assert (tmp_path / "merged" / SINKS).read_bytes() == known  # all the same records, in one order
    assert "## Sinks" in (tmp_path / "merged" / CARD).read_text()


def test_a_copy_elsewhere_gets_what_was_found_since(family_cache, tmp_path):
    source = family_cache("llava").path
    shutil.copytree(source, tmp_path / "cache")
    before = read_again(tmp_path / "cache")
    push(tmp_path / "cache", str(tmp_path / "place"))
    pull(str(tmp_path / "place"), tmp_path / "near")
    assert not (tmp_path / "near" / SINKS).exists()
    run("seal", tmp_path / "cache", main=teacher_cache)
    push(tmp_path / "cache", str(tmp_path / "place"))
    pull(str(tmp_path / "place"), tmp_path / "near")
    for folder in ("place", "near"):
        assert (tmp_path / folder / SINKS).read_bytes() == (source / SINKS).read_bytes()
        assert verify(tmp_path / folder) == []
    assert list(read_sinks(open_cache(tmp_path / "near")).maps) == list(before.maps)


def test_inspect_prints_draws_and_gives_them_to_programs(family_cache, tmp_path):
    cache = family_cache("smolvlm")
    said = run("inspect", cache.path, "--sinks", "--picture", tmp_path / "map.png")
    tiles = sum(len(cache.read(sample)["tiles"]) for sample in cache if sample != "again")  # its picture is another's
    assert f"vision tower: tower_attention of {tiles} pictures; layouts differ in tiles: a place is a visual" in said
    assert "answer_attention of 9 samples with a picture" in said
    assert f"Drew {tmp_path / 'map.png'}" in said
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "result.png" in run("inspect", cache.path, "--sinks", "--picture", tmp_path, code=2)  # a folder
    figures = json.loads(CliRunner().invoke(cachectl, ["inspect", str(cache.path), "--sinks", "--json"]).stdout)
    tower = figures["maps"]["tower"]
    assert tower["top"][0]["score"] == 1.0
    assert tower["top"][0]["share"] == pytest.approx(max(tower["shares"]), rel=1e-4)
    assert sum(tower["shares"]) == pytest.approx(1, abs=1e-4)
    # Tiles of other shapes, the first place lacking, are drawn as one.
    said = CliRunner().invoke(cachectl, ["inspect", str(family_cache("compodistill").path), "--sinks"]).output
    assert "a place is a visual token of 1 x 2 and 2 x 3, which all pictures have" in said
    drawn = said.splitlines()[[line.strip() for line in said.splitlines()].index("tower     100%") :][1:4]
    assert [len(line.rstrip()) for line in drawn[1:]] == [8, 8]
    for others in (("s0",), ("--failed",), ("--shift",), ("s0", "--image", tmp_path / "map.png")):
        assert "--sinks is about a whole cache" in run("inspect", cache.path, "--sinks", *others, code=2)


def test_of_causal_rows_it_is_said_what_an_even_gaze_would_give():
    found = SinkMap(
        tiles=(grid_tile(6, 6),), places="token", pictures=1, received=np.ones(36), scores=np.linspace(1, 0, 36),
        often=np.ones(36, dtype=np.int64),
    )  # fmt: skip
    said = _together(found, "visual_rows")
    even = sum(1 / (row + 1) for place in range(10) for row in range(place, 36)) / 36
    assert f"equally would give these places {even:.1%}" in said
    assert round(even, 2) == 0.62
    assert "causal" not in _together(found, "language_model")


def test_a_cache_that_holds_nothing_of_them_says_what_to_add(family_cache, tmp_path):
    pull_partial(str(family_cache("llava").path), tmp_path / "words", Selection(signals=("logits",)))
    cache = open_cache(tmp_path / "words")
    assert SINKS not in cache.manifest.files
    said = run("inspect", cache.path, "--sinks")
    assert "vision tower: no sinks are known of its teacher's vision tower: they are found in tower_attention" in said
    assert "add it with `teacher-cache extend CACHE --data DATA --teacher TEACHER --signals visual_columns`" in said
    with pytest.raises(CacheMismatchError, match=r"holds logits; add it with .* --signals tower_attention"):
        sink_map(cache, "tower", (grid_tile(3, 3),))
    pull_partial(str(family_cache("llava").path), tmp_path / "seen", Selection(signals=("visual_columns",)))
    seen = open_cache(tmp_path / "seen")  # where text looks is not known: where visual tokens look is
    assert sink_map(seen, "language_model", (grid_tile(3, 3),)) == sink_map(seen, "visual_rows", (grid_tile(3, 3),))


def test_no_hostile_file_does_more_than_be_refused(family_cache, tmp_path):
    shutil.copytree(family_cache("llava").path, tmp_path / "cache")
    refused = accepted = 0
    for change in list(hostile_documents(tmp_path / "cache", documents=(SINKS,)))[:150]:
        change.write(tmp_path / "cache")
        try:
            found = read_sinks(open_cache(tmp_path / "cache"))
        except DistillError:
            refused += 1
            continue
        accepted += 1
        assert all(0 <= sinks.scores.min() <= sinks.scores.max() <= 1 for sinks in found.maps.values())
    assert refused > 50
    assert write_sinks(tmp_path / "cache") is not None
