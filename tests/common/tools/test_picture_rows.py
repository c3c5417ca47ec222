"""Several pictures and frames, drawn: a row for each picture, a strip of frames with seconds, never a sheet without bounds."""

import json

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from several_factory import ANSWER, SHOWN, build_several, frames, picture, several_plan, several_record, still

from vlm_distill_cache.common.attention.tiles import several_to_arrays
from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.picture import ASCII, WordMap, check_pictures, draw_picture, draw_text, word_maps
from vlm_distill_cache.common.tools.record_view import picture_of
from vlm_distill_cache.common.tools.shift import cache_shift
from vlm_distill_cache.common.tools.shift_view import draw_shifts, measure_cache
from vlm_distill_cache.common.tools.sinks import read_sinks
from vlm_distill_cache.common.tools.views import Shot, chosen, chosen_words, media_words, shots_of
from vlm_distill_cache.data.questions import AskedData
from vlm_distill_cache.data.sample import Frame, Sample, Turn


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "cache"
    build_several(folder, several_plan("webdataset"))
    return open_cache(folder)


def of(name):
    return [picture(seed) for seed in SHOWN[name][2]]


def test_views_are_named_by_their_picture_or_by_the_seconds_of_their_frames():
    labels = {name: [(shot.label, shot.first, shot.video) for shot in shots_of(several_record(name))] for name in SHOWN}
    assert labels == {
        "text": [],
        "one": [("", 0, -1)],
        "two": [("picture 1", 0, -1), ("picture 2", 1, -1)],
        "two again": [("picture 1", 0, -1), ("picture 2", 1, -1)],
        "clip": [("0.0-0.5 s", 0, 0), ("1.0-1.5 s", 2, 0)],
        "both": [("picture 1", 0, -1), ("0.0 s", 1, 1), ("2.0 s", 2, 1)],
    }
    assert [media_words(several_record(name)) for name in ("text", "one", "two", "clip", "both")] == [
        "0 pictures",
        "1 picture",
        "2 pictures",
        "a video of 4 frames (0.0-1.5 s)",
        "1 picture, a video of 2 frames (0.0-2.0 s)",
    ]


@pytest.mark.parametrize("name", ["one", "two", "clip", "both"])
def test_the_maps_of_a_word_are_those_that_the_codec_decodes_view_by_view(cache, name):
    record = cache.read(name)
    [word] = word_maps(record, cache.plan, [("x", [1, 2])])
    decoded, at = ANSWER.decode(record).cells[[1, 2]].mean(axis=(0, 1), dtype=np.float64), 0
    for cells, tile in zip(word.views, ANSWER.cells_of(SHOWN[name][0]), strict=True):
        expected = decoded[at : at + tile.token_count].reshape(tile.rows, tile.cols)
        np.testing.assert_allclose(cells, expected, rtol=1e-6)
        at += tile.token_count
    assert at == len(decoded)
    assert word.image_mass == pytest.approx(sum(cells.sum() for cells in word.views))


def test_the_densest_place_of_all_pictures_is_the_darkest_and_of_an_equal_gaze_all_are_alike():
    word = WordMap(word="x", cells=np.array([[0.1, 0.0]]), image_mass=0.5, further=(np.full((2, 2), 0.1),))
    lines = draw_text([word], shades=ASCII, shots=[Shot(label="picture 1"), Shot(label="0.0 s", video=4)])
    assert "[picture 1]" in lines
    assert "[video 1] x" in lines
    marks = [line for line in lines if line and not set(line) - set(ASCII + " ")]
    assert marks == ["**.", "####", "####"]  # half as dense: two cells of the first picture, four of the other


def test_a_sheet_shows_each_picture_where_it_belongs(cache):
    maps = word_maps(cache.read("two"), cache.plan, [("x", [0])])
    images = [PIL.Image.new("RGB", (40, 40), colour) for colour in ("red", "lime")]
    shots = shots_of(cache.read("two"), dict(enumerate(images)))
    sheet = draw_picture(maps, title="t", image=None, shots=shots).convert("RGB")
    rows = {colour: np.argwhere((np.asarray(sheet) == shade).all(axis=2)) for colour, shade in
            {"red": (255, 0, 0), "lime": (0, 255, 0)}.items()}  # fmt: skip
    assert len(rows["red"]) == len(rows["lime"]) == 200 * 200
    assert rows["red"][:, 0].max() < rows["lime"][:, 0].min()  # a row of its own
    assert (rows["red"][:, 1].min(), rows["red"][:, 1].max()) == (rows["lime"][:, 1].min(), rows["lime"][:, 1].max())


@pytest.mark.parametrize(("stills", "count"), [(0, 32), (20, 0), (9, 200)])
def test_many_frames_and_pictures_make_a_sheet_of_bounded_size_that_says_how_many_are_drawn(stills, count):
    tiles = [still(2, 2, number) for number in range(stills)]
    tiles += [frames(2, 2, stills + number, 1) for number in range(count)]
    times = [(-1, float("nan"))] * stills + [(stills, number / 2) for number in range(count)]
    record = several_to_arrays(tiles, times if count else [], stills + count)
    record["image_hash"] = np.ones((stills + count, 16), np.uint8)
    shots = shots_of(record, {number: PIL.Image.new("RGB", (64, 36)) for number in range(stills + count)})
    assert len(shots) == stills + count
    drawn = chosen(shots, frames=16)
    assert len(drawn) == min(stills, 8) + min(count, 16)
    assert {0, len(shots) - 1} <= set(drawn)
    words = [
        WordMap(word=f"word {n}", cells=np.ones((2, 2)), image_mass=0.5, further=(np.ones((2, 2)),) * (len(shots) - 1))
        for n in range(3)
    ]
    sheet = draw_picture(words, title="t", image=None, shots=shots)
    assert sheet.width <= 1100
    assert sheet.height <= 4 * 8 * 240 + 4 * 2 * 160
    said = (
        " and ".join([f"8 of {stills} pictures"] * (stills > 8) + [f"16 of {count} frames"] * (count > 16)) + " drawn"
    )
    assert chosen_words(shots, drawn) == said
    lines = draw_text(words, shots=shots)
    assert len(lines) < 300
    assert max(map(len, lines)) <= 100
    assert lines[-1].endswith(" drawn")


def test_a_picture_that_is_not_the_cached_one_is_named(cache, tmp_path):
    record = cache.read("both")
    check_pictures([*of("both"), picture(9)], record, name="it")  # more than the teacher saw: those were cut off
    with pytest.raises(CacheMismatchError, match=r"it: picture 2 has hash \w+, the sample's image has"):
        check_pictures([picture(2), picture(9), picture(4)], record, name="it")
    with pytest.raises(CacheMismatchError, match="it has 2 pictures and frames, the teacher saw 3"):
        check_pictures(of("both")[:2], record, name="it")
    picture(9).save(tmp_path / "other.png")
    with pytest.raises(
        CacheMismatchError, match=r"other\.png: its pixels have hash .*the sample's 3 pictures have others"
    ):
        picture_of(cache, "both", [tmp_path / "other.png"])


def test_files_of_pictures_may_be_given_in_any_order(cache, tmp_path):
    paths = [tmp_path / f"{place}.png" for place in range(3)]
    for path, image in zip(paths, of("both"), strict=True):
        image.save(path)
    drawn = [picture_of(cache, "both", order).tobytes() for order in (paths, paths[::-1])]
    assert drawn == [picture_of(cache, "both", pictures=of("both")).tobytes()] * 2
    assert picture_of(cache, "both", paths[:1]).tobytes() != drawn[0]


class Clip:
    """A video whose frames are pictures of the factory."""

    name = "clip"

    def __init__(self, seeds):
        self.seeds = seeds

    def frames(self, sampling):
        return [Frame(image=picture(seed), time=n / sampling.fps) for n, seed in enumerate(self.seeds[: sampling.most])]


class Still:
    name = "still"

    def __init__(self, seed):
        self.seed = seed

    def load(self):
        return picture(self.seed)


class Data:
    """The samples of the cache."""

    name, sample_ids = "drawn", tuple(SHOWN)

    def __getitem__(self, index):
        _, times, seeds = SHOWN[self.sample_ids[index]]
        stills = [seed for place, seed in enumerate(seeds) if not times or times[place][0] < 0]
        clip = [seed for place, seed in enumerate(seeds) if times and times[place][0] >= 0]
        media = [*map(Still, stills), *([Clip([*clip, 7, 8])] if clip else [])]
        turns = (Turn(question="what", answer="that"),)
        return Sample(sample_id=self.sample_ids[index], images=tuple(media), turns=turns)


def test_data_give_the_pictures_and_the_frames_that_the_cache_saw(cache):
    asked = AskedData(Data())
    sampling = cache.plan.extra["frames"]
    for name in SHOWN:
        found = asked.pictures(name, sampling)
        expected = [image.tobytes() for image in of(name)] or None
        cut = len(expected or [])
        assert (found and [image.tobytes() for image in found][:cut]) == expected
    assert [len(asked.pictures("clip", {"fps": 1.0, "most": most})) for most in (2, 32)] == [2, 6]
    assert asked.pictures("clip", {"what": 1}) is None  # a plan may say anything


def test_sheets_of_shifts_are_drawn_over_pictures_and_frames(cache, tmp_path):
    asked = AskedData(Data())
    report = measure_cache(cache, asked, name="drawn")
    assert report.frame_grid == (1, 2)
    assert report.pictures == 5
    for one in report.largest:
        cells = sum(tile.token_count for tile in ANSWER.cells_of(SHOWN[one.sample_id][0]))
        assert len(one.shift.kept) == max(1, cells // 3)
    drawn = draw_shifts(cache, report, asked, tmp_path / "sheets")
    assert [over for _, over in drawn] == [True] * len(report.largest)
    bare = draw_shifts(cache, cache_shift(cache), None, tmp_path / "bare")
    assert len(bare) == len(drawn)


def test_sinks_are_found_on_each_picture_and_frame(cache):
    found = read_sinks(cache).maps
    # Text looks: grids of pictures alone, since frames have a coarser one; one, two, two again, both: 6 pictures.
    assert (found["language_model"].places, found["language_model"].pictures) == ("cell", 6)
    cells = []
    for name in ("one", "two", "two again", "both"):
        record = cache.read(name)
        mean, at = ANSWER.decode(record).cells.astype(np.float64).mean(axis=(0, 1)), 0
        for tile in ANSWER.cells_of(SHOWN[name][0]):
            cells += [] if tile.is_frame else [mean[at : at + 6]]
            at += tile.token_count
    np.testing.assert_allclose(found["language_model"].received, np.mean(cells, axis=0))
    # Visual tokens look: each picture once, whichever records show it: pictures 1 and 2, two pairs of frames, two frames.
    assert found["visual_rows"].pictures == 6


def test_the_command_draws_over_files_and_says_what_a_sample_shows(cache, tmp_path):
    def run(*arguments, code=0):
        result = CliRunner().invoke(main, ["inspect", str(cache.path), *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.output

    assert "12 pictures and frames of videos in all" in run()
    said = run("both")
    assert "shows 1 picture, a video of 2 frames (0.0-2.0 s)" in said
    for place, image in enumerate(of("both")):
        image.save(tmp_path / f"{place}.png")
    run("both", "--picture", tmp_path / "out.png", "--image", tmp_path / "2.png", "--image", tmp_path / "0.png")
    with PIL.Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width > 400
    document = CliRunner().invoke(main, ["inspect", str(cache.path), "both", "--json"]).stdout
    assert json.loads(document)["views"][1] == {"picture": 1, "video": 1, "label": "0.0 s"}
    assert "leave one out" in run(
        "both", "--picture", tmp_path / "o.png", "--image", tmp_path / "0.png", "--data", "x", code=2
    )
