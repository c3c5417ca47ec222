"""Packed decoders: what the library computes with, adapters added to what layers stand for, an ordinary student at the end."""

import pytest
import torch
from lora_runs import equal_weights, make_config, save_teacher
from safetensors.torch import load_file
from sharded_runs import stopped_behind
from torch import nn

from tests.benchmarks.bench_memory import student
from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.exports.source import unpack_4bit
from vlm_distill_cache.stage2_student.students.packed import (
    is_packed,
    pack_layers,
    round_weights,
    unpack_layers,
    weight_bytes,
    widened,
)
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.trained_student import export_student
from vlm_distill_cache.stage2_student.training.parts import TrainedParts, adapter_parameters

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")


def pack(layers):
    pack_layers(layers, dtype=torch.float32, device=CPU)


def values(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_layers_are_packed_to_the_librarys_codes_and_come_back_as_what_they_stand_for():
    layers = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64), nn.Sequential(nn.Linear(128, 8)))
    odd, plain = layers[1], weight_bytes(layers)
    pack(layers)
    assert [is_packed(layers[0]), is_packed(layers[1]), is_packed(layers[2][0])] == [True, False, True]
    assert layers[1] is odd  # whose rows are no whole blocks
    assert weight_bytes(layers) == plain - (64 * 32 + 128 * 8) * 4 + (64 * 32 + 128 * 8) // 2 + (32 + 16) * 4
    weight, state = layers[0].weight, layers[0].weight.quant_state
    expected = unpack_4bit(weight.data, state.absmax, state.code, state.shape, state.blocksize)
    inputs = torch.randn(3, 64)
    assert torch.allclose(layers[0](inputs), inputs @ expected.T, atol=1e-5)
    unpack_layers(layers)
    assert type(layers[0]) is nn.Linear
    assert torch.allclose(layers[0].weight, expected, atol=1e-6)
    again = layers[0].weight.detach().clone()
    pack(layers)
    unpack_layers(layers)
    assert torch.equal(layers[0].weight, again)  # packed again they stand for the same


def test_weights_are_widened_for_a_while_and_come_back_bit_for_bit():
    model = student(width=64, layers=1)
    round_weights(model)
    before = values(model)
    with widened(model):
        assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_a_phase_ends_as_packed_values_and_adapters_and_is_brought_back_alike():
    def begun():
        model = student(width=64, layers=1)
        return model, TrainedParts(model, rank=2, alpha=4.0, dropout=0.0, pack=pack)

    model, parts = begun()
    parts.begin(trainable="lora", seed=1)
    layer = model.language_model.layers[0].mlp.up_proj
    assert is_packed(layer.base_layer)
    assert not [name for name, value in model.named_parameters() if value.requires_grad and value.dtype == torch.uint8]
    with torch.no_grad():
        for value in adapter_parameters(model).values():
            value.normal_(std=0.1)
    state = layer.base_layer.weight.quant_state
    base = unpack_4bit(layer.base_layer.weight.data, state.absmax, state.code, state.shape, state.blocksize)
    expected = base + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    parts.finish()
    merged = model.language_model.layers[0].mlp.up_proj
    assert (type(merged), merged.weight.dtype) == (nn.Linear, torch.float32)
    assert torch.allclose(merged.weight, expected, atol=1e-5)
    parts.begin(trainable="projector")  # of the next phase
    saved = parts.state()
    other, again = begun()
    again.replay(saved)
    again.begin(trainable="projector")
    assert equal_weights(model, other)


def test_what_cannot_be_trained_packed_is_refused_with_what_to_set():
    for options, message in (
        ({"trainable": "all"}, r"dpt\.trainable is 'all'; it must be projector or lora where quantisation is 4bit"),
        (
            {"trainable": "lora", "every": 3},
            r"evaluation\.every is 3; .*score the trained student, by `distill evaluate`",
        ),
    ):
        phases = {name: {"trainable": options["trainable"]} for name in ("dpt", "dft", "sft")}
        given = {"cache": "c", "output": "o", "quantisation": "4bit", **phases}
        given |= {"evaluation": {"every": options["every"]}} if "every" in options else {}
        with pytest.raises(ConfigError, match=message):
            config_from_dict(TrainConfig, given)


WAYS = {
    "packed": {"quantisation": "4bit"},
    "half": {"dtype": "bfloat16", "weights": "bfloat16", "optimizer": "adamw8bit"},
}


@pytest.mark.filterwarnings("ignore")  # what peft says of the library
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.slow
def test_a_run_that_goes_on_is_the_unbroken_one(name, tiny_cache, tmp_path):
    """Killed behind its second step, in the middle of adapters."""
    base = str(save_teacher(tmp_path / "base", seed=3))
    whole = train(make_config(tiny_cache[0], tmp_path / "one", student=base, **WAYS[name])).final
    stopped_behind(2, tmp_path / "one", tmp_path / "on")
    other = train(make_config(tiny_cache[0], tmp_path / "on", student=base, **WAYS[name])).final
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) and value.dtype == torch.float32 for key, value in one.items())
    if name == "packed":
        with pytest.raises(ModelError, match="packed again between 2 phases of adapters"):
            export_student(whole, tmp_path / "no", layout="adapter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_adapters_of_a_packed_student_are_exported_alone(tiny_cache, tmp_path):
    base = str(save_teacher(tmp_path / "base", seed=3))
    config = make_config(tiny_cache[0], tmp_path / "run", student=base, phases=["dpt", "dft"], quantisation="4bit")
    export_student(train(config).final, tmp_path / "adapter", layout="adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
