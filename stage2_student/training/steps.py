"""The parts of an optimizer step: its micro-batches ahead of time, its sums over processes, its gradient."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.terminal.progress import progress
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.batches.prefetch import Prefetcher
from vlm_distill_cache.stage2_student.batches.sampler import micro_batch_count, split_step
from vlm_distill_cache.stage2_student.config import PhaseConfig, RateName, Schedule, TrainConfig
from vlm_distill_cache.stage2_student.losses.objective import Losses, units_of
from vlm_distill_cache.stage2_student.students.shards import whole_number
from vlm_distill_cache.stage2_student.training.extension import earlier_training
from vlm_distill_cache.stage2_student.training.optimizers import Kind, make_optimizer, step_seed
from vlm_distill_cache.stage2_student.training.preparation import PreparedPhase


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


def set_learning_rates(optimizer: Optimizer, rates: Mapping[RateName, float]) -> None:
    """Give every parameter group its learning rate: that of the name under ``rate`` in the group, else ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group.get("rate", "lr")]


def build_optimizer(
    parameters: Mapping[RateName, list[nn.Parameter]],
    peaks: Mapping[RateName, float],
    *,
    weight_decay: float,
    kind: Kind = "adamw",
    seed: int = 0,
) -> Optimizer:
    """AdamW with one fused update; biases and norms are not decayed.

    Args:
        parameters: By the name of their learning rate.
        peaks: Learning rates before the schedule.
        weight_decay: Per step and unit of learning rate.
        kind: Of its averages.
        seed: Of the rounding of bfloat16 parameters.

    Source:
        LLaVA-1.5 and CompoDistill: AdamW, betas (0.9, 0.999), weight decay 0.
    """
    groups: list[dict[str, Any]] = []
    for rate, members in parameters.items():
        own = {} if rate == "lr" else {"lr": peaks[rate], "rate": rate}
        matrices = [parameter for parameter in members if parameter.ndim >= 2]
        vectors = [parameter for parameter in members if parameter.ndim < 2]
        groups += [
            {"params": matrices, "weight_decay": weight_decay, **own},
            {"params": vectors, "weight_decay": 0.0, **own},
        ]
    # A phase may train matrices only; AdamW accepts an empty group but a frozen state dict would then differ.
    return make_optimizer([group for group in groups if group["params"]], lr=peaks["lr"], kind=kind, seed=seed)


def load_steps(
    phase: PreparedPhase, accelerator: Accelerator, first: int, num_workers: int
) -> Iterator[tuple[list[TrainingBatch], Callable[[float], dict[str, float]]]]:
    """This process's micro-batches of each step left, made ahead of time, with a progress bar.

    Yields:
        The micro-batches, and a function that gives the step's ``step_s`` (seconds since the step before),
        ``samples_per_s`` (all processes) and ``data_wait`` (share of the step spent waiting for data) once
        it is done, of its time without so many seconds.
    """
    size = phase.config.batch_size
    world = accelerator.num_processes
    parts = micro_batch_count(size, world_size=world, micro_batch_size=phase.config.micro_batch_size)

    def load(item: int) -> TrainingBatch:
        step, part = divmod(item, parts)
        samples = phase.shuffle.take(step * size, size)
        if phase.expect is not None:
            phase.expect(phase.shuffle.upcoming(step * size, phase.steps * size))
        mine = split_step(samples, rank=accelerator.process_index, world_size=world, micro_batches=parts)
        batch = phase.dataset.batch(mine[part])
        return batch.pin_memory() if accelerator.device.type == "cuda" else batch

    with (
        ExitStack() as ending,
        Prefetcher(load, first * parts, phase.steps * parts, num_workers=num_workers) as items,
        progress(phase.name, total=phase.steps, initial=first, unit="step", shown=accelerator.is_main_process) as bar,
    ):
        if phase.expect is not None:
            ending.callback(phase.expect, ())  # a killed run does not wait for shards that nobody reads
        began, waited = time.perf_counter(), 0.0
        stream = iter(items)
        for step in range(first, phase.steps):
            micro_batches = [next(stream) for _ in range(parts)]
            # A step's random numbers are its own (LoRA's dropout): the same after a resume, others on each process.
            torch.manual_seed(step_seed(phase.shuffle.seed, phase.name, step, accelerator.process_index))

            def timing(without: float) -> dict[str, float]:
                nonlocal began, waited
                now = time.perf_counter()
                seconds, wait = max(now - began - without, 1e-9), items.waited - waited
                began, waited = now, items.waited
                return {"step_s": seconds, "samples_per_s": size / seconds, "data_wait": wait / seconds}

            yield micro_batches, timing
            bar.update()


def step_totals(
    micro_batches: list[TrainingBatch], accelerator: Accelerator, *, vocabulary: int
) -> tuple[list[float], tuple[int, int]]:
    """Sums of a whole step, over all processes.

    Returns:
        What each loss is a mean over (`units_of` it); and how many entries of cached logits are read, and how many of
        their tokens have no row in the student's ``vocabulary``.
    """
    counts = [[*units_of(batch), *_count_entries(batch, vocabulary)] for batch in micro_batches]
    local = torch.tensor(counts, dtype=torch.float64).sum(dim=0)
    if accelerator.num_processes > 1:
        local = accelerator.reduce(local.to(accelerator.device), reduction="sum")
    *units, read, beyond = local.tolist()
    return units, (int(read), int(beyond))


def _count_entries(batch: TrainingBatch, vocabulary: int) -> tuple[int, int]:
    logits = batch.targets.get(LogitCodec.signal)
    if logits is None:
        return 0, 0
    return int(logits.entry_mask.sum()), int((logits.entry_mask & (logits.token_ids >= vocabulary)).sum())


def gradient_sync(accelerator: Accelerator, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Exchange gradients between processes on a step's last micro-batch only; of a divided student after each.

    Its gradients would be whole on every process until then.
    """
    return nullcontext() if last else accelerator.no_sync(model)


def clip_gradients(
    accelerator: Accelerator,
    parameters: list[nn.Parameter],
    clip: float,
    terms: list[Losses],
    *,
    where: tuple[str, int],
) -> None:
    """Scale gradients down to a norm; refuse to step on numbers that would ruin the student.

    The losses are this process's, the norm is the same on all; ``where`` is phase and step, counted from 1.
    """
    norm = whole_number(accelerator.clip_grad_norm_(parameters, clip))
    losses = sum_terms(terms)
    # One wait for the device a step; without it the next checkpoint would hold the ruined student.
    if not bool(torch.stack([norm, *losses.values()]).isfinite().all()):
        found = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        raise ModelError(
            f"phase {where[0]}, step {where[1]}: loss or gradient is not finite ({found}; gradient norm "
            f"{float(norm):.4g}); the step was not taken. Lower {where[0]}.lr, or check the cache with "
            "`cachectl verify --deep`"
        )


def sum_terms(terms: list[Losses]) -> dict[str, Tensor]:
    """This process's part of each loss term of a step."""
    named = [term.named() for term in terms]
    return {name: torch.stack([values[name].detach() for values in named]).sum() for name in named[0]}


def extended_training(config: TrainConfig, phases: Sequence[PreparedPhase], hashes: Mapping[str, str]) -> str | None:
    """The fingerprint of the finished training that a longer one goes on with; None if there is none, or it is the same.

    Raises:
        ConfigError: If it cannot be trained on as it is asked for: other options, no more steps, other learning rates.
    """
    earlier = earlier_training(Path(config.output), config, hashes)
    if earlier is None:
        return None
    refuse_other_rates(phases[-1], earlier[1])
    return earlier[0]


def refuse_other_rates(phase: PreparedPhase, earlier: PhaseConfig) -> None:
    """Refuse to go on with a phase that is no longer than it was, or whose steps so far would have had other learning rates.

    Args:
        phase: The longer phase.
        earlier: The phase as it was finished.

    Raises:
        ConfigError: Naming what would keep them.
    """
    done = earlier.step_count(phase.shuffle.length)
    if phase.steps <= done:
        raise ConfigError(
            f"--extend: phase {phase.name} of the finished student has {done} steps, and {phase.steps} are asked for; give more "
            f"({phase.name}.steps), or for a shorter training another --output and no --extend"
        )
    before = replace(phase, config=earlier, steps=done)
    if all(scheduled_rates(before, step) == scheduled_rates(phase, step) for step in range(done)):
        return
    if phase.config.schedule == "constant":
        rise = math.ceil(earlier.warmup * done)
        raise ConfigError(
            f"--extend: phase {phase.name} rose to its learning rate in {rise} of {done} steps, and warmup="
            f"{phase.config.warmup:g} of {phase.steps} steps is another number: add --set {phase.name}.warmup="
            f"{max(0.0, rise - 0.5) / phase.steps:.6g}"
        )
    raise ConfigError(
        f"--extend: phase {phase.name} has the schedule cosine, whose learning rate has fallen to 0 in its {done} steps: of "
        f"{phase.steps} steps each would have had another one. Train {phase.steps} steps in another --output, or begin a new run "
        "from the finished student (--student .../final), with a schedule of its own"
    )


def scheduled_rates(phase: PreparedPhase, step: int) -> dict[RateName, float]:
    """The learning rates of a step of a phase, by name: ``lr`` and those of parts that have their own."""
    config = phase.config
    return {
        name: learning_rate(step, steps=phase.steps, peak=peak, warmup=config.warmup, schedule=config.schedule)
        for name, peak in config.rates.items()
    }
