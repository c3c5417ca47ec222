"""``cachectl inspect --shift``: its figures equal a slow count over all answers, of which kind, and its pictures."""

import json

import numpy as np
import PIL.Image
import pytest
from cache_factory import build_cache, make_plan
from click.testing import CliRunner

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.attention.shift import gaze_shift
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import write_plan
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.codecs.row_attention import AttentionRows, RowAttentionCodec
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.pixels import image_hash
from vlm_distill_cache.common.tools.record_view import TokenText
from vlm_distill_cache.common.tools.shift import Gaze, _beginning, cache_shift, folder_shift, measure, split_answers

WORDS = ("</s>", "<box>", "a", "red", "circle", "left", "of", "square", "yes", "no", "3", "b", "blue")
CODEC = RowAttentionCodec(grid=(2, 3), groups=2, exact=True)
SAID = {  # questions and answers of each sample; the first has no picture, the last is cut in its second answer
    "text": [("say yes", "yes")],
    "one": [("What colour is it?", "red"), ("Where is it?", "left of square"), ("is it red", "yes")],
    "two": [("", "a red circle left of a blue square"), ("How many?", "3"), ("Which one?", "b")],
    "three": [("Where is that?", "left of a <box> circle"), ("where is the dot", "a red square")],
    "cut": [("", "a blue circle"), ("where is what", "left of")],
}


def tokens(answer):
    return [WORDS.index(word) for word in answer.split()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache of five samples in shards of two, and the data and pictures that it was made from."""
    home = tmp_path_factory.mktemp("shift")
    rng = np.random.default_rng(0)
    plan = make_plan(
        "zarr", samples=5, shard_size=2, signals={CODEC.signal: CODEC.to_dict()}, fields={CODEC.signal: CODEC.fields()}
    )
    write_plan(home / "cache", plan)
    (home / "cache" / "processor").mkdir()
    added = [
        {"id": place, "content": WORDS[place], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False} for place in (0, 1)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: place for place, word in enumerate(WORDS)}, "unk_token": "</s>"},
    }  # fmt: skip
    (home / "cache" / "processor" / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = []
    for index in range(plan.shard_count):
        writer = open_writer("zarr", home / "cache", index, plan.all_fields)
        for place in plan.shard_range(index):
            name = list(SAID)[place]
            labels = [token for _, answer in SAID[name] for token in (*tokens(answer), 0)][
                : 6 if name == "cut" else None
            ]
            cells = rng.random((len(labels), 2, 6)).astype(np.float32) ** 4 / 6 * (name != "text")
            pixels = np.random.default_rng(place).integers(0, 255, (20, 30, 3)).astype(np.uint8)
            image = PIL.Image.fromarray(pixels)
            image.save(home / f"{name}.png")
            writer.append(
                name,
                {
                    "image_hash": np.frombuffer(image_hash(image), np.uint8).reshape(1, 16),
                    "labels": np.array(labels, np.uint32),
                    "tiles": np.ones((int(name != "text"), 6), np.float32),
                    **CODEC.encode(AttentionRows(cells, cells.sum(axis=2))),
                },
            )
            said = [
                {"from": role, "value": text or "<image>"}
                for turn in SAID[name] for role, text in zip(("human", "gpt"), turn, strict=True)
            ]  # fmt: skip
            data.append({"id": name, "image": f"{name}.png", "conversations": said})
        finish_shard(writer)
    seal(home / "cache")
    (home / "data.json").write_text(json.dumps(data))
    return home


def run(*arguments, code=0):
    result = CliRunner().invoke(group_of("common"), ["inspect", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_figures_are_those_of_a_slow_count(home):
    cache = open_cache(home / "cache")
    found = cache_shift(cache)
    spans = {"1": [], "2-3": [], "4-7": [], "8+": []}
    events, single = [], 0
    for name in list(SAID)[1:]:
        record = cache.read(name)
        gaze, labels = record["answer_attention"].mean(axis=1), record["labels"].tolist()
        answer = []
        for row, label in enumerate([*labels, 0]):
            if label != 0:
                answer.append(row)
                continue
            if len(answer) == 1:
                single += 1
            elif answer:
                shift = gaze_shift(gaze[answer])
                events.append(int(shift.event.sum()))
                for token in range(1, len(answer)):
                    span = "1" if token == 1 else "2-3" if token < 4 else "4-7" if token < 8 else "8+"
                    spans[span].append((shift.first[token], shift.best[token], shift.common[token]))
            answer = []
    assert (found.samples, found.total, found.pictures, found.places, found.kept) == (5, 5, 4, 6, 2)
    assert (found.answers, found.single, found.blind) == (len(events), single, 0) == (6, 4, 0)
    for span, values in spans.items():
        count, *shares = found.spans[span]
        assert count == len(values)
        if values:
            np.testing.assert_allclose([share.value for share in shares], np.mean(values, axis=0))
            assert all(share.low <= share.value <= share.high for share in shares)
    assert found.events.value == pytest.approx(np.mean(events))
    assert found.shifting.value == pytest.approx(np.mean(np.array(events) > 0))
    moving = {one.sample_id: one.shift.first[one.worst] / one.shift.best[one.worst] for one in found.largest}
    assert list(moving.values()) == sorted(moving.values())
    texts = {answer for turns in SAID.values() for _, answer in turns}
    assert {one.text for one in found.largest} <= texts  # <box> is special and ends no answer
    assert folder_shift(cache.path, cache.plan, total=5).values() == found.values()


def test_answers_end_where_most_records_end_and_a_cut_one_counts():
    assert split_answers([4, 0, 5, 6, 0, 0, 7], 0) == [range(1), range(2, 4), range(5, 5), range(6, 7)]
    assert split_answers([4, 5], None) == [range(2)]
    assert split_answers([], 0) == []
    look = np.ones((4, 3))
    text = TokenText(decode=lambda ids: " ".join(map(str, ids)), special=frozenset({8, 9}))
    # 8 is special, too, and inside answers; 7 ends one that is cut.
    gazes = [Gaze("a", [1, 8, 2, 9], look), Gaze("b", [1, 2, 9], look[:3]), Gaze("c", [1, 9, 3, 7], look)]
    found = measure(gazes, text, grid=(1, 3), total=9)
    assert (found.samples, found.total, found.answers, found.single) == (3, 9, 3, 1)
    # A line feed that the template writes behind its one answer is no word of it; inside it is.
    lined = TokenText(decode=lambda ids: "\n" if list(ids) == [7] else "a", special=frozenset({9}))
    gazes = [Gaze("a", [1, 7, 2, 7], look), Gaze("b", [1, 7], look[:2])]
    for end, answers in ((None, (2, 0)), ("\n", (1, 1))):
        found = measure(gazes, lined, grid=(1, 3), total=2, written_end=end)
        assert (found.answers, found.single) == answers
    blind = measure([Gaze("a", [1, 2], 0 * look[:2])], text, grid=(1, 3), total=1)
    assert (blind.blind, blind.answers, blind.largest) == (1, 0, ())
    empty = measure([Gaze("a", [9], look[:1]), Gaze("b", [], look[:0])], text, grid=(1, 3), total=1)
    assert (empty.pictures, empty.answers, empty.single, empty.blind) == (2, 0, 0, 0)


def test_kinds_are_of_questions_where_the_data_is_given_and_of_answers_else(home):
    def kinds(*more):
        arguments = ["inspect", home / "cache", "--shift", "--json", *more]
        document = json.loads(CliRunner().invoke(group_of("common"), list(map(str, arguments))).stdout)
        return {kind["name"]: (kind["answers"], kind["single"]) for kind in document["kinds"]}

    assert kinds("--data", home / "data.json") == {
        "where is ...": (4, 0), "no question (a caption)": (2, 0),
        "a number": (0, 1), "an option's letter": (0, 1), "what colour ...": (0, 1), "yes or no": (0, 1),
    }  # fmt: skip
    assert kinds() == {
        "2 to 5 words": (5, 0), "more than 5 words": (1, 0), "one word": (0, 1),
        "a number": (0, 1), "an option's letter": (0, 1), "yes or no": (0, 1),
    }  # fmt: skip
    for question, begins in (
        ("What's in THE photo?", "what's in"), ("- Where\tis it", "where is"), ("?!", ""),
        ("\u0939\u093f\u0928 \u092e\u0947\u0902 \u0915\u094d\u092f", "\u0939\u093f\u0928 \u092e\u0947\u0902"),
        ("\u56fe\u4e2d\u6709\u4ec0\u4e48\uff1f", "\u56fe\u4e2d"),
    ):  # fmt: skip
        assert _beginning(question) == begins
    said = run(home / "cache", "--shift")
    assert "All 5 samples, 4 with a picture" in said
    assert "kind of answer" in said
    assert "--shift --data DATA --picture FOLDER" in said


def test_the_largest_shifts_are_drawn_over_their_pictures(home, tmp_path):
    said = run(home / "cache", "--shift", "--data", home / "data.json", "--picture", tmp_path / "maps")
    drawn = sorted((tmp_path / "maps").iterdir())
    assert [path.name for path in drawn] == [f"shift-{place:02}.png" for place in range(1, len(drawn) + 1)]
    assert len(drawn) == 4
    assert said.count("Drew ") == 4
    assert "maps alone" not in said
    with PIL.Image.open(drawn[0]) as wide:
        width = wide.width
    run(home / "cache", "--shift", "--picture", tmp_path / "maps")  # takes the place of the earlier ones
    with PIL.Image.open(drawn[0]) as narrow:
        assert narrow.width < width
    other = json.loads((home / "data.json").read_text())
    for entry in other:
        entry["image"] = "text.png"
    (home / "other.json").write_text(json.dumps(other))
    for more in (("--picture", tmp_path / "new"), ()):  # nor are questions of other data with the same ids taken
        said = run(home / "cache", "--shift", "--data", home / "other.json", *more, code=1)
        assert "give the image that the teacher saw" in said
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert "give a new folder" in run(home / "cache", "--shift", "--picture", tmp_path / "nowhere", code=1)
    (tmp_path / "maps" / "mine.txt").write_text("?")
    assert "nothing else is overwritten" in run(home / "cache", "--shift", "--picture", tmp_path / "maps", code=1)
    assert "takes nothing else" in run(home / "cache", "--shift", "--picture", home / "cache" / "maps", code=1)


def test_what_cannot_be_measured_is_refused_with_a_remedy(home, tmp_path):
    build_cache(tmp_path / "without", make_plan())
    said = run(tmp_path / "without", "--shift", code=1)
    assert "no signal 'answer_attention'" in said
    assert "--signals logits,visual_map,answer_attention" in said
    said = run(home / "cache", "--shift", "--data", home / "data.json", "--images", tmp_path)
    assert "where is" in said
    renamed = [{**entry, "id": f"{entry['id']}-2"} for entry in json.loads((home / "data.json").read_text())]
    (home / "renamed.json").write_text(json.dumps(renamed))
    said = run(home / "cache", "--shift", "--data", home / "renamed.json", code=1)
    assert "none of the 4 samples that were looked at is in" in said
    assert "leave SAMPLE_ID" in run(home / "cache", "one", "--shift", code=2)
    assert "go with --shift" in run(home / "cache", "--data", "shapes", code=2)
    assert "--images needs --data" in run(home / "cache", "--shift", "--images", tmp_path, code=2)


def test_an_answer_is_followed_over_the_pictures_in_front_of_it():
    """A later picture, which no row of the answer looks at, has no part in what is kept."""
    look = np.random.default_rng(0).random((4, 6))
    alone, behind = Gaze("a", [1, 2, 3, 4], look), Gaze("a", [1, 2, 3, 4], np.hstack([look, 0 * look]), (6, 6))
    one, other = (gaze.shift(range(1, 4)) for gaze in (alone, behind))
    assert len(other.kept) == len(one.kept) == 2
    for name in ("first", "best", "common", "event"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert len(Gaze("a", [1], np.ones((1, 12)), (6, 6)).shift(range(1)).kept) == 4
