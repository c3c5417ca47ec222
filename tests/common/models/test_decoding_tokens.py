"""Decoding with some visual tokens: steps through a cache of slots against whole passes with what is out of reach masked."""

import copy

import numpy as np
import pytest
import torch
from decoding_models import NEW, answers_and_logits, decode, open_with_prompts
from transformers import AttentionInterface, AttentionMaskInterface

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest, watch
from vlm_distill_cache.common.attention.layers import middle_span
from vlm_distill_cache.common.attention.shift import gaze_shift
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.around import surround
from vlm_distill_cache.common.models.changed import CHANGES, change_model
from vlm_distill_cache.common.models.tokens.budget import kept_count
from vlm_distill_cache.common.models.tokens.decoding_tokens import best_places, decoding_counts, find_shift
from vlm_distill_cache.common.models.vision_language import PAST

FAMILIES = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "paligemma",
    "mobilevlm_v2", "compodistill",
)  # fmt: skip


class Reference:
    """Whole passes by plain attention; of each layer what rows would see if nothing were out of reach."""

    def __init__(self, model, parts, layers):
        self.model, self.layers, self.blocked, self.seen = model, layers, None, {}
        self.unfed = torch.zeros(1, 1, dtype=torch.bool)  # prompt tokens that none sees
        AttentionInterface.register("reference", self.attend)
        AttentionMaskInterface.register("reference", AttentionMaskInterface()["eager"])
        model.get_submodule(parts["language_model"]).set_attn_implementation("reference")

    def attend(self, module, query, key, value, mask, scaling=None, **_):
        key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for one in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores if mask is None else scores + mask
        unfed = torch.zeros(len(query), 1, 1, scores.shape[3], dtype=torch.bool)
        unfed[..., : self.unfed.shape[1]] = self.unfed[:, None, None]
        scores = scores.masked_fill(unfed, torch.finfo(scores.dtype).min)
        self.seen[module.layer_idx] = scores.softmax(-1).mean(dim=1)  # [B, T, T]
        weights = scores.masked_fill(self.blocked[:, None], torch.finfo(scores.dtype).min).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    def run(self, inputs, answer, visual, kept):
        """The last row's logits ``[B, V]`` and gaze ``[B, T]``; of answer token a's row only ``kept[a]`` is in reach."""
        prompt = visual.shape[1]
        more = torch.ones_like(answer)
        ids, mask = torch.cat([inputs["input_ids"], answer], 1), torch.cat([inputs["attention_mask"], more], 1)
        whole = {**inputs, "input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in inputs:
            whole["token_type_ids"] = torch.cat([inputs["token_type_ids"], more], 1)
        if "mm_token_type_ids" in inputs:
            whole["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * more], 1)
        else:
            whole["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0) + ("token_type_ids" in inputs)
        self.blocked = torch.zeros(len(ids), ids.shape[1], ids.shape[1], dtype=torch.bool)
        for token, places in enumerate(kept):
            if places is not None:
                self.blocked[:, prompt - 1 + token, :prompt] = visual & ~places
        logits = self.model(**whole, use_cache=False).logits[:, -1]
        return logits, sum(self.seen[layer][:, -1, :prompt] for layer in self.layers)

    @torch.no_grad()
    def decode(self, inputs, answers, visual, *, keep, threshold):
        """Logits ``[B, A, V]``, and at which tokens places were swapped, bool ``[B, A]``."""

        def best(row, gaze):
            order = sorted(visual[row].nonzero()[:, 0].tolist(), key=lambda place: -float(gaze[row, place]))
            chosen = torch.zeros_like(visual[row])
            chosen[order[: kept_count(keep, len(order))] if order else []] = True
            return chosen

        kept, found, events = [None], [], torch.zeros(answers.shape, dtype=torch.bool)
        for token in range(answers.shape[1]):
            logits, gaze = self.run(inputs, answers[:, :token], visual, kept)
            own = torch.stack([best(row, gaze) for row in range(len(answers))])
            if token > 0:
                now = kept[token].clone()
                for row in range(len(answers)):
                    if gaze[row, now[row]].sum() < threshold * gaze[row, own[row]].sum():
                        now[row], events[row, token] = own[row], True
                kept[token] = own = now
                logits, _ = self.run(inputs, answers[:, :token], visual, kept)
            kept.append(own)
            found.append(logits)
        return torch.stack(found, dim=1), events


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow(quick=("qwen2_5_vl", "paligemma"))
def test_steps_are_whole_passes_that_see_what_is_kept(name, tmp_path):
    opened = open_with_prompts(name, tmp_path / name)
    model, parts, inputs = opened.model, opened.parts, opened.inputs
    full_answers, full_logits = answers_and_logits(model, inputs)
    visual = inputs["input_ids"] == model.config.image_token_id
    plain = copy.deepcopy(model)

    change_model(model, parts, decoding_tokens={"keep": 1000, "by": "shift"})
    answers, logits = answers_and_logits(model, inputs)
    assert torch.equal(answers, full_answers)
    assert torch.equal(logits, full_logits)
    assert decoding_counts(model).steps == NEW - 1

    reference = Reference(plain, parts, middle_span(len(opened.decoder.layers)))
    for by, threshold in (("shift", 1.0), *([("fixed", 0.0)] if name in FAMILIES[:3] else [])):
        change_model(model, parts, decoding_tokens={"keep": 0.33, "by": by, "shift_threshold": threshold or 0.75})
        answers, logits = answers_and_logits(model, inputs)
        expected, events = reference.decode(inputs, answers, visual, keep=0.33, threshold=threshold)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
        counts = decoding_counts(model)
        assert torch.equal(torch.stack(counts.events, dim=1), events[:, 1:])
        assert torch.equal(torch.stack(counts.swapped, dim=1) > 0, events[:, 1:])
        assert events[visual.any(1)].any() == (by == "shift")
        assert (logits - full_logits)[:, 1:][visual.any(1)].abs().max() > 1e-3

    change_model(model, parts, decoding_tokens=None)
    assert torch.equal(answers_and_logits(model, inputs)[1], full_logits)
    assert getattr(model.config, CHANGES).keys() == {"parts"}


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "paligemma", "mobilevlm_v2"])
@pytest.mark.slow(quick=("llava_onevision", "paligemma"))
def test_of_fewer_tokens_that_are_fed_fewer_are_attended(name, tmp_path):
    opened = open_with_prompts(name, tmp_path / name)
    model, parts, inputs = opened.model, opened.parts, opened.inputs
    reference = Reference(copy.deepcopy(model), parts, middle_span(len(opened.decoder.layers)))
    # The order in which they are asked for is not that in which they run.
    change_model(model, parts, decoding_tokens={"keep": 0.4, "by": "shift", "shift_threshold": 1.0})
    change_model(model, parts, visual_tokens={"keep": 0.6, "by": "random"})
    with torch.no_grad():
        model(**inputs)
    visual = inputs["input_ids"] == model.config.image_token_id
    reference.unfed = visual & (opened.decoder.places < 0)
    fed = visual & ~reference.unfed
    assert fed.sum(1).tolist() == [kept_count(0.6, int(count)) if count else 0 for count in visual.sum(1)]
    answers, logits = answers_and_logits(model, inputs)
    expected, events = reference.decode(inputs, answers, fed, keep=0.4, threshold=1.0)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert torch.equal(torch.stack(decoding_counts(model).events, dim=1), events[:, 1:])
    assert events.any()


@pytest.mark.parametrize("form", ["dict", "float"])
def test_masks_may_be_ready(form, tmp_path):
    opened = open_with_prompts("qwen2_vl", tmp_path / "qwen2_vl")
    settings = {"keep": 3, "by": "shift", "shift_threshold": 0.9}
    change_model(opened.model, opened.parts, decoding_tokens=settings)
    expected = answers_and_logits(opened.model, opened.inputs)[1]

    def prepare(run, _, **arguments):
        mask, rows = arguments["attention_mask"].bool(), arguments["inputs_embeds"].shape[1]
        whole = mask[:, None, None] & torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
        whole = whole[:, :, -rows:]
        if form == "float":
            arguments["attention_mask"] = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
        else:
            arguments["attention_mask"] = {"full_attention": whole}
        return run(**arguments)

    surround(opened.model, opened.parts, prepare)
    torch.testing.assert_close(answers_and_logits(opened.model, opened.inputs)[1], expected, atol=1e-5, rtol=1e-5)


def test_attention_is_watched_once_and_where_it_is(opened):
    def watcher(*_, **__):
        pass

    nothing = pytest.raises(ModelError, match=r"seen 0 times, expected once in each of the layers \[0, 2\]")
    with nothing, watch(opened.decoder, (0, 2), watcher):
        pass
    with watch(opened.decoder, (), watcher):
        opened.model(**opened.inputs, use_cache=False)
    twice = pytest.raises(ModelError, match="two threads at once")
    with twice, watch(opened.decoder, (1,), watcher), watch(opened.decoder, (1,), watcher):
        pass
    assert opened.decoder.config._attn_implementation == "sdpa"


@pytest.fixture(scope="module")
def once_opened(tmp_path_factory):
    return open_with_prompts("mobilevlm_v2", tmp_path_factory.mktemp("models") / "mobilevlm_v2")


@pytest.fixture
def opened(once_opened):
    """A MobileVLM that shifts whenever other tokens than those kept are looked at most."""
    opened = once_opened
    change_model(opened.model, opened.parts, decoding_tokens={"keep": 2, "by": "shift", "shift_threshold": 1.0})
    return opened


def test_steps_hold_few_keys_and_tell_the_whole_length(opened):
    cache = decode(opened.model, opened.inputs).past_key_values
    visual = opened.inputs["input_ids"] == opened.model.config.image_token_id
    words = (opened.inputs["attention_mask"].bool() & ~visual).sum(1)
    assert visual.sum(1).tolist() == [9, 9, 0]
    for layer in cache.layers:
        assert layer.keys.shape[2] == layer.values.shape[2] == words.max() + 2 + NEW - 1
        assert layer.visual[0].shape[2] == 9
    assert cache.get_seq_length() == visual.shape[1] + NEW - 1
    with pytest.raises(ModelError, match="5 tokens were to be taken back, more than were decoded"):
        cache.crop(-NEW)
    cache.crop(-1)
    assert cache.get_seq_length() == visual.shape[1] + NEW - 2
    with pytest.raises(ModelError, match="more than were decoded"):
        cache.layers[0].crop(3)  # older libraries give the length to come
    cache.layers[0].crop(visual.shape[1] + 1)
    assert cache.get_seq_length() == visual.shape[1] + 1
    kept, keys = cache.layers[0].slots.kept, cache.layers[2].visual[0]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 1]))
    assert torch.equal(cache.layers[0].slots.kept, kept[[2, 0]])
    assert torch.equal(cache.layers[2].visual[0], keys[[2, 0]])
    assert len(cache.layers[1].keys) == 2


@torch.no_grad()
def test_padding_behind_prompts_changes_nothing(opened):
    change_model(opened.model, opened.parts, decoding_tokens={"keep": 2, "by": "fixed"})
    answers, expected = answers_and_logits(opened.model, opened.inputs)
    ids, mask = opened.inputs["input_ids"], opened.inputs["attention_mask"]
    lengths = mask.sum(1)
    turned = [
        (row.roll(int(length)), one.roll(int(length))) for row, one, length in zip(ids, mask, lengths, strict=True)
    ]
    ids, mask = (torch.stack(part) for part in zip(*turned, strict=True))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    made = opened.model(
        input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=opened.inputs["pixel_values"]
    )
    torch.testing.assert_close(made.logits[range(len(ids)), lengths - 1], expected[:, 0], atol=1e-5, rtol=1e-5)
    for token in range(NEW - 1):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        made = opened.model(
            input_ids=answers[:, token : token + 1], attention_mask=mask, position_ids=(lengths + token)[:, None],
            **{PAST: made[PAST]},
        )  # fmt: skip
        torch.testing.assert_close(made.logits[:, 0], expected[:, token + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_can_be_captured_and_prompts_recorded(opened):
    expected = answers_and_logits(opened.model, opened.inputs)[1]
    capture = AttentionCapture(opened.decoder)
    try:
        assert torch.equal(answers_and_logits(opened.model, opened.inputs)[1], expected)
        places = torch.tensor([[3, 4]] * len(opened.prompts))
        requests = {"any": AttentionRequest(rows=places[:, 1:], keys=places, groups=((1,),))}
        with capture.record(requests) as maps:
            prompt = opened.model(**opened.inputs)
        torch.testing.assert_close(prompt.logits[:, -1], expected[:, 0], atol=1e-5, rtol=1e-5)
        with capture.record(requests) as plain:
            opened.model(**opened.inputs, use_cache=False)
        assert torch.equal(maps["any"], plain["any"])
        with pytest.raises(ModelError, match="record a pass over the whole text"), capture.record(requests):
            opened.model(input_ids=torch.tensor([[5]] * 3), **{PAST: prompt[PAST]})
    finally:
        opened.decoder.set_attn_implementation("sdpa")


@torch.no_grad()
def test_what_cannot_be_decoded_with_fewer_is_refused(opened, tmp_path):
    model, inputs = opened.model, opened.inputs
    ids = inputs["input_ids"]
    prompt = model(**inputs)
    for message, arguments in (
        ("2 tokens at once", {"input_ids": ids[:, :2], PAST: prompt[PAST]}),
        ("embeddings alone", {"inputs_embeds": torch.zeros(1, 4, 32)}),
        (
            r"mask is \[3, 2\] for",
            {"input_ids": ids[:, :1], "attention_mask": ids[:, :2], PAST: prompt[PAST]},
        ),
    ):
        with pytest.raises(ModelError, match=message):
            model(**arguments)
    text = model(input_ids=ids[2:, -3:])
    with pytest.raises(ModelError, match="pictures in a text that goes on"):
        model(input_ids=ids[:1], **{PAST: text[PAST]}, pixel_values=inputs["pixel_values"][:1])
    with pytest.raises(ModelError, match=r"StaticLayer, which is no plain list.*Leave cache_implementation out"):
        decode(model, inputs, cache_implementation="static")
    opened.decoder.set_attn_implementation("eager")
    with pytest.raises(ModelError, match=r"runs attention 'eager'.*expected 'sdpa'"):
        decode(model, inputs)
    opened.decoder.set_attn_implementation("sdpa")
    for name in ("gemma3", "paligemma2"):
        other = open_with_prompts(name, tmp_path / name)
        with pytest.raises(ModelError, match=r"layer \d of .* DynamicSlidingWindowLayer, which forgets"):
            change_model(other.model, other.parts, decoding_tokens={"keep": 0.5, "by": "fixed"})


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (3, "expected an object of keep"),
        ({"keep": 0.5}, "expected an object of keep"),
        ({"keep": 0.5, "by": "fixed", "more": 1}, "expected an object of keep"),
        ({"keep": 0.5, "by": "best"}, "by is 'best'; expected fixed or shift"),
        ({"keep": 1, "by": "fixed"}, "keep is '1'; expected a share above 0 and below 1, or a whole number"),
        ({"keep": 2.5, "by": "fixed"}, "keep is '2.5'; expected a share"),
        ({"keep": 0.5, "by": "shift", "shift_threshold": 0}, "shift_threshold is '0'; expected"),
        ({"keep": 0.5, "by": "shift", "layers": [3]}, r"layers are \[3\]; expected distinct layers .* 3 \(0 to 2\)"),
        ({"keep": 0.5, "by": "shift", "layers": []}, "or null for the middle ones"),
    ],
)
def test_settings_that_mean_nothing_are_refused(opened, stored, message):
    with pytest.raises(ModelError, match=message):
        change_model(copy.deepcopy(opened.model), opened.parts, decoding_tokens=stored)


def test_budgets_are_shares_or_numbers():
    assert [kept_count(0.33, count) for count in (1, 2, 3, 4, 5, 9, 144)] == [1, 1, 1, 1, 2, 3, 48]
    assert [kept_count(4, count) for count in (1, 3, 4, 9)] == [1, 3, 4, 4]


def test_shifts_are_those_of_the_rule_for_cached_gaze():
    random = np.random.default_rng(0)
    events = 0
    for _ in range(30):
        tokens, places = random.integers(2, 9), random.integers(1, 12)
        keep = int(random.integers(1, places + 1))
        gaze = random.integers(0, 4, (tokens, places)) / 4  # with ties, and rows that look nowhere
        gaze[0, 0] = 1
        expected = gaze_shift(gaze, keep=keep)
        kept = best_places(torch.tensor(gaze[:1]), torch.tensor([keep]))
        assert sorted(kept[0].tolist()) == expected.kept.tolist()
        for token in range(1, tokens):
            event, best = find_shift(torch.tensor(gaze[token : token + 1]), kept, 0.75)
            kept = best if event else kept
            assert bool(event) == expected.event[token]
        events += expected.event.sum()
    assert events > 20
