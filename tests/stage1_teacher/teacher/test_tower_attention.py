"""What visual tokens receive inside the tower of every family, against eager attention and against what a place feeds."""

import sys

import numpy as np
import pytest
import torch
from tiny_families import TINY

from vlm_distill_cache.common.attention.hidden import HiddenCapture, HiddenRequest
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.tokens.tower_attention import (
    attention_of_layer,
    by_visual_token,
    last_layer,
    observe_tower,
    received_attention,
)
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import collate, visual_keys
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

PLACES = 4  # that are changed, of each family's


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.slow(quick=("paligemma", "paligemma2", "compodistill"))
def test_the_tower_of_every_family_is_read_as_eager_attention_and_pooled_as_its_projector_does(
    name: str, family_cache, family_data, monkeypatch
):
    cache = family_cache(name)
    teacher = Teacher(cache.path.parent / "teacher", dtype="float32")
    dataset, encoder = open_dataset(str(family_data)), build_encoder(teacher, template="auto", max_length=0)
    ids = ("s0", "text", "s1", "s5")
    batch = collate([encoder(dataset[dataset.sample_ids.index(one)]) for one in ids], teacher.pad_token_id)
    inputs = teacher.prepare(batch, {}).model_inputs
    model, tower, tokens = teacher.model, teacher.vision_tower, int(batch.visual_mask.sum())
    if name == "gemma3":  # its projection begins as zeros
        model.model.multi_modal_projector.mm_input_projection_weight.detach().normal_()
    layer = last_layer(teacher.config, tower)
    module = attention_of_layer(tower, layer)

    @torch.no_grad()
    def read() -> torch.Tensor:
        """What enters the language model at visual tokens, ``[N, D]``."""
        keys = visual_keys(batch)
        with HiddenCapture(teacher.language_model).record({"it": HiddenRequest(keys, (0,))}) as states:
            model(**inputs)
        return states["it"][keys >= 0][:, 0]

    plain = read()
    with observe_tower(tower, layer) as received:
        assert torch.equal(read(), plain)  # watched, the tower says the same, bit for bit

    maps, family = [], sys.modules[type(module).__module__]

    def eager(shown, *given, own=family.eager_attention_forward, **named):
        output = own(shown, *given, **named)
        maps.extend([output[1]] if shown is module else [])
        return output

    monkeypatch.setattr(family, "eager_attention_forward", eager)
    tower.set_attn_implementation("eager")
    with observe_tower(tower, layer) as received_beside_eager:
        read()
    for found, beside, seen in zip(received, received_beside_eager, maps, strict=True):
        torch.testing.assert_close(found, seen.mean(dim=(1, 2)), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(beside, found, atol=1e-6, rtol=1e-5)

    # What a build has cached is this, sample by sample, but for float16.
    live = by_visual_token(model, tower, received, inputs, tokens=tokens)
    cached = [cache.decode("tower_attention", cache.read(one)) for one in ids]
    np.testing.assert_allclose(live, np.concatenate(cached), rtol=2e-3, atol=1e-6)
    assert [len(part) for part in cached] == batch.visual_mask.sum(dim=1).tolist()

    # A place gives its attention to exactly those tokens that change with it.
    sizes = [part.numel() for part in received]
    chosen = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(3))[:PLACES].tolist()
    block = next(part for part in tower.modules() if module in part.children() and part is not tower)
    plain = read()
    for place in chosen:

        def change(_block, _given, output, place=place):
            states = (output[0] if isinstance(output, tuple) else output).clone(memory_format=torch.contiguous_format)
            states.view(-1, states.shape[-1])[place] += torch.linspace(-2, 3, states.shape[-1]).cos()
            return (states, *output[1:]) if isinstance(output, tuple) else states

        hook = block.register_forward_hook(change, prepend=True)
        changed = (read() - plain).abs().amax(dim=1) > 1e-6
        hook.remove()
        alone = torch.zeros(sum(sizes))
        alone[place] = 1.0
        parts = [part.view_as(like) for part, like in zip(alone.split(sizes), received, strict=True)]
        gets = by_visual_token(model, tower, parts, inputs, tokens=tokens)
        assert float(gets.sum()) <= 1 + 1e-6
        if name.startswith("mobilevlm"):  # whose projector lets neighbours speak to each other
            assert not bool(((gets > 0) & ~changed).any())
            assert bool((gets > 0).any()) == bool(changed.any())
        else:
            assert torch.equal(gets > 0, changed)


def test_masks_chunks_and_shared_keys_change_nothing_but_what_they_say(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 7, 8, generator=generator), torch.randn(2, 2, 7, 8, generator=generator)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[1, :, :, 5:] = False  # a tile with padding
    mask[1, :, 6] = False  # a row that sees nothing
    expected = torch.zeros(2, 7)
    for picture in range(2):
        for head in range(4):
            for row in range(7):
                seen = mask[picture, 0, row]
                scores = (key[picture, head // 2] @ query[picture, head, row]) / 8**0.5
                weights = scores[seen].exp()
                expected[picture, seen] += weights / weights.sum() / 28 if seen.any() else 0
    torch.testing.assert_close(received_attention(query, key, mask), expected)
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    added[1, :, 6] = -torch.inf
    torch.testing.assert_close(received_attention(query, key, added), expected)
    monkeypatch.setattr("vlm_distill_cache.common.models.tokens.tower_attention._CHUNK", 1)
    torch.testing.assert_close(received_attention(query, key, mask), expected)


def test_a_tower_without_known_layers_is_refused_by_name():
    with pytest.raises(ModelError, match=r"Linear: no layer 0 .*\(0 layers were\)"):
        attention_of_layer(torch.nn.Linear(2, 2), 0)
