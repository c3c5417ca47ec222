"""`make experiment-several`: its teacher, its scores and its tables; a killed run goes on."""

import json
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.benchmarks import experiment_several as experiment
from tests.benchmarks.bench_docs import ROOT, TABLE_PAGE, table_in
from tests.benchmarks.experiment_several import STORED, Budget, Job, Place
from tests.benchmarks.experiment_several_tables import (
    ARMS,
    BEGIN,
    COLUMNS,
    CUT,
    END,
    GAZE,
    GROUPS,
    LOGITS,
    SEEDS,
    SFT,
    in_order,
    most_frequent,
    tables,
    verdict,
)
from tests.benchmarks.experiment_several_teacher import (
    KINDS,
    Drilled,
    as_sample,
    deepen,
    make_teacher,
    orthogonalised,
    score,
)
from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import FrameSampling
from vlm_distill_cache.data.shapes.text import PLURALS
from vlm_distill_cache.stage2_student.config import TrainConfig

ALL = [kind for group in GROUPS.values() for kind in group]


def result(arm, seed, value, **kinds):
    return {"arm": arm, "seed": seed, "scores": dict.fromkeys(ALL, value) | kinds}


def stored(*results):
    return {"teacher": dict.fromkeys(ALL, 90.0), "most_frequent": dict.fromkeys(ALL, 40.0), "results": list(results)}


def rows_of(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {(len(row), row[0]): row[1:] for row in lines}


def test_differences_are_paired_by_seed_and_words_follow_their_intervals():
    # Differences 2 and 4: mean 3, half-width 12.706 * sqrt(2) / sqrt(2). Of 3.0 and 3.2: 3.1 and 12.706 * 0.1.
    several = stored(
        result(LOGITS, 301, 50.0), result(LOGITS, 302, 60.0), result(GAZE, 301, 52.0), result(GAZE, 302, 64.0),
        result(COLUMNS, 301, 53.0), result(COLUMNS, 302, 63.2),
    )  # fmt: skip
    text = tables(several)
    assert "- answer_attention, motion: not told apart from logit KD (+3.0 ± 12.7 points)." in text
    assert "- visual_columns, motion: better than logit KD (+3.1 ± 1.3 points)." in text
    assert rows_of(text)[5, GAZE] == ["58.0 ± 76.2"] * 4
    assert rows_of(text)[5, SFT] == ["-"] * 4
    assert rows_of(text)[5, "most frequent answer of each kind"] == ["40.0"] * 4
    assert "worse than logit KD (-1.0 ± 0.0 points)" in verdict([-1.0, -1.0])
    assert "nothing is shown" in verdict([9.0])
    assert "nan" not in tables(stored(result(LOGITS, 301, 50.0))).replace("± nan", "")
    cut = stored(  # compared with students of one kind alone
        *(result(LOGITS, seed, 10.0) for seed in SEEDS[:2]), *(result(LOGITS + CUT, seed, 50.0) for seed in SEEDS[:2]),
        *(result(GAZE + CUT, seed, 60.0) for seed in SEEDS[:2]),
    )  # fmt: skip
    assert "- answer_attention, cut out, motion: better than logit KD (+10.0 ± 0.0 points)." in tables(cut)


def test_a_group_is_the_mean_of_its_kinds():
    name, kinds = "motion", GROUPS["motion"]
    (found,) = [rows_of(tables(stored(*(result(LOGITS, seed, 0.0, **{kinds[0]: 80.0}) for seed in SEEDS))))[5, LOGITS]]
    assert found[list(GROUPS).index(name)] == f"{80.0 / len(kinds):.1f} ± 0.0"
    assert found[0] == "0.0 ± 0.0"


def test_who_never_looks_has_the_most_frequent_answer_of_each_kind():
    items = open_evaluation("shapes:kinds=comparison+motion", "test", 10).questions
    for kind, share in most_frequent(items).items():
        answers = [item.answer for item in items if item.kind == kind]
        assert share == pytest.approx(100 * max(answers.count(one) for one in answers) / len(answers))
    assert set(most_frequent(items)) == set(ALL)


def test_right_answers_are_those_that_greedy_decoding_gives():
    from vlm_distill_cache.stage1_teacher.demo.teacher import build_demo_encoder, builtin_teacher_directory
    from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
    from vlm_distill_cache.stage2_student.scores.evaluate import evaluate_model

    teacher, encoder = Teacher(builtin_teacher_directory()), build_demo_encoder()
    items = open_evaluation("shapes", "test", 3)
    expected = evaluate_model(teacher.model, encoder, replace(items, pairs=()), letters=False, resamples=1).scores
    found = score(teacher.model, encoder, items.questions)
    assert 0 < sum(found.values()) < 100 * len(found)
    assert found == {kind: pytest.approx(100 * expected[f"questions/{kind}"].value, abs=0.01) for kind in found}


def test_an_item_is_asked_with_all_that_it_shows():
    items = open_evaluation("shapes:kinds=comparison+motion", "test", 1).questions
    assert Counter(len(as_sample(item).images) for item in items) == {2: 10, 1: 8}
    pair = as_sample(replace(items[0], places=(0, 4)))
    assert pair.images == (items[0].image, *items[0].further)
    assert pair.placed()[0].places == (0, 4)


def test_the_teacher_sees_drills_of_where_things_are_before_the_samples_own_turns():
    plain = open_dataset("shapes:images=24,seed=7,kinds=" + "+".join(KINDS))
    drilled = Drilled(plain, "places")
    for index in range(24):
        own, more = plain[index], drilled[index]
        assert more.turns[len(more.turns) - len(own.turns) :] == own.turns
        assert (len(more.turns) > len(own.turns)) == (own.independent_turns and index % 3 > 0)
        for turn in more.turns[: len(more.turns) - len(own.turns)]:
            noun, number = turn.question.removeprefix("where is the ").split(" in image ")
            medium = own.images[0] if own.videos else own.images[int(number) - 1]
            scene = medium.scenes()[int(number) - 1] if own.videos else medium.scene()
            assert [thing.cell_name for thing in scene.objects if thing.noun == noun] == [turn.answer]


def test_drills_of_comparisons_are_true_of_pairs_and_clips():
    """Held to what the scenes hold, object by object."""

    def named(scene, noun):
        (thing,) = [thing for thing in scene.objects if thing.noun == noun]
        return thing

    plain = open_dataset("shapes:images=96,seed=7,kinds=comparison+motion")
    drilled, seen = Drilled(plain, "comparisons"), Counter()
    for index in range(96):
        own, more = plain[index], drilled[index]
        assert set(own.turns) <= set(more.turns)
        if not own.independent_turns:
            assert more == own
            continue
        scenes = own.images[0].scenes() if own.videos else [image.scene() for image in own.images]
        for turn in more.turns:
            words = turn.question.split()
            if words[0] == "is" and words[1] == "there":
                kind, true = "there", " ".join(words[3:5]) in scenes[int(words[-1]) - 1].nouns
                expected = "yes" if true else "no"
            elif words[0] == "is":
                axis = "column" if "left" in words else "row"
                first, last = (named(scene, " ".join(words[2:4])) for scene in (scenes[0], scenes[-1]))
                rises = getattr(last, axis) > getattr(first, axis)
                kind, expected = "moved", {"column": ("right", "left"), "row": ("below", "above")}[axis][rises]
            elif words[:2] == ["which", "way"]:
                first, last = (named(scene, " ".join(words[4:6])) for scene in (scenes[0], scenes[-1]))
                ways = {(1, 0): "from left to right", (-1, 0): "from right to left"}
                ways |= {(0, 1): "from above to below", (0, -1): "from below to above"}
                moved = (np.sign(last.column - first.column), np.sign(last.row - first.row))
                kind, expected = "way", ways[tuple(int(step) for step in moved)]
            elif words[:2] == ["which", "image"]:
                shape = {plural: shape for shape, plural in PLURALS.items()}[words[-1]]
                counts = [sum(t.shape == shape for t in scene.objects) for scene in scenes]
                expected = "no image" if counts[0] == counts[1] else f"image {1 + counts.index(max(counts))}"
                kind = "more"
            elif words[:2] == ["how", "many"] and words[2] in PLURALS.values() and "image" in words:
                shape = {plural: shape for shape, plural in PLURALS.items()}[words[2]]
                counts = [sum(t.shape == shape for t in scene.objects) for scene in scenes]
                expected = str(sum(counts) if words[-1] == "together" else counts[int(words[-1]) - 1])
                kind = "count"
            elif words[:2] in (["what", "size"], ["what", "color"]):
                scene = scenes[int(words[-1]) - 1]
                kind, name = words[1], " ".join(words[4:-3])
                things = [t for t in scene.objects if name in (t.noun, t.shape)]
                assert len(things) == 1
                expected = getattr(things[0], kind)
            else:
                continue
            seen[kind] += 1
            assert turn.answer == expected, turn
    assert min(seen[kind] for kind in ("there", "moved", "way", "more", "count", "size", "color")) > 10


def test_the_teacher_is_trained_once_and_encodes_pairs_and_clips(tmp_path: Path):
    from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
    from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

    folder = tmp_path / "teacher"
    make_teacher(folder, steps=(1, 1), images_per_step=3)
    written = (folder / "training.json").stat().st_mtime_ns
    make_teacher(folder, steps=(1, 1), images_per_step=3)
    assert (folder / "training.json").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    teacher = Teacher(folder)
    encoder = build_encoder(teacher, template="short", max_length=experiment.LENGTH)
    encoder = replace(encoder, most_pictures=None, sampling=FrameSampling())
    items = open_evaluation("shapes:kinds=comparison+motion", "test", 1).questions
    assert score(teacher.model, encoder, [items[0], items[5]]).keys() == {items[0].kind, items[5].kind}


@pytest.mark.parametrize(("kill", "kept"), [(3, {"places-3.pt": 2}), (5, {"places-3.pt": 3, "comparisons-3.pt": 0})])
def test_a_killed_training_of_the_teacher_goes_on_to_the_same_weights(kill, kept, tmp_path: Path, monkeypatch):
    from vlm_distill_cache.stage1_teacher.demo import language

    monkeypatch.setattr(language, "SAVED_EVERY", 2)
    make_teacher(tmp_path / "whole", steps=(3, 3), images_per_step=2)
    collate, calls = language.collate, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == kill:
            raise KeyboardInterrupt
        return collate(*args)

    monkeypatch.setattr(language, "collate", killed)
    with pytest.raises(KeyboardInterrupt):
        make_teacher(tmp_path / "killed", steps=(3, 3), images_per_step=2)
    monkeypatch.setattr(language, "collate", collate)
    for name, steps in kept.items():
        if steps:
            assert torch.load(tmp_path / name, weights_only=True)["steps"] == steps
        else:
            assert not (tmp_path / name).exists()
    make_teacher(tmp_path / "killed", steps=(3, 3), images_per_step=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_layers_that_are_put_behind_change_nothing_at_first():
    from vlm_distill_cache.stage1_teacher.demo.teacher import build_demo_encoder, builtin_teacher_directory
    from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

    model, items = Teacher(builtin_teacher_directory()).model, open_evaluation("shapes", "test", 3).questions
    before = score(model, build_demo_encoder(), items)
    layers = len(model.model.language_model.layers)
    deepen(model, 2)
    assert len(model.model.language_model.layers) == model.config.text_config.num_hidden_layers == layers + 2
    assert score(model, build_demo_encoder(), items) == before


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_matrices_are_made_orthogonal_as_by_the_library_to_its_precision(shape: tuple[int, int]):
    from torch.optim import _muon

    how = ((_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C), _muon.DEFAULT_NS_STEPS, _muon.EPS)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, library = orthogonalised(matrix, *how), _muon._zeropower_via_newtonschulz(matrix, *how)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, library.float(), atol=0.03, rtol=0)
    assert torch.linalg.svdvals(ours).sub(1).abs().max() < 0.4


def test_what_is_done_is_not_run_again_and_seeds_come_outermost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked, written = [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiment_several"])
    for name in ("make_teacher", "build_cache", "cut_student"):
        monkeypatch.setattr(experiment, name, lambda *args, **options: None)
    monkeypatch.setattr(experiment, "items_of", lambda place: ())
    monkeypatch.setattr(experiment, "score_teacher", lambda place: dict.fromkeys(ALL, 90.0))
    monkeypatch.setattr(experiment, "most_frequent", lambda items: dict.fromkeys(ALL, 40.0))
    monkeypatch.setattr(experiment, "run", lambda place, waves, do, workers: asked.extend(waves) or [])
    monkeypatch.setattr(experiment, "write_stored", lambda found, path: written.append(path))
    monkeypatch.setattr(experiment, "write_page", lambda path, found: written.append(path))
    place = Place(Path("build/experiment-several"), Budget())
    place.root.mkdir(parents=True)
    done = [(LOGITS, 301, Budget()), (SFT, 302, Budget()), (GAZE, 301, Budget(steps=1))]
    lines = [json.dumps(result(arm, seed, 1.0) | {"budget": asdict(budget)}) + "\n" for arm, seed, budget in done]
    place.results.write_text("".join(lines) + '{"arm": "lo')  # a killed run left half a line
    experiment.main()
    every = [Job(arm, seed) for seed in SEEDS for arm in ARMS]
    assert asked == [[job for job in every if job not in (Job(LOGITS, 301), Job(SFT, 302))]]
    assert written == [STORED, Path("docs/results.md")]
    monkeypatch.setattr(sys, "argv", ["experiment_several", "--tiny", "--seeds", "1"])
    experiment.main()
    assert asked[1:] == [every[: len(ARMS)]]  # results of another budget do not count
    assert len(written) == 2


def test_the_options_of_all_arms_are_options_of_a_run():
    for arm, losses in ARMS.items():
        config_from_dict(TrainConfig, {"cache": "c", "output": "o", "dft": {"losses": losses}}, where=arm)


def test_the_tables_of_several_pictures_are_those_of_the_stored_results():
    found = json.loads(STORED.read_text())
    assert table_in((ROOT / TABLE_PAGE).read_text(), BEGIN, END) == tables(found)
    assert found["budget"] == asdict(Budget())
    assert found["results"] == in_order(found["results"])
