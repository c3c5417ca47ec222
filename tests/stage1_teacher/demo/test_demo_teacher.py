"""The built-in teacher: the shipped checkpoint is as good as its record says, and training one is safe."""

import itertools
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.data.builtin import load_image_processor, load_tokenizer
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import EvaluationSet, Sample, Turn
from vlm_distill_cache.data.shapes.dataset import SceneImage, ShapesDataset, shapes_evaluation
from vlm_distill_cache.data.shapes.text import PAIR_KINDS, QUESTION_KINDS
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage1_teacher.demo import teacher as demo_teacher
from vlm_distill_cache.stage1_teacher.demo.language import DRILLS, DrilledScenes, answer_loss
from vlm_distill_cache.stage1_teacher.demo.model import build_demo_model, split_parameters, warm_cosine
from vlm_distill_cache.stage1_teacher.demo.scoring import mean_accuracy, score_model
from vlm_distill_cache.stage1_teacher.demo.teacher import (
    DemoRecipe,
    build_demo_encoder,
    builtin_teacher_directory,
    demo_teacher_for,
    train_demo_teacher,
)
from vlm_distill_cache.stage1_teacher.demo.vision import (
    answer_labels,
    normalize_pictures,
    scene_batch,
    shift_and_mirror,
    tower_features,
)

TINY = DemoRecipe(
    width=32,
    vision_layers=1,
    layers=2,
    vision_steps=2,
    alignment_steps=2,
    language_steps=2,
    images_per_step=2,
)


@pytest.fixture(scope="module")
def teacher():
    return LlavaForConditionalGeneration.from_pretrained(builtin_teacher_directory(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoder():
    return build_demo_encoder()


# The shipped checkpoint --------------------------------------------------------------------------


def test_the_shipped_checkpoint_is_small_half_precision_and_complete():
    directory = builtin_teacher_directory()
    weights = directory / "model.safetensors"
    assert weights.stat().st_size <= 4 * 2**20
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118 no iterator
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llava"
    text = "USER: <image>\nwhere is the red circle ASSISTANT: c2 r4</s>"
    assert AutoTokenizer.from_pretrained(directory)(text) == load_tokenizer()(text)


def test_the_shipped_teacher_is_as_good_as_its_record(teacher, encoder):
    record = json.loads((builtin_teacher_directory() / "training.json").read_text())
    scores = score_model(teacher, encoder, shapes_evaluation("test", 60, seed=77))
    assert set(scores["pairs"]) == set(PAIR_KINDS)
    assert set(scores["questions"]) == set(QUESTION_KINDS)
    for part in ("pairs", "questions"):
        # 7 kinds of 60 items: one standard error of the mean is below 2 points.
        assert mean_accuracy(scores)[part] == pytest.approx(record["accuracy"]["mean"][part], abs=6)
    assert record["accuracy"]["mean"]["pairs"] > 95
    assert record["parameters"] == sum(p.numel() for p in teacher.parameters())


def test_every_patch_of_the_tower_sees_every_other(teacher, encoder):
    # The trial's tower was causal by mistake: the first patch must react to the last pixel.
    pixels = torch.from_numpy(encoder(ShapesDataset("test", 1)[0]).image_inputs["pixel_values"])
    changed = pixels.clone()
    changed[..., -12:, -12:] += 1
    with torch.no_grad():
        before, after = tower_features(teacher, pixels), tower_features(teacher, changed)
    assert bool(((before - after).abs().amax(-1) > 1e-6).all())


def test_tower_features_are_what_the_model_itself_projects(teacher, encoder):
    pixels = torch.from_numpy(encoder(ShapesDataset("test", 1)[0]).image_inputs["pixel_values"])
    with torch.no_grad():
        ours = teacher.model.multi_modal_projector(tower_features(teacher, pixels))
        theirs = teacher.get_image_features(pixel_values=pixels).pooler_output[0]
    torch.testing.assert_close(ours[0], theirs)


def test_scores_equal_those_of_each_conversation_alone(teacher, encoder):
    items = shapes_evaluation("validation", 3, seed=9)
    scores = score_model(teacher, encoder, items)
    alone = {"pairs": [], "questions": []}
    for pair in items.pairs:
        sums = []
        for caption in (pair.right, pair.wrong):
            turn = Turn(question="", answer=caption)
            encoded = encoder(Sample(sample_id="x", images=(pair.image,), turns=(turn,)))
            batch = collate([encoded], 0)
            with torch.no_grad():
                log_probs = teacher(**batch.model_inputs()).logits[0].log_softmax(-1)
            rows = batch.labels[0] >= 0
            sums.append(log_probs[rows].gather(1, batch.labels[0][rows][:, None]).sum())
        alone["pairs"].append(bool(sums[0] > sums[1]))
    for question in items.questions:
        one = score_model(teacher, encoder, EvaluationSet(questions=(question,)))
        alone["questions"].append(one["questions"][question.kind]["accuracy"] == 100)
    for part, hits in alone.items():
        expected = 100 * np.mean(hits)
        assert mean_accuracy(scores)[part] == pytest.approx(expected, abs=0.2), part


def test_greedy_generation_gives_the_answers_that_scoring_counts(teacher, encoder):
    image = SceneImage(split="test", seed=1, index=0)
    thing = image.scene().objects[0]
    text = f"USER: {'<image>' * 36}\nwhat size is the {thing.noun} ASSISTANT:"
    inputs = encoder.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    pixels = torch.from_numpy(encoder.image_encoder(image.load()).inputs["pixel_values"])
    made = teacher.generate(**inputs, pixel_values=pixels, max_new_tokens=4, do_sample=False)
    answer = encoder.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == thing.size


# Training ----------------------------------------------------------------------------------------


def test_training_writes_a_whole_directory_twice_the_same(tmp_path):
    records = [train_demo_teacher("shapes", tmp_path / name, seed=3, recipe=TINY, items=2) for name in "ab"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert records[0]["accuracy"] == records[1]["accuracy"]
    assert json.loads((tmp_path / "a" / "training.json").read_text()) == records[0]
    assert records[0]["command"] == "teacher-cache demo-teacher --data shapes --seed 3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "a")
    assert model.dtype == torch.float16


def test_training_that_dies_leaves_nothing(tmp_path, monkeypatch):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_teacher, "write_json_atomic", die)
    with pytest.raises(KeyboardInterrupt):
        train_demo_teacher("shapes", tmp_path / "t", recipe=TINY, items=1)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="exists; remove it"):
        train_demo_teacher("shapes", tmp_path, recipe=TINY)


def test_easy_vqa_starts_from_the_shipped_teacher(tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa")
    recipe = DemoRecipe(vision_steps=1, alignment_steps=0, language_steps=2, images_per_step=2)
    monkeypatch.setitem(demo_teacher.RECIPES, "easy-vqa", recipe)
    monkeypatch.setattr(demo_teacher, "TEST_ITEMS", 3)
    monkeypatch.setattr(demo_teacher, "open_dataset", partial(open_dataset, limit=20))
    made = demo_teacher_for("easy-vqa", tmp_path / "kept")
    record = json.loads((made / "training.json").read_text())
    assert record["accuracy"]["pairs"] == {}
    assert sum(kind["items"] for kind in record["accuracy"]["questions"].values()) == 30
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert demo_teacher_for("easy-vqa", tmp_path / "kept") == made  # kept, not trained again
    assert (made / "model.safetensors").stat().st_mtime_ns == before


def test_the_teacher_of_shapes_is_the_shipped_one_and_other_data_have_none(tmp_path):
    assert demo_teacher_for("shapes:images=30,seed=1", tmp_path / "unused") == builtin_teacher_directory()
    with pytest.raises(ConfigError, match=r"TEACHER=PATH.*shapes, easy-vqa"):
        demo_teacher_for("mine.json", tmp_path / "unused")


# Parts -------------------------------------------------------------------------------------------


def test_weights_start_with_the_scale_of_their_fan_in_and_the_seed_decides():
    tokenizer = load_tokenizer()
    model, same, other = (build_demo_model(tokenizer, seed=seed) for seed in (0, 0, 1))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and parameter.numel() > 5000:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                assert not parameter.any(), name
                continue
            fan_in = parameter[0].numel()
            assert parameter.std().item() == pytest.approx(fan_in**-0.5, rel=0.05), name
    assert torch.equal(model.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_every_trainable_parameter_is_optimised_once():
    model = build_demo_model(load_tokenizer(), seed=0)
    model.model.vision_tower.requires_grad_(False)
    matrices, others = split_parameters(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in matrices} | {id(p) for p in others} == {id(p) for p in trainable}
    assert len(matrices) + len(others) == len(trainable)
    assert all(p is not model.lm_head.weight for p in matrices)


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [warm_cosine(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] > 0.97
    assert rates[100] == pytest.approx(0, abs=1e-6)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_the_loss_weighs_an_answer_by_the_root_of_its_length():
    labels = torch.tensor([[-100, 1, 2, 3, 4, -100, 0, -100]])  # a four-token answer, a one-token answer
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    losses = torch.nn.functional.cross_entropy(logits, labels[labels >= 0], reduction="none")
    expected = (losses[:4].sum() / 2 + losses[4]) / (4 / 2 + 1)
    torch.testing.assert_close(answer_loss(logits, labels), expected)


def test_dense_labels_mark_the_cells_of_the_objects():
    pictures, labels = scene_batch("train", 0, 5, 3)
    assert pictures.shape == (3, 72, 72, 3)
    for place in range(3):
        objects = SceneImage(split="train", seed=0, index=5 + place).scene().objects
        assert int((labels[place, :, 0] > 0).sum()) == len(objects)
        for thing in objects:
            assert labels[place, thing.row * 6 + thing.column].min() >= 1


def test_batched_normalising_equals_the_image_processor():
    processor = load_image_processor()
    pictures, _ = scene_batch("train", 0, 0, 2)
    ours = normalize_pictures(pictures, processor.image_mean, processor.image_std)
    theirs = np.stack(processor([SceneImage(split="train", seed=0, index=i).load() for i in range(2)])["pixel_values"])
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)


@pytest.mark.parametrize("drill", DRILLS)
def test_drills_come_before_the_turns_of_the_data_set(drill):
    scenes = ShapesDataset("train", 5, seed=1)
    drilled = DrilledScenes(scenes, drill)
    assert drilled.sample_ids == scenes.sample_ids
    assert drilled.fingerprint() != scenes.fingerprint()
    for index in range(len(drilled)):
        turns = drilled[index].turns
        assert drilled[index] == drilled[index]
        assert len(set(turns)) == len(turns)
        assert set(scenes[index].turns) < set(turns)
        if drill == "locations":
            cells = [turn.answer for turn in turns if turn.question.startswith("where is")]
            assert sorted(cells) == sorted(thing.cell_name for thing in scenes.scene(index).objects)


def test_answer_labels_say_what_a_picture_shows_where_a_question_asks():
    dataset = ShapesDataset("train", 3, seed=0)
    turns = [
        (Turn(question="what shape is present?", answer="triangle"), Turn(question="is there?", answer="no")),
        (Turn(question="what color is the shape?", answer="teal"), Turn(question="what?", answer="circle")),
        (Turn(question="is there a circle?", answer="yes"),),
    ]
    samples = [replace(dataset[i], turns=asked) for i, asked in enumerate(turns)]
    assert answer_labels(samples).tolist() == [[2, -100], [0, 6], [-100, -100]]


def test_shifting_repeats_the_border_and_keeps_the_picture():
    pixels = torch.arange(5.0)[None, None, None, :].expand(20, 3, 4, 5)  # grows to the right
    moved = shift_and_mirror(pixels, torch.Generator().manual_seed(0), reach=2)
    assert moved.shape == pixels.shape
    rows = {tuple(row.tolist()) for row in moved[:, 0, 0]}
    shifts = {tuple(min(4, max(0, x + d)) for x in range(5)) for d in range(-2, 3)}
    assert rows <= shifts | {tuple(reversed(row)) for row in shifts}
    assert len(rows) > 4


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("RUN_SLOW") != "1", reason="minutes; set RUN_SLOW=1")
def test_retraining_reaches_the_recorded_accuracy(tmp_path: Path):
    shipped = json.loads((builtin_teacher_directory() / "training.json").read_text())
    made = train_demo_teacher("shapes", tmp_path / "again", seed=shipped["seed"])
    for part in ("pairs", "questions"):
        # Sums in another order (threads, processors) give another run: a few points apart at most.
        assert made["accuracy"]["mean"][part] == pytest.approx(shipped["accuracy"]["mean"][part], abs=4)
