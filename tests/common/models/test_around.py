"""Functions around a decoder: they see where the visual tokens are, nest, and change nothing of themselves."""

import copy
import pickle

import pytest
import torch
from tiny_families import TINY, save_tiny

from vlm_distill_cache.common.models.around import surround
from vlm_distill_cache.common.models.changed import change_model
from vlm_distill_cache.common.models.tokens.fewer_tokens import selector_of
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.families.table import family_of


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


@pytest.mark.parametrize(("name", "shows_videos"), [("qwen2_vl", True), ("llava_onevision", True), ("llava", False)])
def test_tokens_of_videos_are_visual_too(name, shows_videos, tmp_path):
    opened, seen = open_family_model(save_tiny(name, tmp_path / name)), []
    model, family = opened.model, opened.family
    video = family.video_token_id(model.config)
    assert (video is not None) == shows_videos
    ids = torch.tensor([[3, 5 if video is None else video, 7]])

    def stop(run, decoder, **arguments):
        seen.append(decoder.visual_mask.tolist())
        return run(**arguments)

    surround(model, {"language_model": family.language_model}, stop)
    model(input_ids=ids)
    assert seen == [[[False, shows_videos, False]]]


def test_a_changed_model_is_pickled_like_the_librarys(tmp_path):
    model = TINY["llava_next"](tmp_path)[0]
    change_model(model, family_of("llava_next").parts, visual_tokens={"keep": 2, "by": "random"})
    found = pickle.loads(pickle.dumps(model))  # noqa: S301 - of ours
    assert [type(part) for part in found.modules()] == [type(part) for part in model.modules()]
    assert selector_of(found).settings == selector_of(model).settings
    assert found.model.pictures.model is found
