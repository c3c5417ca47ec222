"""Steps of bfloat16 weights and 8-bit averages: against plain formulas, and the same after a restart."""

import copy
import io

import pytest
import torch
from torch import nn

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.stage2_student.config import PhaseConfig, TrainConfig
from vlm_distill_cache.stage2_student.training import optimizers
from vlm_distill_cache.stage2_student.training.checks import refuse_undivided
from vlm_distill_cache.stage2_student.training.optimizers import make_optimizer, stochastic_round, try_8bit

KINDS = ("adamw", "adamw8bit")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rounding_keeps_what_bfloat16_holds_and_is_one_of_both_neighbours_else():
    exact = torch.randn(1000, generator=generator()).bfloat16().float()
    assert torch.equal(stochastic_round(exact, generator()).float(), exact)
    between = torch.randn(1000, generator=generator(1))
    low = (between.view(torch.int32) & -(1 << 16)).view(torch.float32)  # towards zero
    high = ((between.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    found = stochastic_round(between, generator()).float()
    assert ((found == low) | (found == high)).all()
    assert (found == low).any()
    assert (found == high).any()


@pytest.mark.parametrize("value", [1.001, -3.0007, 1e-5])
def test_the_mean_of_many_roundings_is_the_value(value):
    many = torch.full((200_000,), value)
    step = 2.0**-8 * 2 ** torch.tensor(abs(value)).log2().floor()
    assert stochastic_round(many, generator()).double().mean().item() == pytest.approx(value, abs=0.01 * step.item())


def train(kind, *, steps, seed=0, weight=None, state=None, rate=1e-2, constant=False):
    """Some steps of a matrix and a vector, from a state if there is one; gradients depend on the step alone."""
    parts = [torch.randn(64, 80, generator=generator(7)), torch.ones(5)] if weight is None else weight
    values = [nn.Parameter(part.clone()) for part in parts]
    groups = [{"params": values[:1], "weight_decay": 0.1}, {"params": values[1:], "weight_decay": 0.0}]
    optimizer = make_optimizer(groups, lr=rate, kind=kind, seed=seed)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        for number, value in enumerate(values):
            gradient = torch.randn(value.shape, generator=generator(100 * step + number))
            value.grad = (torch.ones_like(gradient) if constant else gradient).to(value.dtype)
        optimizer.step()
    return [value.data for value in values], optimizer


def halves(parts=None):
    return [part.bfloat16() for part in parts or train("adamw", steps=[])[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_bfloat16_weights_is_the_float32_step_rounded(kind, monkeypatch):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    seen = []
    monkeypatch.setattr(optimizers, "stochastic_round", lambda value, random: seen.append(value) or value.bfloat16())
    found, _ = train(kind, steps=[1], weight=halves())
    gradients = [torch.randn(part.shape, generator=generator(100 + n)).bfloat16() for n, part in enumerate(found)]
    values = [nn.Parameter(part.float()) for part in halves()]
    plain = make_optimizer(
        [{"params": values[:1], "weight_decay": 0.1}, {"params": values[1:], "weight_decay": 0.0}], lr=1e-2, kind=kind
    )
    for value, gradient in zip(values, gradients, strict=True):
        value.grad = gradient.float()
    plain.step()
    for stepped, value, half in zip(seen, values, found, strict=True):
        assert torch.equal(stepped, value)
        assert torch.equal(half, value.data.bfloat16())


def test_steps_that_the_nearest_bfloat16_would_lose_add_up():
    """A hundred steps of 1e-4 on weights of 1: 0.01 in float32, nothing where each is rounded to the nearest."""
    ones = [torch.ones(64, 80), torch.ones(5)]
    exact, _ = train("adamw", steps=range(100), weight=ones, rate=1e-4, constant=True)
    (found, _), _ = train("adamw", steps=range(100), weight=halves(ones), rate=1e-4, constant=True)
    assert (1 - exact[0]).mean() > 0.009
    assert found.double().mean().item() == pytest.approx(exact[0].double().mean().item(), abs=1e-3)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_goes_on_is_the_unbroken_one_byte_for_byte(kind, half):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    begin = halves() if half else None
    whole, _ = train(kind, steps=range(6), weight=begin)
    first, optimizer = train(kind, steps=range(3), weight=begin)
    written = io.BytesIO()
    torch.save(optimizer.state_dict(), written)
    written.seek(0)
    state = torch.load(written, weights_only=True)
    flat = {number: optimizers.flat_averages(averages) for number, averages in state["state"].items()}
    for number, averages in flat.items():
        assert all(optimizers.fits(name, value, first[number]) for name, value in averages.items())
        assert not all(optimizers.fits(name, value, torch.zeros(3, 700)) for name, value in averages.items())
    after, _ = train(kind, steps=range(3, 6), weight=first, state={**state, "state": copy.deepcopy(flat)})
    assert all(torch.equal(one, other) for one, other in zip(whole, after, strict=True))
    if half:
        other, _ = train(kind, steps=range(6), weight=begin, seed=1)
        assert not torch.equal(other[0], whole[0])


def test_8_bit_averages_step_as_those_of_float32_nearly_do():
    pytest.importorskip("bitsandbytes")
    (exact, small), _ = train("adamw", steps=range(5))
    (found, alike), optimizer = train("adamw8bit", steps=range(5))
    begun = train("adamw", steps=[])[0][0]
    assert (found - exact).norm() < 0.1 * (exact - begun).norm()
    assert torch.allclose(small, alike, atol=1e-6)  # too small to be packed
    kept = [averages["state1"].dtype for averages in optimizer.state.values()]
    assert kept == [torch.uint8, torch.float32]


def test_what_the_installed_library_cannot_do_is_said_before_the_first_step(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    try_8bit(torch.device("cpu"))

    def fails(*_):
        raise NotImplementedError("no kernel\nof this kind")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "update_step", fails)
    with pytest.raises(
        ConfigError, match=r"takes no 8-bit steps on cpu \(no kernel\); set optimizer=adamw, or upgrade"
    ):
        try_8bit(torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"bitsandbytes is not installed; run `pip install 'vlm-distill-cache\[quantised"
    ):
        try_8bit(torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "bfloat16"}, r"weights is 'bfloat16'; .*float32 where dtype is float32: set dtype=bfloat16"),
        ({"optimizer": "adamw8bit", "sharding": "fsdp2"}, r"optimizer .*adamw where sharding is fsdp2"),
        ({"quantisation": "4bit"}, r"dpt.trainable is 'all'; .*projector or lora where quantisation is 4bit"),
    ],
)
def test_ways_that_do_not_go_together_are_refused_by_their_options(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(cache="c", output="o", **options)


def test_a_launcher_that_divides_the_student_is_told_what_cannot_be():
    lora = dict.fromkeys(("dpt", "dft", "sft"), PhaseConfig(trainable="lora"))
    for options in ({"optimizer": "adamw8bit"}, {"quantisation": "4bit"}, {"weights": "bfloat16", "dtype": "bfloat16"}):
        config = TrainConfig(cache="c", output="o", **lora, **options)
        refuse_undivided(config, divides=False)
        name, value = next(iter(options.items()))
        with pytest.raises(ConfigError, match=rf"{name}={value}: the launcher asks for FSDP2.*leave {name} out"):
            refuse_undivided(config, divides=True)
