"""Optimizers: AdamW, its averages in 8 bits, and steps of bfloat16 weights that are rounded at random.

A bfloat16 weight keeps 8 bits: rounded to the nearest, a step below 1/512 of it is lost, and at the learning rates of
fine-tuning most steps are. Rounded up or down with the odds of how near each is, the mean of many steps is what they are in
float32. That takes no master copy of the weights, which would be 4 bytes a parameter, as much as float32 weights alone.

Source: stochastic rounding as in Zamirai et al. 2020 (arXiv:2010.06192); 8-bit averages: Dettmers et al. 2021
(arXiv:2110.02861), by bitsandbytes.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.hashing import fingerprint

Kind = Literal["adamw", "adamw8bit"]
BLOCK = 256  # averages that share a scale, of bitsandbytes
LEAST_8BIT = 4096  # values of a tensor; the averages of a smaller one stay in float32
CODES = 256  # what a byte stands for
_LOW_BITS = 16  # of a float32 that a bfloat16 has not
_INSTALL = "run `pip install 'vlm-distill-cache[quantised]'`"


def step_seed(*parts: object) -> int:
    """A seed for the numbers drawn in one step, from what names it."""
    return int(fingerprint([str(part) for part in parts])[:15], 16)


def make_optimizer(groups: list[dict[str, Any]], *, lr: float, kind: Kind = "adamw", seed: int = 0) -> Optimizer:
    """AdamW of parameter groups, betas 0.9 and 0.999.

    Args:
        groups: As of every optimizer of torch; parameters in float32 or bfloat16.
        lr: Of groups that have none of their own.
        kind: ``adamw8bit`` keeps the averages of tensors of `LEAST_8BIT` values and more in 8 bits.
        seed: Of the rounding of bfloat16 parameters; the same in all processes that step the same parameters.

    Raises:
        ConfigError: If bitsandbytes is missing.
    """
    rounds = any(value.dtype == torch.bfloat16 for group in groups for value in group["params"])
    made: type[Any] = AdamW
    how: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.999)}
    if kind == "adamw":
        how["fused"] = True
    else:
        refuse_no_bitsandbytes("optimizer=adamw8bit", instead="optimizer=adamw")
        from bitsandbytes.optim.adamw import AdamW8bit

        made, how["weight_decay"] = AdamW8bit, 0.0
    if not rounds:
        return made(groups, **how)  # type: ignore[no-any-return]
    optimizer = type(f"Rounding{made.__name__}", (_Rounding, made), {})(groups, **how)
    optimizer.rounding_seed = seed
    return optimizer  # type: ignore[no-any-return]


def refuse_no_bitsandbytes(option: str, *, instead: str) -> None:
    """Raise a ConfigError if bitsandbytes, which an option needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{option}: bitsandbytes is not installed; {_INSTALL}, or set {instead}")


def try_8bit(device: torch.device) -> None:
    """Take an 8-bit step of a small tensor on a device.

    Raises:
        ConfigError: If the installed bitsandbytes cannot, or is missing.
    """
    parameter = nn.Parameter(torch.zeros(LEAST_8BIT, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        make_optimizer([{"params": [parameter]}], lr=0.1, kind="adamw8bit").step()
    except (RuntimeError, NotImplementedError, OSError, ImportError) as error:
        raise ConfigError(
            f"optimizer=adamw8bit: the installed bitsandbytes takes no 8-bit steps on {device.type} "
            f"({str(error).partition(chr(10))[0]}); set optimizer=adamw, or upgrade it: pip install 'bitsandbytes>=0.50'"
        ) from error


def flat_averages(averages: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps of one parameter, by name; bitsandbytes wraps some of it once more."""
    flat: dict[str, Any] = {}
    for name, value in averages.items():
        flat |= flat_averages(value) if isinstance(value, Mapping) else {name: value}
    return flat


def fits(name: str, value: Any, parameter: Tensor) -> bool:
    """Whether a value, kept under a name, can be of a parameter."""
    if not isinstance(value, Tensor):
        return type(value) is int
    if name.startswith("absmax"):
        return value.shape == (-(-parameter.numel() // BLOCK),)
    return value.shape == (CODES,) if name.startswith("qmap") else value.shape in ((), parameter.shape)


def stochastic_round(value: Tensor, random: torch.Generator) -> Tensor:
    """Float32 to bfloat16, up or down with the odds of how near each is, so that the mean is the value.

    Args:
        value: Finite float32 of any shape.
        random: On its device.
    """
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << _LOW_BITS, bits.shape, generator=random, device=bits.device, dtype=torch.int32)
    # Sign and magnitude: what is added to the low bits carries into the kept ones with just these odds.
    return noise.add_(bits).bitwise_and_(-(1 << _LOW_BITS)).view(torch.float32).to(torch.bfloat16)


class _Rounding(Optimizer):
    """Mixed in before an optimizer: bfloat16 parameters are stepped in float32, one by one, and rounded at random.

    The random numbers of a step are a function of ``rounding_seed`` and of how many steps were taken, so that a training that
    goes on from a checkpoint is the unbroken one.
    """

    rounding_seed: int

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; the averages of all parameters are as of float32 ones."""
        groups, random = self.param_groups, _Random(self.rounding_seed, self._taken())
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    self.param_groups = [{**group, "params": [parameter]}]
                    with _in_float32(parameter, random):
                        super().step()
        finally:
            self.param_groups = groups

    def _taken(self) -> int:
        return max((int(averages["step"]) for averages in list(self.state.values())[:1]), default=0)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Bring back averages as they are: torch's own would round them to the parameters' precision."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, averages in state_dict["state"].items():
            parameter = parameters[number]
            self.state[parameter] = {
                name: value.to(parameter.device) if isinstance(value, Tensor) else value
                for name, value in flat_averages(averages).items()
            }


class _Random:
    """A generator for each device that is asked for, of one step."""

    def __init__(self, seed: int, step: int) -> None:
        self._seed = step_seed("rounding", seed, step)
        self._made: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._made:
            self._made[device] = torch.Generator(device).manual_seed(self._seed)
        return self._made[device]


@contextmanager
def _in_float32(parameter: nn.Parameter, random: _Random) -> Iterator[None]:
    """In the block a bfloat16 parameter and its gradient are float32; behind it, rounded into its own memory."""
    if parameter.dtype != torch.bfloat16:
        yield
        return
    own, gradient = parameter.data, parameter.grad
    assert gradient is not None
    parameter.grad = None
    parameter.data = own.float()
    parameter.grad = gradient.float()
    yield
    own.copy_(stochastic_round(parameter.data, random.on(own.device)))
    parameter.grad = None
    parameter.data = own
