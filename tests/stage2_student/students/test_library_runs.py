"""Whole runs of a library model as the student: trained, resumed from disk, scored, exported, shared vocabularies."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_check_cache import make_config
from tiny_cache import DATA
from tiny_families import save_tiny
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, ModelError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.builtin import load_image_processor, load_tokenizer
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.run import load_run_config, run
from vlm_distill_cache.stage2_student.scores.evaluate import evaluate_model
from vlm_distill_cache.stage2_student.students.library import LibraryStudent
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.trained_student import (
    comparable_signals,
    evaluate_student,
    export_student,
    join_cached,
    open_student,
)
from vlm_distill_cache.stage2_student.training.preparation import prepare

LOSSES = {"logits": 1.0, "answer_attention": 1.0, "visual_map": 1.0}


@pytest.fixture(scope="module")
def twin(tiny_cache, tmp_path_factory):
    """The cache's own teacher as a student's directory."""
    folder = tmp_path_factory.mktemp("twin") / "teacher"
    tiny_cache[1].model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    load_image_processor().save_pretrained(folder)
    return folder


def test_a_teacher_as_its_own_student_agrees_with_its_cache_and_has_no_loss(tiny_cache, twin):
    prepared = prepare(make_config(tiny_cache[0], student=str(twin), dft={"steps": 1, "losses": LOSSES}))
    phase, student = prepared.phases[0], prepared.student
    assert isinstance(student, LibraryStudent)
    assert prepared.encoder.image_encoder.to_dict() == open_cache(tiny_cache[0]).plan.geometry
    report = evaluate_model(student, prepared.encoder, _no_items(), cached=phase.dataset, batch_size=4)
    assert report.scores["teacher/top1"].value == 1.0
    assert report.scores["teacher/kl"].value == pytest.approx(0, abs=1e-5)
    assert report.scores["attention/cosine"].value == pytest.approx(1, abs=1e-5)
    assert report.scores["attention/kl"].value == pytest.approx(0, abs=1e-5)


def _no_items():
    from vlm_distill_cache.data.sample import EvaluationSet

    return EvaluationSet(pairs=(), questions=())


def test_training_moves_a_library_student_and_what_is_saved_is_what_was_trained(tiny_cache, tiny_llava, tmp_path):
    config = make_config(
        tiny_cache[0], tmp_path / "run", student=str(tiny_llava), device="cpu",
        phases=["dpt", "dft"], dpt={"steps": 2, "batch_size": 4, "trainable": "projector", "losses": {"logits": 1.0}},
        dft={"steps": 6, "batch_size": 4, "lr": 3e-3, "losses": LOSSES},
    )  # fmt: skip
    result = train(config)
    assert {"lm", "logits", "answer_attention", "visual_map"} <= result.log[-1].keys()
    assert result.log[-1]["logits"] < result.log[2]["logits"]
    before = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    after = LlavaForConditionalGeneration.from_pretrained(result.final)
    for name, value in before.state_dict().items():
        changed = not torch.equal(value, after.state_dict()[name])
        assert changed != (".vision_tower." in name), name
    student = open_student(result.final)
    batch = collate([result.preparation.phases[-1].dataset.load(0).encoded], 0)
    model = result.model.eval()
    with torch.no_grad():
        mine, saved = (m(**m.model_inputs(batch)).logits for m in (model, student.model))
    torch.testing.assert_close(mine, saved)
    assert student.encoder.image_encoder.to_dict() == result.preparation.encoder.image_encoder.to_dict()


def test_a_killed_training_of_a_library_student_ends_like_an_uninterrupted_one(tiny_cache, tiny_llava, tmp_path):
    def options(output):
        return make_config(
            tiny_cache[0], tmp_path / output, student=str(tiny_llava), device="cpu", checkpoint_every=2,
            dft={"steps": 4, "batch_size": 4, "losses": LOSSES},
        )  # fmt: skip

    class KilledError(Exception):
        pass

    def kill(position, _):
        if position.step == 3:
            raise KilledError

    whole = train(options("whole"))
    with pytest.raises(KilledError):
        train(options("killed"), after_step=kill)
    resumed = train(options("killed"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_a_run_scores_a_library_student_beside_its_baseline(tiny_cache, tiny_llava, tmp_path):
    fast = [
        "dpt.steps=1", "dft.steps=1", "sft.steps=1", "dpt.batch_size=4", "dft.batch_size=4", "sft.batch_size=4",
        "evaluation.limit=2", "evaluation.agreement_samples=4", "evaluation.overlays=1", "device=cpu",
    ]  # fmt: skip
    output = tmp_path / "run"
    config = load_run_config(
        None, [f"student='{tiny_llava}'", f"data='{DATA}'", f"output='{output}'", *fast], cache=tiny_cache[0]
    )
    done = run(config)
    for row in ("captions by likelihood", "questions", "KL(teacher", "attention, cosine"):
        assert row in done.table
    assert "letters/both_right" in json.loads((output / "evaluation.json").read_text())["distilled"]["scores"]
    assert "<svg" in done.report.read_text()
    exported = tmp_path / "small"
    export_student(output / "distilled" / "final", exported, dtype="bfloat16")
    model = LlavaForConditionalGeneration.from_pretrained(exported)
    assert model.dtype == torch.bfloat16
    assert {"tokenizer.json", "preprocessor_config.json"} <= {path.name for path in exported.iterdir()}


@pytest.mark.slow
def test_tokens_beyond_the_students_rows_are_tail_and_are_counted_and_reported(
    tiny_llava, build_cache, tmp_path, caplog
):
    """Padded vocabularies: the teacher has 16 rows more that no word belongs to, and says them often."""
    teacher = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    rows = teacher.get_output_embeddings().weight.shape[0]
    teacher.resize_token_embeddings(rows + 16, mean_resizing=False)
    teacher.save_pretrained(tmp_path / "teacher")
    load_tokenizer().save_pretrained(tmp_path / "teacher")
    load_image_processor().save_pretrained(tmp_path / "teacher")
    build_cache(tmp_path / "cache", teacher=str(tmp_path / "teacher"))
    config = make_config(
        tmp_path / "cache", tmp_path / "run", student=str(tiny_llava), data=None, device="cpu",
        dft={"epochs": 1, "batch_size": 4, "losses": {"logits": 1.0}},
    )  # fmt: skip
    result = train(config)
    cache, expected = open_cache(tmp_path / "cache"), np.zeros(2, dtype=np.int64)
    for phase in result.preparation.phases:
        for place in phase.shuffle.take(0, phase.steps * phase.config.batch_size) if phase.name != "sft" else ():
            ids = np.asarray(cache.read(phase.dataset.sample_ids[place])["token_ids"])
            expected += (len(ids), int((ids >= rows).sum()))
    assert expected[1] > 0
    counted = json.loads((result.final / "distillation.json").read_text())["vocabulary"]
    assert (counted["entries_read"], counted["entries_beyond"]) == tuple(expected)
    assert f"tokens beyond the student's {rows} output rows" in caplog.text
    assert all(np.isfinite(record["logits"]) and record["logits"] > 0 for record in result.log)


def test_a_student_of_other_tokens_is_scored_without_the_comparison(tiny_cache, tmp_path):
    folder = save_tiny("qwen2_vl", tmp_path / "qwen")
    config = make_config(
        tiny_cache[0], tmp_path / "run", student=str(folder), device="cpu", limit=2,
        dft={"steps": 1, "batch_size": 2, "losses": {"visual_columns": 1.0}},
        evaluation={"limit": 2, "letters": False},
    )  # fmt: skip
    student = open_student(train(config).final)
    cache = open_cache(tiny_cache[0])
    assert comparable_signals(student, cache) == []
    assert join_cached(student, config, cache, limit=2) is None
    scores = evaluate_student(student, config, cache).scores
    assert {"likelihood", "questions"} <= scores.keys()
    assert not any(name.startswith(("teacher/", "attention/")) for name in scores)


def test_conversations_packed_behind_one_picture_are_refused_by_a_student_that_would_mix_them(tiny_cache, tmp_path):
    folder = save_tiny("paligemma", tmp_path / "paligemma")
    options = {"student": str(folder), "template": "short", "dft": {"steps": 1, "losses": {"lm": 1.0}}}
    with pytest.raises(ModelError, match=r"student .*paligemma: .*give them as samples of their own"):
        prepare(make_config(tiny_cache[0], **options))
    with pytest.raises(CacheMismatchError, match=r"see the whole prompt.*use answer_attention"):
        prepare(make_config(tiny_cache[0], **options | {"dft": {"steps": 1, "losses": {"visual_map": 1.0}}}))


def test_options_of_our_own_projectors_are_refused_for_a_library_student(tiny_cache, tiny_llava):
    with pytest.raises(ConfigError, match=r"projector=taf.*projector of its own; leave both unset"):
        prepare(make_config(tiny_cache[0], student=str(tiny_llava), projector="taf"))
    with pytest.raises(ConfigError, match="neither a known student"):
        prepare(make_config(tiny_cache[0], student="nowhere"))
    assert config_from_dict(TrainConfig, {"cache": "c", "output": "o"}).student == "mobilevlm"


def test_a_student_is_trained_on_what_it_has_positions_for(tiny_cache, tiny_llava, tmp_path, caplog):
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "student"))

    def config(positions):
        stored = json.loads((folder / "config.json").read_text())
        stored["text_config"]["max_position_embeddings"] = positions
        (folder / "config.json").write_text(json.dumps(stored))
        return make_config(
            tiny_cache[0], tmp_path / f"run-{positions}", student=str(folder), device="cpu",
            dft={"steps": 2, "batch_size": 4, "losses": LOSSES},
        )  # fmt: skip

    dataset = prepare(config(4096)).phases[0].dataset
    lengths = [int(dataset.load(position).encoded.position_ids.max()) + 1 for position in range(len(dataset))]
    result = train(config(max(lengths) - 1))
    left = result.preparation.phases[0].dataset.left_out
    assert len(left) == lengths.count(max(lengths))
    assert "are not trained on; the first: sample" in caplog.text
    student = open_student(result.final)
    assert student.encoder.positions == max(lengths) - 1
