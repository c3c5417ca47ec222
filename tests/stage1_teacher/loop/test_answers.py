"""Answers that the teacher writes: they are what it would say on its own, and all that is cached belongs to them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.checks import value_damage
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, DataError, ModelError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.select import Selection, pull_partial
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.encoding import build_prompt
from vlm_distill_cache.data.text.generation import Sampling, generate_answers
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

DATA = "shapes:images=6"


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(builtin_teacher_directory())


def build(cache: Path, *, overwrite: bool = False, **options):
    settings = {
        "data": DATA, "answers": "generate", "max_new_tokens": 40, "batch_size": 4, "shard_size": 4, "threads": 1,
        "fidelity_samples": 2, "max_failed_share": 1.0, "limit": 6, **options,
    }  # fmt: skip
    return extract(BuildConfig(cache=str(cache), **settings), overwrite=overwrite)


@pytest.fixture(scope="module")
def greedy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("answers") / "cache"
    build(path)
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def answers_of(path: Path) -> dict[str, tuple[str, ...]]:
    cache = open_cache(path)
    codec = codec_from_dict(cache.plan.signals["answers"])
    return {name: codec.decode(cache.read(name)) for name in cache.sample_ids}


def write_own_answer(teacher: Teacher, encoder, sample: Sample, turn: int, earlier: tuple[str, ...]) -> str:
    """One prompt alone, through the library's own `generate`."""
    turns = [Turn(question=t.question, answer=a) for t, a in zip(sample.turns, earlier, strict=False)]
    asked = Sample(
        sample_id="s", images=sample.images,
        turns=(*turns, Turn(question=sample.turns[turn].question, answer="x")),
    )  # fmt: skip
    prompt = encoder(asked, prompt_only=True)
    ids = torch.from_numpy(prompt.input_ids)[None]
    made = teacher.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40,
        pixel_values=torch.from_numpy(prompt.image_inputs["pixel_values"]),
        eos_token_id=teacher.tokenizer.eos_token_id, pad_token_id=teacher.pad_token_id,
    )  # fmt: skip
    return teacher.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_answers_are_those_of_each_prompt_alone(greedy: Path, teacher: Teacher):
    assert isinstance(teacher.model, LlavaForConditionalGeneration)
    dataset = open_dataset(DATA, split="train", limit=6)
    encoder = build_encoder(teacher, template="auto", max_length=2048)
    written = answers_of(greedy)
    assert written
    for position, name in enumerate(dataset.sample_ids):
        sample = dataset[position]
        if name in written:
            assert sample.independent_turns
            for turn, answer in enumerate(written[name]):
                alone = Sample(sample_id="s", images=sample.images, turns=(sample.turns[turn],))
                assert answer == write_own_answer(teacher, encoder, alone, 0, ())


def test_cached_rows_belong_to_the_written_answers_and_a_greedy_label_is_the_likeliest_token(
    greedy: Path, teacher: Teacher
):
    cache = open_cache(greedy)
    logits = codec_from_dict(cache.plan.signals["logits"])
    for name, answers in answers_of(greedy).items():
        record = cache.read(name)
        words = teacher.tokenizer.decode(record["labels"].astype(np.int64), skip_special_tokens=True)
        assert words.split() == " ".join(answers).split()
        decoded = as_tensors(logits.decode(record))
        labels = torch.from_numpy(record["labels"].astype(np.int64))
        # Scoring and writing differ by rounding: a tie may fall either way.
        assert float((decoded.token_ids[:, 0] == labels).float().mean()) > 0.99
        assert len(decoded) == len(labels)
    assert verify(greedy, deep=True) == []
    assert cache.manifest.fidelity is not None
    assert cache.manifest.fidelity["samples"] == 2


def test_a_later_prompt_holds_the_teachers_own_earlier_answers(tmp_path: Path, teacher: Teacher):
    source = open_dataset(DATA, split="train", limit=1)[0]
    source.images[0].load().save(tmp_path / "a.png")
    asked = [turn.question for turn in source.turns[:3]]
    said = [m for q in asked for m in ({"from": "human", "value": q}, {"from": "gpt", "value": "a lie"})]
    said[0]["value"] = "<image>\n" + said[0]["value"]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "one", "image": "a.png", "conversations": said}]))
    build(tmp_path / "cache", data=str(path), teacher=str(builtin_teacher_directory()), limit=0)
    answers = answers_of(tmp_path / "cache")["one"]
    sample = open_dataset(str(path), split="train")[0]
    encoder = build_encoder(teacher, template="auto", max_length=2048)
    assert len(answers) == 3
    for turn, answer in enumerate(answers):
        assert answer == write_own_answer(teacher, encoder, sample, turn, answers[:turn])


@pytest.mark.slow
def test_sampled_answers_follow_the_seed_and_nothing_else(tmp_path: Path):
    drawn = {"answer_temperature": 2.0, "answer_top_p": 0.95, "answer_seed": 5}
    build(tmp_path / "whole", **drawn)
    torch.manual_seed(99)
    torch.rand(7)
    build(tmp_path / "again", **drawn)
    first_shard = sorted((tmp_path / "again" / "shards").glob("00000*"))
    (tmp_path / "again" / "manifest.json").unlink()
    next(path for path in first_shard if path.suffix == ".json").unlink()
    build(tmp_path / "again", **drawn)  # the first shard alone, as after a kill
    assert tree(tmp_path / "whole") == tree(tmp_path / "again")
    build(tmp_path / "other", **{**drawn, "answer_seed": 6})
    assert answers_of(tmp_path / "whole") != answers_of(tmp_path / "other")


def test_another_way_of_writing_answers_does_not_go_on_with_a_cache(greedy: Path):
    for options in ({"answer_seed": 3}, {"max_new_tokens": 41}, {"answers": "data"}):
        with pytest.raises(CacheMismatchError, match=r"answers|max_new_tokens|seed"):
            build(greedy, **options)


def test_an_answer_without_an_end_is_a_recorded_failure_that_names_the_remedy(tmp_path: Path):
    with pytest.raises(DataError, match=r"6 x, e\.g\. .* has no end within 1 tokens; raise max_new_tokens"):
        build(tmp_path / "cache", max_new_tokens=1)
    assert [len(read_sidecar(tmp_path / "cache", shard).failed) for shard in range(2)] == [4, 2]


def test_a_part_of_the_signals_keeps_the_answers(greedy: Path, tmp_path: Path):
    pull_partial(greedy, tmp_path / "part", Selection(signals=("logits",)))
    assert answers_of(tmp_path / "part") == answers_of(greedy)
    assert set(open_cache(tmp_path / "part").plan.signals) == {"answers", "logits"}


@pytest.mark.parametrize("answers", [(), ("a",), ("", "caf\u00e9 \U0001f642", '"quoted"\nline'), ("x" * 10_000,)])
def test_answers_survive_the_codec(answers: tuple[str, ...]):
    codec = AnswersCodec(max_new_tokens=5)
    assert codec.decode(codec.encode(answers)) == answers
    assert AnswersCodec.from_dict(codec.to_dict()) == codec


@pytest.mark.parametrize("text", [b"[]", b'["red",""]', b'["red"', b'{"a":"red"}'])
def test_verify_finds_text_that_no_teacher_wrote(greedy: Path, text: bytes):
    cache = open_cache(greedy)
    record = cache.read(cache.sample_ids[0])
    assert list(value_damage(record, cache.plan)) == []
    wrong = list(value_damage(record | {"answer_text": np.frombuffer(text, dtype="u1")}, cache.plan))
    assert any("answer_text" in line for line in wrong)


@pytest.mark.parametrize("damaged", [b"", b"[1]", b'{"a": 1}', b"\xff\xfe", b'["a"', b"[" * 100_000])
def test_bytes_that_are_no_answers_are_damage(damaged: bytes):
    with pytest.raises(CacheFormatError, match="cachectl verify"):
        AnswersCodec(max_new_tokens=5).decode({"answer_text": np.frombuffer(damaged, dtype="u1")})


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}]
)
def test_impossible_ways_of_writing_are_refused(settings):
    with pytest.raises(ConfigError, match="expected"):
        AnswersCodec(**{"max_new_tokens": 5, **settings})


def test_prompts_stop_before_the_last_answer(teacher: Teacher):
    encoder = build_encoder(teacher, template="auto", max_length=512)
    image = open_dataset(DATA, split="train", limit=1)[0].images[0]
    turns = (Turn(question="what color is it ?", answer="red"), Turn(question="where ?", answer="left"))
    both = encoder(Sample(sample_id="s", images=(image,), turns=turns), prompt_only=True)
    first = build_prompt(encoder, image, "what color is it ?")
    assert np.array_equal(both.input_ids[: len(first)], first.input_ids)
    text = teacher.tokenizer.decode(both.input_ids[len(first) :])
    assert "red" in text
    assert "left" not in text


@pytest.mark.slow
def test_a_checkpoints_generation_settings_do_not_decide_the_answers(greedy: Path, tmp_path: Path):
    """They are in no plan and no fingerprint; a greedy answer is the likeliest token of each row."""
    for name in ("suppress", "stop"):
        shutil.copytree(builtin_teacher_directory(), tmp_path / name)
    words = Teacher(builtin_teacher_directory()).tokenizer.convert_tokens_to_ids(["a", "circle", "left", "red"])
    (tmp_path / "suppress" / "generation_config.json").write_text(
        json.dumps({"suppress_tokens": words, "repetition_penalty": 3.0, "min_new_tokens": 5, "max_time": 1e-9})
    )
    (tmp_path / "stop" / "generation_config.json").write_text(json.dumps({"stop_strings": ["a"]}))
    for name in ("suppress", "stop"):
        build(tmp_path / f"{name}-cache", teacher=str(tmp_path / name), fidelity_samples=0)
        assert answers_of(tmp_path / f"{name}-cache") == answers_of(greedy)


def test_a_prompt_whose_logits_are_no_numbers_fails_alone(teacher: Teacher):
    encoder = build_encoder(teacher, template="auto", max_length=512)
    image = open_dataset(DATA, split="train", limit=1)[0].images[0]
    prompts = [build_prompt(encoder, image, question) for question in ("what color is it ?", "where is it ?")]
    head = teacher.model.get_output_embeddings()

    def spoil(module, inputs, output):
        output = output.clone()
        output[1] = float("nan")
        return output

    settings = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.0, top_p=0.9, seed=3)}
    sound = generate_answers(teacher.model, encoder, prompts[:1], max_new_tokens=12)
    handle = head.register_forward_hook(spoil)
    try:
        made = generate_answers(teacher.model, encoder, prompts, **settings)
        greedy_made = generate_answers(teacher.model, encoder, prompts, max_new_tokens=12)
    finally:
        handle.remove()
    assert made.finite == greedy_made.finite == (True, False)
    assert greedy_made.texts[0] == sound.texts[0]


def test_a_prompt_that_the_teacher_cannot_read_fails_alone(tmp_path: Path, monkeypatch):
    from vlm_distill_cache.stage1_teacher.loop import answers

    healthy, bad = answers.generate_answers, open_dataset(DATA).sample_ids[2]

    def picky(model, encoder, prompts, **options):
        if bad in [prompt.sample_id for prompt in prompts]:
            raise IndexError("a strange prompt")
        return healthy(model, encoder, prompts, **options)

    monkeypatch.setattr(answers, "generate_answers", picky)
    build(tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert f"cannot read sample {bad!r}: a strange prompt" in cache.failed[bad]
    assert len(cache) > 0

    def broken(*_, **__):
        raise IndexError("strange weights")

    monkeypatch.setattr(answers, "generate_answers", broken)
    with pytest.raises(ModelError, match=r"cannot read sample .*: strange weights"):
        build(tmp_path / "other")
