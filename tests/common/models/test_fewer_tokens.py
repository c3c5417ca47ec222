"""Students that feed fewer visual tokens say what the whole sequence says with the others masked, in every family."""

import copy

import numpy as np
import pytest
import torch
from image_array import ImageArray
from tiny_families import TINY, save_tiny

from vlm_distill_cache.common.models.around import surround
from vlm_distill_cache.common.models.changed import change_model
from vlm_distill_cache.common.models.fed_sequence import pool
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.templates import get_template

# The library's InternVL processor, up to 5.17.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
PICTURES = ((40, 30), (24, 60), None)
QUESTIONS = ("What is it?", "Is it green?", "Who are you, and where?")


class Opened:
    """A tiny model of a family and three prompts, the last without a picture."""

    def __init__(self, name, folder):
        opened = open_family_model(save_tiny(name, folder))
        self.model, self.family = opened.model, opened.family
        self.parts = opened.family.parts
        encoder = SampleEncoder(
            tokenizer=opened.tokenizer,
            image_encoder=opened.image_encoder,
            template=get_template(opened.family.template, opened.tokenizer),
            image_token_id=opened.family.image_token_id(opened.model.config),
            max_length=1000,
        )
        self.prompts = [
            build_prompt(encoder, image(size), text) for size, text in zip(PICTURES, QUESTIONS, strict=True)
        ]

    def inputs(self, *which):
        chosen = [self.prompts[i] for i in which]
        return dict(
            self.family.generation_inputs(self.model.config, chosen, 0, torch.device("cpu"), dtype=torch.float32)
        )


def image(size):
    if size is None:
        return None
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return ImageArray(pixels, f"p{size}")


@pytest.fixture(scope="module", params=list(TINY))
def opened(request, tmp_path_factory):
    return Opened(request.param, tmp_path_factory.mktemp(request.param))


def masked(model, parts, stands):
    """The whole sequence, left out tokens masked and pooled ones in the place of theirs: slow and obvious."""

    def wrapper(run, decoder, **arguments):
        length = arguments["inputs_embeds"].shape[1]
        here = torch.arange(length)
        first = length == stands.shape[1] or length > stands.shape[1]
        assert first
        gone = torch.zeros(len(stands), length, dtype=torch.bool)
        gone[:, : stands.shape[1]] = stands != here[: stands.shape[1]]
        front = pool(arguments["inputs_embeds"][:, : stands.shape[1]], stands)
        arguments["inputs_embeds"] = torch.cat([front, arguments["inputs_embeds"][:, stands.shape[1] :]], dim=1)
        if arguments.get("deepstack_visual_embeds") is not None:
            mask, found = arguments["visual_pos_masks"], []
            for feature in arguments["deepstack_visual_embeds"]:
                whole = torch.zeros(*mask.shape, feature.shape[-1]).index_put((mask,), feature)
                found.append(pool(whole[:, : stands.shape[1]], stands)[mask[:, : stands.shape[1]]])
            arguments["deepstack_visual_embeds"] = found
        arguments["attention_mask"] = blocked(arguments["attention_mask"], gone)
        return run(**arguments)

    surround(model, parts, wrapper)
    return model


def blocked(mask, gone):
    if isinstance(mask, dict):
        return {kind: blocked(part, gone) for kind, part in mask.items()}
    if mask is None:
        length = gone.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if mask.ndim == 2:
        return mask.masked_fill(gone, 0)
    return mask.masked_fill(gone[:, None, None], False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


@pytest.mark.parametrize("by", ["attention", "grid", "random"])
def test_fewer_tokens_are_the_whole_sequence_with_the_others_masked(opened, by):
    model, inputs = copy.deepcopy(opened.model), opened.inputs(0, 1, 2)
    change_model(model, opened.parts, visual_tokens={"keep": 0.5, "by": by})
    decoder = model.get_submodule(opened.parts["language_model"])
    with torch.no_grad():
        logits = model(**inputs).logits
    stands = decoder.stands_for
    visual = inputs["input_ids"] == model.config.image_token_id
    kept = (stands == torch.arange(stands.shape[1])) & visual
    for row, count in zip(kept.sum(1).tolist(), visual.sum(1).tolist(), strict=True):
        assert row == 0 == count or 0 < row <= max(1, int(count / 2 + 0.5))
    reference = masked(copy.deepcopy(opened.model), opened.parts, stands)
    with torch.no_grad():
        expected = reference(**inputs).logits
    text = inputs["attention_mask"].bool() & ~visual
    torch.testing.assert_close(logits[text | kept], expected[text | kept], atol=2e-4, rtol=1e-4)
    how = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    slow = reference.generate(**inputs, **how, use_cache=False).tolist()
    assert model.generate(**inputs, **how).tolist() == slow
    assert model.generate(**inputs, **how, use_cache=False).tolist() == slow
