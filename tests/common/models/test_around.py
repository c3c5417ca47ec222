"""Functions around a decoder: they see where the visual tokens are, nest, and change nothing of themselves."""

import copy

import pytest
import torch
from tiny_families import save_tiny

from vlm_distill_cache.common.models.around import surround
from vlm_distill_cache.data.families.models import open_family_model


@pytest.mark.parametrize("name", ["llava", "mobilevlm_v2", "qwen2_vl"])
def test_wrappers_nest_and_know_the_visual_tokens(name, tmp_path):
    opened = open_family_model(save_tiny(name, tmp_path / name))
    model, family, seen = opened.model, opened.family, []
    ids = torch.tensor([[3, 5, 7, 9]])
    expected = model(input_ids=ids).logits

    def watch(which):
        def wrapper(run, decoder, **arguments):
            seen.append((which, decoder.visual_mask.tolist()))
            return run(**arguments)

        return wrapper

    kind = type(model.get_submodule(family.language_model)).__name__
    for which in ("inner", "outer"):
        decoder = surround(model, {"language_model": family.language_model}, watch(which))
    assert type(decoder).__name__ == kind
    for one in (model, copy.deepcopy(model)):
        seen.clear()
        assert torch.equal(one(input_ids=ids).logits, expected)
        assert seen == [("outer", [[False] * 4]), ("inner", [[False] * 4])]
