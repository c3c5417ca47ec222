"""The page of a run: what stands on it, and that its numbers are those of the scores, the log and the cache."""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from finished_runs import make_config
from page_inputs import RECORDS, run_page, without_heads
from tiny_cache import DATA

from vlm_distill_cache.common.attention.boxes import tile_boxes
from vlm_distill_cache.common.attention.tiles import Tile, grid_tile
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.tools.record_view import load_token_text
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import Frame
from vlm_distill_cache.stage2_student.scores.flips import choose, collect_flips
from vlm_distill_cache.stage2_student.scores.metrics import Score, bootstrap, exact_match
from vlm_distill_cache.stage2_student.scores.page.charts import Group, bars, curves, scored_on_the_way
from vlm_distill_cache.stage2_student.scores.page.legends import explain, verdict
from vlm_distill_cache.stage2_student.scores.page.run_page import RunPage, render_run_page
from vlm_distill_cache.stage2_student.scores.results import (
    DETAILS,
    HEADLINE,
    EvaluationReport,
    outcomes,
    read_scores,
    table_rows,
)
from vlm_distill_cache.stage2_student.scores.taught import heat_picture, teachers_words
from vlm_distill_cache.stage2_student.trained_student import open_student, show_flips, show_taught

HALF, MORE = (Score(value=value, low=value - 0.1, high=value + 0.1, items=10) for value in (0.5, 0.7))


def page(tmp_path: Path, **fields) -> str:
    render_run_page(tmp_path / "report.html", RunPage(**{"title": "run"} | fields))
    return without_heads((tmp_path / "report.html").read_text())


def test_all_sections_are_there_and_nothing_is_fetched(tmp_path: Path):
    render_run_page(tmp_path / "report.html", run_page())
    text = (tmp_path / "report.html").read_text()
    headings = re.findall(r'<h2 id="[\w-]+">(.*?)</h2>', text)
    assert headings == ["Headline", "Scores", "Wins and losses", "Beside the teacher", "Training", "Provenance"]
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text
    assert set(re.findall(r'src="(data:image/\w+;base64,)', text)) <= {
        "data:image/png;base64,",
        "data:image/jpeg;base64,",
    }
    assert text.count("What the numbers mean") == 6


def test_the_page_leads_with_the_three_lines_and_the_gain(tmp_path: Path):
    names = [name for name, _, _ in HEADLINE]
    reports = {
        "sft": EvaluationReport(scores=dict.fromkeys((*names, "questions/color"), HALF)),
        "distilled": EvaluationReport(scores=dict.fromkeys((*names, "questions/color"), MORE)),
    }
    text = page(tmp_path, evaluations=reports, compared=("sft", "distilled"))
    cards = re.findall(r'<div class="card headline">(.*?)</dl>', text)
    assert [re.search(r"<figcaption>(\w+)", card)[1] for card in cards] == ["captions", "questions", "top"]
    assert all('<div class="big">70.0</div>' in card and "+20.0 <small>[+" in card for card in cards)
    assert [card.count("not scored") for card in cards] == [1, 1, 0]  # a teacher agrees with itself
    assert "color</td><td>50.0 <small>[40.0, 60.0]</small></td><td>70.0" in text


def test_every_number_has_a_legend():
    scores = dict.fromkeys([name for name, _, _ in (*HEADLINE, *DETAILS) if name and not name.endswith("/")], HALF)
    scores |= {"likelihood/swap": HALF, "questions/color": HALF}
    headlines, details = table_rows({"sft": EvaluationReport(scores=scores)})
    rows = [row for row in [*headlines, *details] if row.scores]
    assert len(rows) == len(scores)
    explained = explain(rows)
    assert {row.heading for row in rows if "/swap" not in row.name and "/color" not in row.name} <= explained.keys()
    assert {"likelihood, by kind", "questions, by kind"} <= explained.keys()


def test_bars_end_where_their_numbers_say_and_never_outside():
    generator = np.random.default_rng(0)
    scores = [Score(value=v, low=v - 0.1, high=v + 0.2, items=3) for v in generator.uniform(-1, 1, 30)]
    text = bars([Group("bias", 100, [(str(place), [score, None]) for place, score in enumerate(scores)])], ["a", "b"])
    low, high = min(-1e-9, *(s.low for s in scores)), max(0.0, *(s.high for s in scores))
    found = re.findall(r'<i style="left:([\d.-]+)%;width:([\d.-]+)%', text)
    assert len(found) == len(scores)
    for score, (left, width) in zip(scores, found, strict=True):
        ends = sorted(100 * (value - low) / (high - low) for value in (0.0, score.value))
        assert (float(left), float(left) + float(width)) == pytest.approx(ends, abs=0.02)
        assert -0.01 <= float(left) <= float(left) + float(width) <= 100.01


def test_curves_are_trailing_means_in_three_views():
    text = curves("c", {"sft": RECORDS, "distilled": [*RECORDS, {"step": 300, "lm": math.nan, "total": None}]})
    text = without_heads(text)
    assert text.count("<svg") == 4  # lm and total, linear and log; the learning rate is no loss
    assert text.count("<polyline") == 8
    assert text.count("stroke-dasharray") == 8  # the phase that begins at step 100
    assert "nan" not in text
    window = len(RECORDS) // 40
    for step, value in re.findall(r"<tr><td>(\d+)</td><td>([\d.]+)</td>", text)[-3:]:
        tail = [record["lm"] for record in RECORDS if int(step) - window < record["step"] <= int(step)]
        assert float(value) == pytest.approx(sum(tail) / len(tail), rel=1e-3)
    assert re.findall(r"<tr><td>(\d+)</td>", text)[-1] == "299"
    # On a log axis equal ratios are equal distances: 2 / step falls along a straight line of log(step).
    heights = [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", re.findall(r'<polyline points="(.*?)"', text)[4])]
    assert heights[0] < heights[len(heights) // 8] < heights[-1]


def test_scores_on_the_way_are_those_of_the_lines():
    lines = [{"step": step, "scores": {"questions": bootstrap([0.0] * step + [1.0]).to_dict()}} for step in (1, 3, 4)]
    text = scored_on_the_way("s", {"sft": [], "distilled": lines})
    assert re.findall(r"<tr><td>(\d)</td><td>([\d.]+)</td></tr>", text) == [("1", "50"), ("3", "25"), ("4", "20")]
    assert text.count("<polyline") == 2
    assert scored_on_the_way("s", {"sft": []}) == ""


def test_a_curve_that_is_zero_has_no_log_axis_and_no_log_no_curve():
    assert "Nothing above zero" in curves("c", {"sft": [{"step": 1, "total": 0.0}]})
    assert "No training log" in curves("c", {"sft": []})


def test_outcomes_are_those_of_the_items():
    generator = np.random.default_rng(1)
    before, after = (
        {kind: generator.choice([0.0, 0.5, 1.0], size).tolist() for kind, size in (("a", 40), ("b", 7))}
        for _ in range(2)
    )
    found = outcomes(after, before)
    expected = Counter(
        "won" if new > old else "lost" if new < old else "both" if new == 1 else "neither"
        for kind in after
        for new, old in zip(after[kind], before[kind], strict=True)
    )
    assert {name: len(places) for name, places in found.items()} == expected
    assert outcomes(after, {"a": before["a"]}) is None
    chosen = choose([("a", place) for place in range(9)] + [("b", place) for place in range(2)], 5)
    assert Counter(kind for kind, _ in chosen) == {"a": 3, "b": 2}  # kinds in turn


def test_a_gain_is_coloured_only_where_its_interval_tells():
    gains = [Score(value=v, low=v - 0.1, high=v + 0.1, items=9) for v in (0.05, 0.2, -0.2)]
    assert [verdict(gain) for gain in gains] == ["", "good", "bad"]
    assert verdict(gains[1], more_is_better=False) == "bad"


def test_heat_is_strongest_where_the_mass_is_and_cut_off_at_the_picture():
    heat = np.asarray(heat_picture(torch.tensor([0.0, 0.0, 0.1, 0.6]), tile_boxes((grid_tile(2, 2),)))).astype(int)
    side = heat.shape[0] // 2
    assert heat[side:, side:, 3].min() > heat[side:, :side, 3].max() > heat[:side, :, 3].max()
    padded = Tile(2, 2, (0.0, -0.5, 1.0, 1.5))
    heat = np.asarray(heat_picture(torch.tensor([0.0, 1.0, 0.0, 0.0]), tile_boxes((padded,)))).astype(int)
    assert heat[: side - 1, side:, 3].min() > heat[side + 1 :, side:, 3].max()


@pytest.fixture(scope="module")
def students(finished):
    return {name: open_student(finished.output / name / "final") for name in ("sft", "distilled")}


def test_words_and_maps_are_the_teachers(finished, students, tiny_cache):
    """Image mass and likely tokens of each word, against the live teacher; cosines against maps made by hand."""
    path, teacher = tiny_cache
    config, cache = make_config(path, finished.output, "evaluation.overlays=3"), TeacherCache(path)
    taught = show_taught(students, config, cache)
    assert [one.sample_id for one in taught] == list(cache.sample_ids)[:3]
    text = load_token_text(cache)
    for one, sample in zip(taught, open_dataset(DATA), strict=False):
        logits, answer, _, batch = teacher.signals(sample)
        labels = batch.labels[batch.labels != -100].tolist()
        turn = next(
            place for place, turn in enumerate(sample.turns) if (turn.question or "(a caption)") == one.question
        )
        assert one.answer == sample.turns[turn].answer
        ends = [-1, *(row for row, label in enumerate(labels) if label in text.special)]
        rows = range(ends[turn] + 1, ends[turn + 1])
        assert one.teacher == text.decode(logits[rows.start : rows.stop].argmax(-1).tolist()).strip()
        words = [(word, own) for word, own in text.words(labels) if own[0] in rows]
        assert [word.text for word in one.words] == [word for word, _ in words]
        for word, (_, own) in zip(one.words, words, strict=True):
            mass = answer[own].mean(dim=(0, 1)).sum()
            assert word.looks["teacher"].image_mass == pytest.approx(float(mass), abs=2e-3)
            best = logits[own[0]].softmax(-1)
            assert word.likely[0][0] == text.of(int(best.argmax()))
            assert word.likely[0][1] == pytest.approx(float(best.max()), abs=2e-3)
            assert all(0 <= word.looks[name].cosine <= 1 for name in students)
        peaks = [float(answer[own].mean(dim=1).amax()) for _, own in words]
        assert one.chosen == max(range(len(peaks)), key=peaks.__getitem__)
        assert one.said.keys() == students.keys()


@dataclass(frozen=True)
class Clip:
    """A video of one frame."""

    name: str = "clip"

    def frames(self, sampling):
        return [Frame(image=PIL.Image.new("RGB", (24, 24)), time=0.0)]


def test_what_students_say_where_they_differ_is_what_was_scored(finished, students, tiny_cache):
    """The one after as it was scored; the one before as its opposite, so that every item is a win or a loss."""
    after = EvaluationReport.from_dict(read_scores(finished.output)["distilled"])
    opposite = {
        name: {kind: [1 - value for value in of] for kind, of in kinds.items()} for name, kinds in after.items.items()
    }
    items = open_evaluation(DATA, "test", 2)
    models = {name: (one.model, one.encoder) for name, one in students.items()}
    teacher = EvaluationReport(
        items={"likelihood": {kind: [1.0] * len(of) for kind, of in after.items["likelihood"].items()}}
    )
    pairs, questions = collect_flips(
        models, (EvaluationReport(items=opposite), after), items, TeacherCache(tiny_cache[0]), teacher
    )
    assert sum(pairs.counts.values()) == len(items.pairs)
    assert sum(questions.counts.values()) == len(items.questions)
    assert pairs.shown
    for flip in pairs.shown:
        nats = float(flip.said["distilled"].removesuffix(" nats"))
        assert nats >= 0 if flip.outcome == "won" else nats <= 0
        assert flip.teacher == "right"
    expected = {item.item_id: item for item in items.questions}
    assert questions.shown
    for flip in questions.shown:
        assert exact_match(flip.said["distilled"], expected[flip.item_id].answer) == (flip.outcome == "won")
        assert flip.teacher == ""  # of the test set nothing is in the cache
    clips = [replace(item, image=Clip()) for item in items.questions]
    after_clips = collect_flips(
        models,
        (EvaluationReport(items=opposite), after),
        replace(items, pairs=[], questions=clips),
        TeacherCache(tiny_cache[0]),
        teacher,
    )
    assert [flips.counts for flips in after_clips] == [questions.counts]
    fewer = EvaluationReport(items={name: {} for name in after.items})
    assert collect_flips(models, (fewer, fewer), items, TeacherCache(tiny_cache[0]), teacher) == []


def test_items_that_are_gone_or_other_ones_are_said(finished, students, tiny_cache, tmp_path):
    cache = TeacherCache(tiny_cache[0])
    reports = {name: EvaluationReport.from_dict(read_scores(finished.output)[name]) for name in students}
    gone = make_config(tiny_cache[0], finished.output, f"evaluation.data={tmp_path / 'gone.json'}")
    others = make_config(tiny_cache[0], finished.output, "evaluation.limit=3")
    assert "cannot be opened any more" in show_flips(students, gone, cache, reports)[1]
    assert "other ones now" in show_flips(students, others, cache, reports)[1]
    assert show_flips(students, others, cache, dict.fromkeys(students, EvaluationReport())) == (
        [],
        "No item was scored by itself.",
    )


def test_the_teachers_words_are_told_of_its_own_pictures_only(tiny_cache):
    path, teacher = tiny_cache
    cache = TeacherCache(path)
    (sample,) = list(open_dataset(DATA))[:1]
    text = load_token_text(cache)
    picture, answer = sample.images[0].load(), sample.turns[0].answer
    logits, *_ = teacher.signals(sample)
    rows = len(teacher.encoder.tokenizer(" " + answer, add_special_tokens=False)["input_ids"])
    expected = text.decode(logits[:rows].argmax(-1).tolist()).strip()
    assert teachers_words(cache, sample.sample_id, picture, answer, text) == expected
    assert teachers_words(cache, sample.sample_id, picture, "another answer", text) is None
    assert teachers_words(cache, sample.sample_id, PIL.Image.new("RGB", picture.size), answer, text) is None
    assert teachers_words(cache, "of another file", picture, answer, text) is None


def test_a_run_without_scores_or_with_notes_says_so(tmp_path: Path):
    assert "No evaluation was run" in page(tmp_path)
    assert "on the training data &lt;itself&gt;" in page(tmp_path, notes=["on the training data <itself>"])
