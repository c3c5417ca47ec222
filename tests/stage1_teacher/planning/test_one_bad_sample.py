"""What depends on a sample is that sample's recorded failure; what does not ends the build before the first one."""

import json
import logging
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from family_caches import build, entry, write_data
from tiny_families import QWEN_CHAT, TEXT, save_tiny

from vlm_distill_cache.common.errors import ConfigError, ModelError, SampleError
from vlm_distill_cache.data.families.inputs import known_positions
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.planning.open import open_build

# Takes the reasoning out of all answers but the last, as published templates do.
THINKING = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{{ '<|im_start|>user\n' }}{%- for c in m.content -%}{%- if c.type == 'image' -%}"
    "<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ c.text }}{%- endif -%}{%- endfor -%}{{ '<|im_end|>\n' }}"
    "{%- else -%}{%- set text = m.content[0].text -%}{%- set why = '' -%}{%- if '</think>' in text -%}"
    "{%- set why = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if why and loop.index0 > ns.last -%}{{ '<think>\n' + why + '\n</think>\n\n' }}{%- endif -%}"
    "{{ text + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
THOUGHT = "<think>\nI look at it.\n</think>\n\n"


def talk(name, image, *pairs):
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}" if image else turns[0]["value"]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


def write_entries(folder: Path, *more):
    """The data of all families with further entries."""
    path = write_data(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) + list(more)))
    return path


def with_template(folder: Path, source: str) -> Path:
    (folder / "chat_template.jinja").write_text(source)
    return folder


def decoded(cache, name, tokenizer):
    return tokenizer.decode(np.asarray(cache.read(name)["labels"]).astype(np.int64))


def test_a_template_that_takes_reasoning_out_of_earlier_turns_is_cached_as_the_model_sees_it(tmp_path: Path):
    from vlm_distill_cache.data.text.processors import load_tokenizer

    teacher = with_template(save_tiny("qwen3_vl", tmp_path / "teacher"), THINKING)
    data = write_entries(
        tmp_path / "data",
        talk("both", "0.png", ("what?", THOUGHT + "red"), ("where?", "left")),
        talk("one", "1.png", ("what?", THOUGHT + "red")),
        talk("last", None, ("what?", "red"), ("where?", THOUGHT + "left")),
    )
    cache = build(teacher, data, tmp_path / "cache", signals=("logits",))
    assert not cache.failed
    tokenizer = load_tokenizer(teacher)
    assert decoded(cache, "both", tokenizer) == "red<|im_end|>left<|im_end|>"
    assert decoded(cache, "one", tokenizer) == f"{THOUGHT}red<|im_end|>"
    assert decoded(cache, "last", tokenizer) == f"red<|im_end|>{THOUGHT}left<|im_end|>"


def test_texts_that_the_template_cannot_write_fail_alone_and_are_named(tmp_path: Path):
    source = QWEN_CHAT.replace(
        "{{ c.text }}", "{% if 'odd' in c.text %}{{ raise_exception('odd text') }}{% endif %}{{ c.text }}"
    )
    teacher = with_template(save_tiny("qwen2_vl", tmp_path / "teacher"), source)
    data = write_entries(tmp_path / "data", talk("odd one", "0.png", ("what?", "odd")))
    cache = build(teacher, data, tmp_path / "cache", signals=("logits",), max_failed_share=0.5)
    assert list(cache.failed) == ["odd one"]
    assert "odd text" in cache.failed["odd one"]
    assert len(cache) == 10


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow(quick=("0",))
def test_more_tokens_than_positions_are_a_recorded_failure_whatever_the_longest_sequence_is(
    tmp_path: Path, caplog, workers
):
    teacher = save_tiny("llava", tmp_path / "teacher")
    assert TEXT["max_position_embeddings"] == 1024
    long = talk("long", "0.png", ("what?", "a" * 1100))
    fits = talk("fits", "0.png", ("what?", "a" * 700))
    data = write_entries(tmp_path / "data", long, fits)
    for max_length in (0, 1500, 2048):  # the last is what 0 stands for, and what the file of options of `extend` says
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            cache = build(
                teacher, data, tmp_path / f"cache-{max_length}", signals=("logits",), max_failed_share=0.5,
                max_length=max_length, num_workers=workers,
            )  # fmt: skip
        assert list(cache.failed) == ["long"]
        assert "tokens (9 visual) is longer than the 1024 positions" in cache.failed["long"]
        assert "shorten the conversation" in cache.failed["long"]
        assert caplog.text.count("max_length=1500 is above the 1024 positions") == (max_length == 1500)
        assert "2048" not in caplog.text


def test_packed_conversations_count_each_for_itself(tmp_path: Path):
    work = open_build(
        BuildConfig(
            teacher=str(save_tiny("llava", tmp_path / "t")), data="shapes:images=2", cache=str(tmp_path / "c"),
            signals=("logits",), batch_size=2,
        )
    )  # fmt: skip
    encoded = work.encoder(work.dataset[0])
    assert encoded.is_packed
    longest = int(encoded.position_ids.max()) + 1
    assert longest < len(encoded)
    parts = {name: getattr(work.encoder, name) for name in ("tokenizer", "image_encoder", "template", "image_token_id")}
    SampleEncoder(**parts, max_length=4096, positions=longest)(work.dataset[0])
    with pytest.raises(SampleError, match=f"a conversation of {longest} tokens .* the {longest - 1} positions"):
        SampleEncoder(**parts, max_length=4096, positions=longest - 1)(work.dataset[0])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 1024),
        (
            {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "yarn", "factor": 4.0,
             "original_max_position_embeddings": 512}}, 2048,
        ),
        (
            {"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "llama3", "factor": 8.0,
             "original_max_position_embeddings": 64}}, 4096,
        ),
        (
            {"max_position_embeddings": 4096, "rope_parameters": {"full_attention": {"rope_type": "linear",
             "factor": 8.0}}}, 4096,
        ),
    ],
)  # fmt: skip
def test_positions_are_what_the_configuration_says(settings, expected):
    from types import SimpleNamespace

    text = SimpleNamespace(**settings)
    assert known_positions(SimpleNamespace(get_text_config=lambda: text)) == expected


def test_positions_that_are_no_number_are_refused_by_name():
    from types import SimpleNamespace

    text = SimpleNamespace(max_position_embeddings="many")
    with pytest.raises(ModelError, match=r"config\.json: max_position_embeddings is 'many'"):
        known_positions(SimpleNamespace(get_text_config=lambda: text))


def test_a_packed_sample_among_others_fails_alone_where_a_family_cannot_pack(tmp_path: Path, monkeypatch):
    from dataclasses import replace

    from vlm_distill_cache.data.sample import Dataset, Turn
    from vlm_distill_cache.stage1_teacher.planning import open as opening

    teacher, data = save_tiny("paligemma", tmp_path / "teacher"), write_data(tmp_path / "data")
    open_dataset = opening.open_dataset

    class WithPacked(Dataset):
        def __init__(self, rest):
            self.rest, self.name, self.sample_ids = rest, rest.name, rest.sample_ids

        def __len__(self):
            return len(self.rest)

        def __getitem__(self, index):
            sample = self.rest[index]
            turns = (Turn(question="a", answer="b"), Turn(question="c", answer="d"))
            return replace(sample, turns=turns, independent_turns=True) if sample.sample_id == "s0" else sample

        def image_keys(self):
            return self.rest.image_keys()

        def fingerprint(self):
            return self.rest.fingerprint()

    monkeypatch.setattr(opening, "open_dataset", lambda *a, **k: WithPacked(open_dataset(*a, **k)))
    cache = build(teacher, data, tmp_path / "cache", signals=("logits",), max_failed_share=0.5)
    assert list(cache.failed) == ["s0"]
    assert "this family's visual tokens see the question" in cache.failed["s0"]


@pytest.mark.parametrize("where", ["prepare", "run"])
@pytest.mark.parametrize("names", [("s3",), ("s3", "again", "text")])
def test_what_the_model_cannot_read_fails_alone_if_it_can_read_others(tmp_path: Path, monkeypatch, names, where):
    teacher, data = save_tiny("llava", tmp_path / "teacher"), write_data(tmp_path / "data")
    healthy = getattr(Build, where)

    def picky(self, batch, *rest):
        if set(names) & set(batch.sample_ids):
            raise ValueError("a strange picture")
        return healthy(self, batch, *rest)

    monkeypatch.setattr(Build, where, picky)
    cache = build(teacher, data, tmp_path / "cache", signals=("logits",), max_failed_share=0.5, shard_size=4)
    assert sorted(cache.failed) == sorted(names)
    assert all(f"cannot read sample {name!r}: a strange picture" in cache.failed[name] for name in names)


def test_a_model_that_can_read_nothing_ends_the_build_and_names_a_sample(tmp_path: Path, monkeypatch):
    def broken(self, batch, *rest):
        raise ValueError("sizes differ")

    monkeypatch.setattr(Build, "run", broken)
    with pytest.raises(ModelError, match=r"cannot read sample '\w+': sizes differ"):
        build(
            save_tiny("llava", tmp_path / "teacher"), write_data(tmp_path / "data"), tmp_path / "cache",
            signals=("logits",), max_failed_share=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: lost"), KeyError("x")])
def test_other_errors_end_the_build_with_the_names_of_the_batch(tmp_path: Path, monkeypatch, error):
    def broken(self, batch, *rest):
        raise error

    monkeypatch.setattr(Build, "run", broken)
    with pytest.raises(type(error)) as caught:
        build(
            save_tiny("llava", tmp_path / "teacher"), write_data(tmp_path / "data"), tmp_path / "cache",
            signals=("logits",), max_failed_share=1.0,
        )  # fmt: skip
    assert any("with samples 's" in note for note in caught.value.__notes__)


def test_hidden_states_too_large_for_their_dtype_fail_their_sample_alone(tmp_path: Path, monkeypatch):
    teacher, data = save_tiny("llava", tmp_path / "teacher"), write_data(tmp_path / "data")
    healthy = Build.run

    def hot(self, batch, inputs=None):
        found = dict(healthy(self, batch, inputs))
        found["hidden"] = found["hidden"].clone()
        for index, name in enumerate(batch.sample_ids):
            if name == "s2":
                found["hidden"][index, 0] = 1e6
        return found

    monkeypatch.setattr(Build, "run", hot)
    cache = build(
        teacher, data, tmp_path / "cache", signals=("logits", "hidden"), max_failed_share=0.5, fidelity_samples=0
    )
    assert list(cache.failed) == ["s2"]
    assert "too large for float16; set hidden_dtype=f4" in cache.failed["s2"]


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("x"), IndexError("y")])
def test_a_picture_that_the_library_cannot_prepare_fails_alone(tmp_path: Path, monkeypatch, error):
    teacher, data = save_tiny("smolvlm", tmp_path / "teacher"), write_data(tmp_path / "data")
    from transformers.models.smolvlm import image_processing_pil_smolvlm as library

    healthy = library.SmolVLMImageProcessorPil._preprocess

    def fails(self, images, *args, **kwargs):
        if images[0][0].shape[1:] == (60, 24):
            raise error
        return healthy(self, images, *args, **kwargs)

    monkeypatch.setattr(library.SmolVLMImageProcessorPil, "_preprocess", fails)
    cache = build(teacher, data, tmp_path / "cache", signals=("logits",), max_failed_share=0.5)
    assert list(cache.failed) == ["s1"]
    assert "24 x 60 pixels" in cache.failed["s1"]


def test_a_text_that_makes_the_tokenizer_panic_fails_alone(tmp_path: Path, monkeypatch):
    class PanicException(BaseException):
        pass

    work = open_build(
        BuildConfig(
            teacher=str(save_tiny("llava", tmp_path / "t")), data=str(write_data(tmp_path / "d")),
            cache=str(tmp_path / "c"), signals=("logits",), batch_size=2,
        )
    )  # fmt: skip
    kind = type(work.encoder.tokenizer)
    healthy = kind.__call__

    def panics(self, text, **options):
        if any("red" in one for one in text):
            raise PanicException("index out of bounds")
        return healthy(self, text, **options)

    monkeypatch.setattr(kind, "__call__", panics)
    with pytest.raises(SampleError, match="sample 'again': the tokenizer cannot read its text: index out of bounds"):
        work.encoder(work.dataset[8])
    work.encoder(work.dataset[0])


def test_a_tokenizer_that_cannot_write_a_plain_conversation_is_refused_before_the_first_sample(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"chat template fails|cannot be located"):
        open_build(
            BuildConfig(
                teacher=str(with_template(save_tiny("qwen2_vl", tmp_path / "t"), "{{ messages[99].x.y }}")),
                data=str(write_data(tmp_path / "d")), cache=str(tmp_path / "c"), signals=("logits",), batch_size=2,
            )
        )  # fmt: skip


def test_an_entry_of_one_pixel_and_a_strip_are_told_from_the_rest(tmp_path: Path):
    """Qwen's processor refuses what is 200 times as long as wide."""
    folder = tmp_path / "data"
    data = write_entries(folder, entry("strip", "strip.png", "<image>\nwhat?", "red"))
    PIL.Image.new("RGB", (600, 2), (9, 9, 9)).save(folder / "strip.png")
    cache = build(
        save_tiny("qwen2_vl", tmp_path / "t"), data, tmp_path / "c", signals=("logits",), max_failed_share=0.5
    )
    assert list(cache.failed) == ["strip"]
