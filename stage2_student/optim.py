"""How fast the student learns: AdamW and the learning-rate curve."""

import math

from torch import nn
from torch.optim import AdamW, Optimizer

from vlm_distill_cache.stage2_student.config import Schedule


def learning_rate(step: int, *, steps: int, peak: float, warmup: float, schedule: Schedule) -> float:
    """The learning rate of one optimizer step; a pure function, so there is no scheduler state to save.

    Args:
        step: Optimizer step of the phase, from 0.
        steps: Steps of the phase.
        peak: Highest learning rate.
        warmup: Share of the steps, in [0, 1), that rise linearly from ``peak / warm-up steps`` to ``peak``.
        schedule: ``cosine`` falls to 0 at ``steps``; ``constant`` stays at ``peak``.

    Returns:
        A positive number (0 only past the end of a cosine).

    Source:
        Loshchilov & Hutter 2017 (arXiv:1608.03983), without restarts.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    if schedule == "constant":
        return peak
    done = min(1.0, (step - rise) / max(1, steps - rise))
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


def build_optimizer(parameters: list[nn.Parameter], *, peak: float, weight_decay: float) -> AdamW:
    """AdamW with one fused update; biases and norms are not decayed.

    Args:
        parameters: Trainable parameters.
        peak: Learning rate before the schedule.
        weight_decay: Decay of matrices, per step and unit of learning rate.

    Source:
        LLaVA-1.5 and CompoDistill: AdamW, betas (0.9, 0.999), weight decay 0.
    """
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # A phase may train matrices only; AdamW accepts an empty group but a frozen state dict would then differ.
    return AdamW([group for group in groups if group["params"]], lr=peak, betas=(0.9, 0.999), fused=True)
