"""Tiny models with a left-padded batch of prompts, and greedy answers that are letters only."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import PIL.Image
import torch
from tiny_families import save_tiny

from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.templates import get_template

NEW = 5


def open_with_prompts(name, folder):
    """A tiny ``model``, its ``parts`` and ``encoder``, and ``prompts``: of two pictures, and one without any.

    ``inputs_of`` makes arguments of ``generate``, ``inputs`` are those of all prompts.
    """
    opened = open_family_model(save_tiny(name, folder))
    model, family = opened.model, opened.family
    encoder = SampleEncoder(
        tokenizer=opened.tokenizer, image_encoder=opened.image_encoder, max_length=1000,
        template=get_template(family.template, opened.tokenizer), image_token_id=family.image_token_id(model.config),
    )  # fmt: skip
    random, prompts = np.random.default_rng(0), []
    for size, question in (((48, 24), "What is it?"), ((24, 24), "Is it on the left of the other one?"), (None, "Hi")):
        if size is not None:
            PIL.Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{size}.png")
        prompts.append(build_prompt(encoder, None if size is None else ImageFile(folder / f"{size}.png"), question))
    if family.visual_rows == "prefix":  # each of its samples has a picture
        prompts = prompts[:2]
    inputs_of = partial(family.generation_inputs, model.config, dtype=torch.float32)
    decoder = model.get_submodule(family.language_model)
    if name == "llava_next":  # the tiny one's is a Mistral of the first version
        decoder.config.sliding_window = None
    return SimpleNamespace(
        model=model, decoder=decoder, parts=family.parts, encoder=encoder, prompts=prompts, inputs_of=inputs_of,
        inputs=dict(inputs_of(prompts, 0, torch.device("cpu"))),
    )  # fmt: skip


@torch.no_grad()
def decode(model, inputs, **options):
    """The library's output of `NEW` tokens with raw logits; ids of marks, those of pictures among them, are not said."""
    marks = [*range(260, model.get_output_embeddings().out_features)] or None
    return model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, suppress_tokens=marks, **options,
    )  # fmt: skip


def answers_and_logits(model, inputs):
    """Greedy ids ``[B, A]`` and raw logits ``[B, A, V]``."""
    made = decode(model, inputs)
    return made.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(made.logits, dim=1)
