"""Shifts of a student's gaze: measured as the teacher's are, on the same cells, and told on the page of a run."""

import re
from dataclasses import replace

import numpy as np
import pytest
from finished_runs import make_config
from page_inputs import without_heads
from tiny_cache import DATA

from vlm_distill_cache.common.attention.shift import Interval, gaze_shift
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.record_view import load_token_text
from vlm_distill_cache.common.tools.shift_view import LEGEND, percent
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.scores.gaze import compare_shifts
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.page.run_page import RunPage, render_run_page
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport
from vlm_distill_cache.stage2_student.trained_student import open_student, show_shift


def test_a_teacher_shifts_as_its_own_cache_says_and_as_its_attention_does(tiny_cache):
    path, teacher = tiny_cache
    cache, dataset = open_cache(path), open_dataset(DATA)
    terms = choose_terms(["answer_attention"])
    cached = CachedDataset(dataset, teacher.encoder, cache, terms=terms, pad_token_id=0, limit=6)
    text = load_token_text(cache)
    found = compare_shifts({"own": teacher.model}, cached, text)
    assert list(found) == ["teacher", "own"]
    shares, events = [], []
    for name in cached.sample_ids:  # answer by answer, from the attention of a run of the model
        _, answer, _, batch = teacher.signals(dataset[dataset.sample_ids.index(name)])
        labels = batch.labels[batch.labels != -100].tolist()
        gaze, start = answer.mean(dim=1).numpy(), 0
        for row, label in enumerate(labels):
            if label in text.special:
                if row - start > 1:
                    shift = gaze_shift(gaze[start:row])
                    shares += shift.first[1:].tolist()
                    events.append(shift.event.sum())
                start = row + 1
    for report in found.values():
        counted = [(span.tokens, span.first.value) for span in report.spans.values() if span.tokens]
        assert sum(count for count, _ in counted) == len(shares)
        assert sum(count * share for count, share in counted) / len(shares) == pytest.approx(np.mean(shares), abs=2e-3)
        assert report.answers == len(events)
    assert found["own"].events.value == pytest.approx(np.mean(events), abs=0.02)
    assert found["own"].spans["1"].first.value == pytest.approx(found["teacher"].spans["1"].first.value, abs=2e-3)


def test_the_page_of_a_run_tells_of_teacher_and_students_with_a_legend_for_each_number(tiny_cache, finished, tmp_path):
    path, _ = tiny_cache
    config, cache = make_config(path, finished.output, "evaluation.agreement_samples=3"), open_cache(path)
    students = {name: open_student(finished.output / name / "final") for name in ("sft", "distilled")}
    shift = show_shift(students, config, cache)
    assert shift.teacher.asked
    assert shift.teacher.samples == len(cache)
    assert list(shift.beside) == ["teacher", "sft", "distilled"]
    assert {report.samples for report in shift.beside.values()} == {3}
    render_run_page(tmp_path / "report.html", RunPage(title="run", shift=shift))
    page = without_heads((tmp_path / "report.html").read_text())
    section = page[page.index('<h2 id="shift-of-the-gaze">') :].partition('<h2 id="training">')[0]
    for report in (shift.teacher, *shift.beside.values()):
        assert percent(report.spans["1"].first) in section
        assert percent(report.shifting) in section
    assert set(re.findall(r"<dt>(.*?)</dt>", section)) == set(LEGEND)
    assert section.count("<img ") == len(shift.sheets) == 3
    whole = {
        name: replace(of, spans={key: span._replace(first=Interval(1.0, 1.0, 1.0)) for key, span in of.spans.items()})
        for name, of in shift.beside.items()
    }
    fewer = RunPage(
        title="run",
        shift=replace(shift, beside=whole),
        facts={"visual tokens": "few"},
        evaluations={
            "distilled": EvaluationReport(scores={"attention/cosine": Score(value=0.5, low=0.4, high=0.6, items=3)})
        },
    )
    render_run_page(tmp_path / "fewer.html", fewer)
    page = (tmp_path / "fewer.html").read_text()
    assert "sft, distilled: not shown, since fewer visual tokens are fed" in page
    assert "on the cells where all can be compared" not in page
    assert "so it rises as fewer are fed" in page
    unlooked = show_shift(students, make_config(path, finished.output, "evaluation.agreement_samples=0"), cache)
    assert unlooked.beside == {}
