"""When a student is scored on the way, which one is kept, and what is read of what was left."""

import contextlib
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.common.files.atomic import remove
from vlm_distill_cache.common.files.signed import list_files, write_signed
from vlm_distill_cache.stage2_student.final_folder import BEFORE, BEST, PROVENANCE
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.milestones import Milestones, Scorer
from vlm_distill_cache.stage2_student.scores.on_the_way import (
    EVALUATIONS,
    Kept,
    best_on_the_way,
    read_evaluations,
    read_kept,
)
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport
from vlm_distill_cache.stage2_student.training.checkpoint import Position
from vlm_distill_cache.stage2_student.training.log import TrainingLog


def drawn():
    return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002


def reach_all(output, values, *, by="likelihood", every=2):
    """Pass by as many steps as there are values; of each step that is scored, the value. Returns what was kept."""
    kept, current = [], {}
    output.mkdir(exist_ok=True)

    def score():
        drawn()
        if current["value"] is None:
            raise SampleError("a.png is gone; put it back")
        return EvaluationReport(scores={by: Score(value=current["value"], low=0.0, high=1.0, items=4)})

    scorer = Scorer(
        as_finished=contextlib.nullcontext,
        score=score,
        keep=lambda folder, found, position, log: kept.append((found.step, folder, position.total_steps, len(log))),
        by=by,
        described={"split": "validation", "limit": 4},
        of="how",
    )
    accelerator = Accelerator(cpu=True)
    scored = Milestones(output, accelerator, scorer, every=every, last=len(values), run="run")
    scored.resume(Position(), earlier=None)
    log = TrainingLog(output, accelerator, done=[], flush_every=100)
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    for step, value in enumerate(values, 1):
        current["value"] = value
        log.add({"total": torch.tensor(1.0)}, step=step, phase="dft")
        scored.reach(Position(total_steps=step), "dft", log, lambda: None)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]
    return scored, kept


@pytest.mark.parametrize(
    ("by", "values", "best"),
    [
        ("likelihood", [0.9, 0.5, 0.9, 0.5, 0.9, 0.6, 0.7], [2, 6, 7]),  # of equal ones the first; the last step, too
        ("teacher/kl", [0.0, 0.5, 0.0, 0.6, 0.0, 0.4], [2, 6]),
        ("likelihood", [0.0], [1]),
    ],
)
def test_the_best_of_the_scored_steps_is_kept(tmp_path, by, values, best):
    scored, kept = reach_all(tmp_path, values, by=by)
    steps = sorted({*range(2, len(values) + 1, 2), len(values)})
    assert [step for step, *_ in kept] == best == [line["step"] for line in scored.lines if line["best"]]
    assert all(folder == tmp_path / BEST and step == total == logged for step, folder, total, logged in kept)
    assert [(line["step"], line["scores"][by]["value"]) for line in read_evaluations(tmp_path)] == [
        (step, values[step - 1]) for step in steps
    ]
    assert scored.seconds() > 0 == scored.seconds()


def test_a_step_that_cannot_be_scored_is_said_and_passed_over(tmp_path, caplog):
    scored, kept = reach_all(tmp_path, [0.1, None, 0.1, 0.2])
    assert [line["step"] for line in scored.lines] == [4] == [step for step, *_ in kept]
    assert "step 2: not scored: a.png is gone" in caplog.text


def test_without_scorer_nothing_is_written(tmp_path):
    scored = Milestones(tmp_path, Accelerator(cpu=True), None, every=None, last=2, run="run")
    scored.resume(Position(), earlier=None)
    scored.reach(Position(total_steps=2), "dft", None, lambda: None)
    assert not list(tmp_path.iterdir())


class KilledError(Exception):
    """In place of a signal."""


def live(output, values, *, begin=0, kill=(0, "")):
    """Train and score behind a step, with a checkpoint every third one, and die at a place. Returns the last checkpoint's."""
    current = {}

    def die(place):
        if kill == (current["step"], place):
            raise KilledError

    def keep(folder, found, position, _log):
        die("keeping")
        remove(folder)
        folder.mkdir()
        for name, content in {"config.json": b"{}", "model.safetensors": str(found.value).encode()}.items():
            (folder / name).write_bytes(content)
        encoder = {"template": {}, "image_token_id": 1, "max_length": 9, "layout": "tiny"}
        own = {"fingerprint": "own", "caches": {}, "config": {}, "encoder": encoder, "vocabulary": {}}
        write_signed(folder / PROVENANCE, {**own, "best": vars(found), "files": list_files(folder)})
        die("kept")

    report = lambda: EvaluationReport(  # noqa: E731
        scores={"likelihood": Score(value=current["value"], low=0.0, high=1.0, items=4)}
    )
    scorer = Scorer(
        as_finished=contextlib.nullcontext, score=report, keep=keep, by="likelihood", described={}, of="how"
    )
    scored = Milestones(output, Accelerator(cpu=True), scorer, every=1, last=len(values), run="run")
    scored.resume(Position(total_steps=begin), earlier=None)
    log = SimpleNamespace(flush=lambda: None, records=[], draw=lambda *_, **__: None)
    with contextlib.suppress(KilledError):
        for step, value in enumerate(values[begin:], begin + 1):
            current.update(step=step, value=value)
            scored.reach(Position(total_steps=step), "dft", log, lambda: None)
            die("scored")
            if step % 3 == 0 or step == len(values):
                begin = step
                die("written")
                scored.saved(Position(total_steps=step))
            die("saved")
    return begin


@pytest.mark.parametrize("place", ["keeping", "kept", "scored", "written", "saved"])
def test_after_a_kill_lines_and_best_are_those_of_the_steps_that_count(tmp_path, place):
    """Steps that come again may be scored otherwise: nothing of their first scores stays."""
    draws = random.Random(place)
    for trial in range(12):
        output = tmp_path / str(trial)
        first, again = ([draws.choice((0.1, 0.2, 0.3, 0.4, 0.5)) for _ in range(8)] for _ in range(2))
        again = draws.choice((first, again))
        saved = live(output, first, kill=(draws.randint(1, 8), place))
        live(output, again, begin=saved)
        values = first[:saved] + again[saved:]
        best = values.index(max(values)) + 1
        kept = read_kept(output)
        assert (kept.step, kept.value) == (best, values[best - 1])
        assert (output / BEST / "model.safetensors").read_text() == str(kept.value)
        lines = read_evaluations(output)
        assert [line["scores"]["likelihood"]["value"] for line in lines] == values
        assert [line["best"] for line in lines] == [
            value > max([0, *values[:step]]) for step, value in enumerate(values)
        ]
        assert not (output / BEFORE).exists()


def test_it_is_said_where_the_best_lies_and_whether_the_last_step_is_as_good_by_chance(tmp_path):
    live(tmp_path, [0.5, 0.9, 0.3])
    lines = read_evaluations(tmp_path)
    assert best_on_the_way(tmp_path, []) == (None, [])
    kept, (first, second) = best_on_the_way(tmp_path, lines)
    assert kept == read_kept(tmp_path)
    assert first.startswith(f"Best on the way: {tmp_path / BEST}, after step 2, by likelihood 0.900 (distill evaluate ")
    assert "step's 0.300 lies in the interval of that, [0.000, 1.000]" in second
    for low, high in ((0.31, 1), (0, 0.29), (0.3, 0.95)):
        lines[1]["scores"]["likelihood"].update(low=low, high=high)
        assert len(best_on_the_way(tmp_path, lines)[1]) == 1 + (low <= 0.3 <= high)
    assert len(best_on_the_way(tmp_path, lines[:2])[1]) == 1  # the last is the best


def test_a_best_student_of_steps_that_are_to_come_is_chosen_anew(tmp_path, caplog):
    """Its folder alone is there, or the newest checkpoint was damaged."""
    live(tmp_path, [0.5, 0.3, 0.9])
    (tmp_path / EVALUATIONS).unlink()
    with caplog.at_level("INFO"):
        live(tmp_path, [0.5, 0.3, 0.4])
    assert "best is of step 3, and the training goes on behind step 0" in caplog.text
    assert read_kept(tmp_path).step == 1
    assert [line["best"] for line in read_evaluations(tmp_path)] == [True, False, False]


def test_a_score_that_is_no_number_is_none(tmp_path, caplog):
    _, kept = reach_all(tmp_path, [0.1, float("nan"), 0.1, 0.2])
    assert [step for step, *_ in kept] == [4] == [line["step"] for line in read_evaluations(tmp_path)]
    assert "step 2: not scored: likelihood is no finite number" in caplog.text


def test_a_finished_training_says_that_nothing_is_left_to_be_scored(tmp_path, caplog):
    live(tmp_path, [0.1] * 3, begin=3)
    assert "this training is finished" in caplog.text
    assert not (tmp_path / EVALUATIONS).exists()
    caplog.clear()
    live(tmp_path, [0.1] * 4, begin=3)
    live(tmp_path, [0.1] * 4, begin=4)  # finished, and scored on the way
    assert not caplog.text


def test_damaged_lines_are_left_out_and_named_but_a_killed_ones_last(tmp_path, caplog):
    reach_all(tmp_path, [0.1, 0.2, 0.3, 0.4])
    whole = (tmp_path / EVALUATIONS).read_text()
    line = json.loads(whole.splitlines()[0])
    broken = [{**line, "step": 0}, {**line, "step": "2"}, {**line, "scores": {"likelihood": 3}}, {"step": 3}, [3], None]
    text = "".join(f"{json.dumps(entry)}\n" for entry in broken)
    (tmp_path / EVALUATIONS).write_text(text + whole + whole[:40])
    assert [found["step"] for found in read_evaluations(tmp_path)] == [2, 4]
    assert caplog.text.count("is damaged and left out") == len(broken)


def test_others_best_students_are_compared_only_where_they_were_scored_alike():
    one = Kept(step=2, by="likelihood", value=0.5, of="how", run="run")
    assert one.beats(None)
    assert one.beats(Kept(step=4, by="questions", value=0.9, of="otherwise", run="run"))
    assert not one.beats(Kept(step=4, by="likelihood", value=0.5, of="how", run="run"))


def test_a_folder_of_that_name_that_is_no_kept_student_is_not_touched(tmp_path):
    assert read_kept(tmp_path) is None
    (tmp_path / BEST).mkdir()
    (tmp_path / BEST / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no student that was kept.*move it away"):
        reach_all(tmp_path, [0.1, 0.2])
