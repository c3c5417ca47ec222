"""Students read the system prompts that the teacher read, in their own template too; one that cannot says so."""

import json

import numpy as np
import PIL.Image
import pytest
from tiny_families import save_tiny
from train_runs import make_config

from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.preparation import prepare

SYSTEM = "answer directly ."


@pytest.fixture(scope="module")
def systems(tmp_path_factory, tiny_llava):
    """Data whose every second sample has a system prompt, and a cache of it."""
    folder = tmp_path_factory.mktemp("systems")
    entries = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        talk = [{"role": "user", "content": "what color ?"}, {"role": "assistant", "content": "red"}]
        front = [{"role": "system", "content": SYSTEM}] if number % 2 else []
        entries.append({"id": f"s{number}", "image": f"{number}.png", "messages": front + talk})
    data, cache = folder / "data.json", folder / "cache"
    data.write_text(json.dumps(entries))
    extract(
        BuildConfig(cache=str(cache), data=str(data), teacher=str(tiny_llava), template="vicuna_v1", fidelity_samples=2)
    )
    return data, cache


def config_of(systems, output, **changes):
    data, cache = systems
    phase = {"steps": 2, "batch_size": 3, "losses": {"logits": 1.0}}
    return make_config(cache, output, data=str(data), phases=["dft"], dft=phase, **changes)


def test_a_student_reads_what_the_teacher_read_and_learns_answers_alone(tmp_path, systems):
    prepared = prepare(config_of(systems, tmp_path / "run"))
    dataset = prepared.phases[0].dataset
    for position, name in enumerate(dataset.sample_ids):
        encoded = dataset.load(position).encoded
        text = prepared.tokenizer.decode(encoded.input_ids)
        assert (SYSTEM in text) == bool(int(name[1:]) % 2)
        assert ("curious user" in text) != (SYSTEM in text)
        assert prepared.tokenizer.decode(encoded.labels[encoded.supervised_rows]).split() == ["red", "</s>"]
    train(config_of(systems, tmp_path / "run"))
    assert (tmp_path / "run").is_dir()


def test_questions_of_the_evaluation_keep_their_system_prompt(systems):
    items = open_evaluation(str(systems[0])).questions
    assert [item.system for item in items] == ["", SYSTEM] * 3


@pytest.mark.parametrize(("family", "template", "fails"), [("qwen2_vl", None, False), ("qwen2_vl", "short", True)])
def test_a_student_with_another_template_writes_it_in_its_own_way_or_says_that_it_cannot(
    tmp_path, systems, family, template, fails
):
    student = save_tiny(family, tmp_path / "student")
    phase = {"steps": 1, "batch_size": 2, "losses": {"lm": 1.0, "visual_columns": 0.0}}
    config = make_config(
        systems[1],
        tmp_path / "run",
        data=str(systems[0]),
        phases=["dft"],
        dft=phase,
        student=str(student),
        template=template,
    )
    if fails:
        with pytest.raises(CacheMismatchError, match=r"'short' has no place for a system prompt.*student's cannot"):
            prepare(config)
        return
    prepared = prepare(config)
    encoded = prepared.phases[0].dataset.load(1).encoded
    assert f"<|im_start|>system\n{SYSTEM}<|im_end|>" in prepared.tokenizer.decode(encoded.input_ids)
    assert open_dataset(str(systems[0]))[1].system == SYSTEM
