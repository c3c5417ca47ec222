"""Samples longer than ``max_length``: refused, or cut as LLaVA's training code cuts them, at the same word for every student."""

from contextlib import suppress
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from test_encoding import PICTURE, TOKENIZERS, make_encoder, make_sample, square_processor

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import SampleError, TooLongError
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.text import encoding
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.special_tokens import read_texts
from vlm_distill_cache.data.text.templates import get_template

TURNS = [("what color is it?", "red"), ("where is the blue square?", "c2 r4 is it left"), ("yes, no", "a chat between")]
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content if m.content is string else m.content[-1].text }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def cutting(encoder, length, **more):
    return replace(encoder, max_length=length, long_samples="truncate", **more)


def llava_cut(whole, length):
    """Slow reference: the first tokens; then all that stands behind the last answer's last token is no use, and goes."""
    tokens = [
        (int(token), bool(index and whole.labels[index - 1] != IGNORE_INDEX))
        for index, token in enumerate(whole.input_ids)
    ]
    kept = tokens[:length]
    while kept and not kept[-1][1]:
        kept.pop()
    ids = [token for token, _ in kept]
    labels = [*[token if answer else IGNORE_INDEX for token, answer in kept][1:], IGNORE_INDEX]
    return ids, labels if kept else []


def encoder_of(name, template, **more):
    tokenizer = TOKENIZERS[name]
    if template == "chat":
        tokenizer.chat_template = CHAT
    return make_encoder(tokenizer, template, **more)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("template", "image"), [("short", True), ("vicuna_v1", True), ("vicuna_v1", False), ("chat", False)]
)
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.slow(quick=4)
def test_every_length_cuts_as_the_reference(name, template, image, independent):
    encoder = encoder_of(name, template)
    sample = make_sample(*TURNS, image=image, independent=independent)
    whole = encoder(sample)
    for length in range(7, len(whole) + 3):
        ids, labels = llava_cut(whole, length)
        if not ids:
            with pytest.raises(SampleError, match=rf"exceed max_length={length}; .*no answer begins before the limit"):
                cutting(encoder, length)(sample)
            continue
        cut = cutting(encoder, length)(sample)
        assert cut.input_ids.tolist() == ids
        assert cut.labels.tolist() == labels
        assert len(cut) <= length
        assert len(cut.supervised_rows) >= 1
        assert cut.labels[-1] == IGNORE_INDEX  # the last token is a target, and predicts none
        assert cut.labels[-2] == cut.input_ids[-1]
        for field in ("visual_mask", "position_ids", "segment_ids"):
            assert np.array_equal(getattr(cut, field), getattr(whole, field)[: len(cut)])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("grids", [((4, 6), (2, 3)), ((2, 3), (4, 6))])
@pytest.mark.slow(quick=1)
def test_a_student_with_other_visual_tokens_is_cut_at_the_same_word(name, independent, grids):
    teacher, student = (encoder_of(name, "vicuna_v1", grid=grid) for grid in grids)
    sample = make_sample(*TURNS, independent=independent)
    for length in range(60, len(teacher(sample)) + 2):
        try:
            seen = cutting(teacher, length)(sample)
        except SampleError:
            continue
        rows = seen.supervised_rows
        read = student(sample, rows=len(rows))
        assert read.labels[read.supervised_rows].tolist() == seen.labels[rows].tolist()
        assert read.input_ids[~read.visual_mask].tolist() == seen.input_ids[~seen.visual_mask].tolist()
        assert read.segment_ids[~read.visual_mask].tolist() == seen.segment_ids[~seen.visual_mask].tolist()


def test_what_fits_keeps_all_its_answers_and_loses_what_follows_the_last_only():
    encoder = encoder_of("byte", "chat")
    sample = make_sample(*TURNS, image=False)
    whole, cut = encoder(sample), cutting(encoder, 2048)(sample)
    assert len(whole) > len(cut)
    assert cut.input_ids.tolist() == whole.input_ids[: len(cut)].tolist()
    assert len(cut.supervised_rows) == len(whole.supervised_rows)


def test_positions_cut_a_conversation_and_refuse_packed_ones():
    encoder = encoder_of("byte", "short")
    sample = make_sample(*TURNS)
    whole = encoder(sample)
    cut = cutting(encoder, 2048, positions=len(whole) - 5)(sample)
    assert (cut.input_ids.tolist(), cut.labels.tolist()) == llava_cut(whole, len(whole) - 5)
    long = make_sample(("what color is it?", "red " * 60), ("yes, no", "no"), independent=True)
    with pytest.raises(TooLongError, match="is longer than the 50 positions"):
        cutting(encoder, 2048, positions=50)(long)


def test_a_student_that_knows_fewer_positions_than_the_cut_needs_refuses_the_sample():
    encoder = encoder_of("byte", "short")
    sample = make_sample(*TURNS)
    rows = len(encoder(sample).supervised_rows)
    with pytest.raises(TooLongError):
        replace(encoder, positions=40)(sample, rows=rows)
    assert len(replace(encoder, positions=60)(sample, rows=1)) <= 60


def test_a_prompt_is_never_cut():
    encoder = cutting(encoder_of("byte", "short"), 40)
    with pytest.raises(SampleError, match="exceed max_length=40"):
        build_prompt(encoder, PICTURE, "what color is the red circle? " * 30)


def test_refusing_is_what_happens_unless_asked_otherwise():
    encoder = encoder_of("byte", "short", max_length=40)
    with pytest.raises(SampleError, match=r"cut it at its end \(long_samples=truncate"):
        encoder(make_sample(*TURNS))
    plain = SampleEncoder(
        tokenizer=TOKENIZERS["byte"], image_encoder=ImageEncoder.from_processor(square_processor(), (2, 3)),
        template=get_template("short"), image_token_id=4, max_length=2048,
    )  # fmt: skip
    assert plain.long_samples == "refuse"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("independent", [False, True])
def test_what_is_far_too_long_is_refused_before_it_is_read_and_only_that(name, cuts, independent, monkeypatch):
    for limit, value in {"MAX_TURNS": 30, "TOKEN_TEXT": 4, "MAX_TOKEN_TEXT": 8}.items():
        monkeypatch.setattr(encoding, limit, value)
    encoder = encoder_of(name, "short")
    encoder = replace(encoder, max_length=100, long_samples="truncate" if cuts else "refuse")
    _ = encoder(make_sample(("a", "b")))
    for text, count in product((1, 5, 50, 1_000), (1, 8, 101)):
        sample = make_sample(*[("w" * text, "x" * text)] * count, independent=independent)
        read = []
        with monkeypatch.context() as patched:
            patched.setattr(encoding, "read_texts", lambda *given, read=read: read.append(given) or read_texts(*given))
            with suppress(SampleError):
                encoder(sample)
        far = count > 100 or (not cuts and 2 * text * count > 100 * encoding.MAX_TOKEN_TEXT)
        within = count <= 100 and (cuts or 2 * text * count <= 100 * encoding.TOKEN_TEXT)
        assert (not read) if far else (read or not within)
