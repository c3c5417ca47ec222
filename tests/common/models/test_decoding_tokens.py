"""Decoding with some visual tokens: steps through a cache of slots against whole passes with what is out of reach masked."""

import copy

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_families import save_tiny
from transformers import AttentionInterface, AttentionMaskInterface

from vlm_distill_cache.common.attention.layers import middle_span
from vlm_distill_cache.common.models.budget import kept_count
from vlm_distill_cache.common.models.changed import change_model
from vlm_distill_cache.common.models.decoding_tokens import decoding_counts
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.templates import get_template

NEW = 5
FAMILIES = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "paligemma",
    "mobilevlm_v2", "compodistill",
)  # fmt: skip


def opened_with_prompts(name, folder):
    """A tiny model, its parts and the inputs of a left-padded batch: two pictures, and a sample without any."""
    opened = open_family_model(save_tiny(name, folder))
    model, family = opened.model, opened.family
    encoder = SampleEncoder(
        tokenizer=opened.tokenizer, image_encoder=opened.image_encoder, max_length=1000,
        template=get_template(family.template, opened.tokenizer), image_token_id=family.image_token_id(model.config),
    )  # fmt: skip
    random = np.random.default_rng(0)
    prompts = []
    for size, question in (((48, 24), "What is it?"), ((24, 24), "Is it on the left of the other one?"), (None, "Hi")):
        if size is not None:
            PIL.Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{size}.png")
        prompts.append(build_prompt(encoder, None if size is None else ImageFile(folder / f"{size}.png"), question))
    if family.visual_rows == "prefix":
        prompts = prompts[:2]
    inputs = family.generation_inputs(model.config, prompts, 0, torch.device("cpu"), dtype=torch.float32)
    if name == "llava_next":
        model.get_submodule(family.language_model).config.sliding_window = None
    parts = {
        "language_model": family.language_model,
        "vision_tower": family.vision_tower,
        "projector": family.projector,
    }
    return model, parts, dict(inputs)


@torch.no_grad()
def decode(model, inputs, **options):
    """Generated ids ``[B, A]``, letters only, and raw logits ``[B, A, V]``."""
    marks = [*range(260, model.get_output_embeddings().out_features)] or None
    made = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, suppress_tokens=marks, **options,
    )  # fmt: skip
    return made.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(made.logits, dim=1)


class Reference:
    """Whole passes by plain attention; of each layer what rows would see if nothing were out of reach."""

    def __init__(self, model, parts, layers):
        self.model, self.layers, self.blocked, self.seen = model, layers, None, {}
        AttentionInterface.register("reference", self.attend)
        AttentionMaskInterface.register("reference", AttentionMaskInterface()["eager"])
        model.get_submodule(parts["language_model"]).set_attn_implementation("reference")

    def attend(self, module, query, key, value, mask, scaling=None, **_):
        key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for one in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores if mask is None else scores + mask
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
def test_steps_are_whole_passes_that_see_what_is_kept(name, tmp_path):
    model, parts, inputs = opened_with_prompts(name, tmp_path / name)
    full_answers, full_logits = decode(model, inputs)
    visual = inputs["input_ids"] == model.config.image_token_id
    plain = copy.deepcopy(model)

    change_model(model, parts, decoding_tokens={"keep": 1000, "by": "shift"})
    answers, logits = decode(model, inputs)
    assert torch.equal(answers, full_answers)
    assert torch.equal(logits, full_logits)
    assert decoding_counts(model).steps == NEW - 1

    depth = len(model.get_submodule(parts["language_model"]).layers)
    reference = Reference(plain, parts, middle_span(depth))
    for by, threshold in (("fixed", 0.0), ("shift", 1.0)):
        change_model(model, parts, decoding_tokens={"keep": 0.33, "by": by, "shift_threshold": threshold or 0.75})
        answers, logits = decode(model, inputs)
        expected, events = reference.decode(inputs, answers, visual, keep=0.33, threshold=threshold)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
        counts = decoding_counts(model)
        assert torch.equal(torch.stack(counts.events, dim=1), events[:, 1:])
        assert torch.equal(torch.stack(counts.swapped, dim=1) > 0, events[:, 1:])
        assert events[visual.any(1)].any() == (by == "shift")
        assert (logits - full_logits)[:, 1:][visual.any(1)].abs().max() > 1e-3
