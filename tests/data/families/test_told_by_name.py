"""A configuration that cannot be, and weights of another size, are told by name: file, setting, tensor."""

import json

import pytest
from tiny_families import TINY, save_tiny

from vlm_distill_cache.common.errors import DistillError, ModelError
from vlm_distill_cache.data.families.models import open_family_model


@pytest.fixture(scope="module", params=list(TINY))
def folder(request, tmp_path_factory):
    return save_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture
def changed(folder):
    """Writes a setting of the language model into config.json; it is as before afterwards."""
    path = folder / "config.json"
    before = path.read_text()

    def change(name, value):
        config = json.loads(before)
        (config["text_config"] if isinstance(config.get("text_config"), dict) else config)[name] = value
        path.write_text(json.dumps(config))
        return folder

    yield change
    path.write_text(before)


@pytest.mark.parametrize("value", [0, -1, -7])
@pytest.mark.parametrize("name", ["num_attention_heads", "hidden_size", "vocab_size"])
@pytest.mark.slow(quick=23)
def test_a_number_that_is_no_number_of_anything_is_named(changed, name, value):
    with pytest.raises(ModelError, match=rf"{name} in config\.json is {value}, expected 1 or more"):
        open_family_model(changed(name, value))


def test_a_rotary_embedding_that_nobody_knows_is_named(changed):
    odd = {"type": "odd", "rope_type": "odd", "factor": 2.0, "rope_theta": 10000.0}
    folder = changed("rope_scaling", odd)
    with pytest.raises(DistillError, match=r"rope_scaling\.\w+ in config\.json is 'odd', which is not known"):
        open_family_model(folder)


def test_weights_of_another_size_than_the_configurations_are_named_with_both(changed):
    folder = changed("vocab_size", 7777)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight \[\d+, \d+\] instead of \[7777, \d+\]") as told:
        open_family_model(folder)
    assert str(folder) in str(told.value)
    assert "ignore_mismatched" not in str(told.value)
