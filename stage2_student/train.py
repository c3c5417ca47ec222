"""The training loop: phase after phase, step after step, on samples and a teacher cache; no teacher in sight.

Cost: a distilled step takes about as long as a plain fine-tuning step, because the cache is decoded on
loading threads and attention is recomputed for the wanted rows of the wanted layers only. Run it under
``accelerate launch`` for several processes: a step then sees the same samples and has the same gradient.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from common.atomic import clean_stale, create_temporary, publish_directory, remove, write_json_atomic
from common.config import config_from_dict, config_to_dict, save_config
from common.errors import CacheMismatchError, ConfigError, ModelError
from common.mirror import public_location
from common.models.mobilevlm import MobileVLMForConditionalGeneration
from common.visual_attention import AttentionCapture
from stage2_student.checkpoint import Position, find_resume_point, restore, write_checkpoint
from stage2_student.config import TrainConfig, public_config
from stage2_student.objective import LossTerms, step_shares
from stage2_student.optim import build_optimizer, learning_rate, set_learning_rate
from stage2_student.prefetch import Prefetcher
from stage2_student.preparation import Preparation, PreparedPhase, prepare
from stage2_student.sampler import micro_batch_count, split_step
from stage2_student.training_batch import TrainingBatch
from stage2_student.training_log import TrainingLog

AfterStep = Callable[[Position, MobileVLMForConditionalGeneration], None]
FINAL = "final"
PROVENANCE = "distillation.json"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        log: One record a step, as in ``log.jsonl``; empty on other than the main process.
        model: The trained student, on its device.
        preparation: Encoder, tokenizer and joined data, for an evaluation in the same process.
        final: Folder with the saved student, tokenizer and image processor.
    """

    log: list[dict[str, Any]]
    model: MobileVLMForConditionalGeneration
    preparation: Preparation
    final: Path


def train(config: TrainConfig, *, after_step: AfterStep | None = None) -> TrainResult:
    """Train a student through its phases, from the newest checkpoint if there is one.

    Args:
        config: The run.
        after_step: Called after every optimizer step with the position and the student, e.g. to evaluate.

    Returns:
        The log and the trained student, which also lies in ``OUTPUT/final``.
    """
    # All processes: everything that can be wrong is found here, before the first step.
    run = prepare(config)
    accelerator = build_accelerator(config)
    refuse_different_runs(accelerator, run.fingerprint)
    resume = find_resume_point(Path(config.output), run.fingerprint)
    position = Position() if resume is None else resume.position
    log = start_log(config, accelerator, position)
    student = run.student.to(accelerator.device)

    for index, phase in enumerate(run.phases[position.phase :], position.phase):
        # Once a phase: what is trained, and an optimizer that starts afresh or where the checkpoint left it.
        parameters = student.trainable_parameters("dpt" if phase.config.trainable == "projector" else "dft")
        optimizer = build_optimizer(parameters, peak=phase.config.lr, weight_decay=phase.config.weight_decay)
        if resume is not None:
            restore(resume, student, optimizer)
            resume = None
        model, optimizer = accelerator.prepare(student, optimizer)
        capture = AttentionCapture(student.language_model) if phase.config.losses.attends else None
        model.train()

        for micro_batches, timing in load_steps(phase, accelerator, position.step, config.num_workers):
            # Once a step: forward and backward over this process's part of the step's samples.
            terms: list[LossTerms] = []
            shares = step_shares(micro_batches, step_totals(micro_batches, accelerator))
            for batch, share in zip(micro_batches, shares, strict=True):
                with gradient_sync(accelerator, model, last=len(terms) + 1 == len(micro_batches)):
                    terms.append(phase.objective(model, capture, batch.to(accelerator.device), share))
                    # The shares of all processes add up to one, and DDP divides by their number.
                    accelerator.backward(terms[-1].total * accelerator.num_processes)
            clip_gradients(accelerator, parameters, config.clip, terms, where=(phase.name, position.step + 1))
            rate = scheduled_rate(phase, position.step)
            set_learning_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # Once a step: count, log; now and then: checkpoint.
            position = position.advance(phase.config.batch_size)
            log.add(sum_terms(terms), step=position.total_steps, phase=phase.name, lr=rate, **timing())
            if position.step % config.checkpoint_every == 0 or position.step == phase.steps:
                log.flush()
                save(config, run.fingerprint, position, accelerator, student, optimizer)
            if after_step is not None:
                after_step(position, student)
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator.free_memory()
        position = replace(position, phase=index + 1, step=0, samples=0)

    log.close()
    return TrainResult(
        log=log.records, model=student, preparation=run, final=export(config, run, accelerator)
    )


def train_student(*, after_step: AfterStep | None = None, **options: Any) -> TrainResult:
    """Train in this process with flat keyword arguments, as an experiment does for each arm and seed.

    Args:
        after_step: See :func:`train`.
        **options: Fields of `TrainConfig`; a phase may be a dict of fields of `PhaseConfig`.

    Returns:
        The log and the trained student.

    Raises:
        ConfigError: If an option is unknown or has an unusable value.
    """
    return train(config_from_dict(TrainConfig, options, where="train_student"), after_step=after_step)


def build_accelerator(config: TrainConfig) -> Accelerator:
    """One accelerator for CPU, one device or many processes, as the launcher's environment says.

    Raises:
        ConfigError: If launched processes work side by side without knowing of each other.
    """
    # Without saying so on a machine without an accelerator, launched processes would not find each other.
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=config.precision, cpu=cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, but {accelerator.num_processes} found each other: they "
            "would write over one another's files. Use `accelerate launch` or `torchrun`, one process per device"
        )
    return accelerator


def refuse_different_runs(accelerator: Accelerator, fingerprint: str) -> None:
    """Make sure that all processes opened the same caches: one at an address may change while they start.

    Raises:
        CacheMismatchError: If they did not.
    """
    if accelerator.num_processes > 1 and len(set(gather_object([fingerprint]))) > 1:
        raise CacheMismatchError(
            "the processes of this run opened different caches or options: a cache changed while they started; "
            "start the run again"
        )


def start_log(config: TrainConfig, accelerator: Accelerator, position: Position) -> TrainingLog:
    """Make the output folder, write the configuration beside the output, open the log."""
    output = Path(config.output)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        save_config(config, output / "config.yaml")
    accelerator.wait_for_everyone()
    return TrainingLog(output, accelerator, resume_step=position.total_steps, flush_every=config.log_every)


def load_steps(
    phase: PreparedPhase, accelerator: Accelerator, first: int, num_workers: int
) -> Iterator[tuple[list[TrainingBatch], Callable[[], dict[str, float]]]]:
    """This process's micro-batches of each step left, made ahead of time, with a progress bar.

    Args:
        phase: What to load.
        accelerator: Which process this is.
        first: First optimizer step.
        num_workers: Loading threads.

    Yields:
        The micro-batches, and a function that gives the step's ``step_s`` (seconds since the step before),
        ``samples_per_s`` (all processes) and ``data_wait`` (share of the step spent waiting for data) once
        it is done.
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
        return batch.pinned() if accelerator.device.type == "cuda" else batch

    with (
        ExitStack() as ending,
        Prefetcher(load, first * parts, phase.steps * parts, num_workers=num_workers) as items,
        tqdm(
            total=phase.steps,
            initial=first,
            desc=phase.name,
            unit="step",
            disable=not accelerator.is_main_process,
            mininterval=1.0,
        ) as progress,
    ):
        if phase.expect is not None:
            ending.callback(phase.expect, ())  # a killed run does not wait for shards that nobody reads
        began, waited = time.perf_counter(), 0.0
        stream = iter(items)
        for _ in range(first, phase.steps):
            micro_batches = [next(stream) for _ in range(parts)]

            def timing() -> dict[str, float]:
                nonlocal began, waited
                now = time.perf_counter()
                seconds, wait = max(now - began, 1e-9), items.waited - waited
                began, waited = now, items.waited
                return {"step_s": seconds, "samples_per_s": size / seconds, "data_wait": wait / seconds}

            yield micro_batches, timing
            progress.update()


def step_totals(micro_batches: list[TrainingBatch], accelerator: Accelerator) -> list[float]:
    """What each loss of a whole step is a mean over (``TrainingBatch.units``), over all processes."""
    local = torch.tensor([batch.units for batch in micro_batches], dtype=torch.float64).sum(dim=0)
    if accelerator.num_processes == 1:
        return local.tolist()
    summed: Tensor = accelerator.reduce(local.to(accelerator.device), reduction="sum")
    return summed.tolist()


def gradient_sync(accelerator: Accelerator, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Exchange gradients between processes on a step's last micro-batch only."""
    return nullcontext() if last else accelerator.no_sync(model)


def clip_gradients(
    accelerator: Accelerator,
    parameters: list[nn.Parameter],
    clip: float,
    terms: list[LossTerms],
    *,
    where: tuple[str, int],
) -> None:
    """Scale gradients down to a norm; refuse to step on numbers that would ruin the student.

    Args:
        accelerator: Which knows how.
        parameters: What is trained.
        clip: Largest norm of the gradient of all of them.
        terms: This process's losses of the step; the norm alone is the same on all processes.
        where: Phase and step, counted from 1, for the error.

    Raises:
        ModelError: If loss or gradient is infinite or not a number.
    """
    norm = accelerator.clip_grad_norm_(parameters, clip)
    losses = sum_terms(terms)
    # One wait for the device a step; without it the next checkpoint would hold the ruined student.
    if not bool(torch.stack([norm, *losses.values()]).isfinite().all()):
        found = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        raise ModelError(
            f"phase {where[0]}, step {where[1]}: loss or gradient is not finite ({found}; gradient norm "
            f"{float(norm):.4g}); the step was not taken. Lower {where[0]}.lr, or check the cache with "
            "`cachectl verify --deep`"
        )


def sum_terms(terms: list[LossTerms]) -> dict[str, Tensor]:
    """This process's part of each loss term of a step."""
    named = [term.named() for term in terms]
    return {name: torch.stack([values[name].detach() for values in named]).sum() for name in named[0]}


def scheduled_rate(phase: PreparedPhase, step: int) -> float:
    """The learning rate of a step of a phase."""
    config = phase.config
    return learning_rate(
        step, steps=phase.steps, peak=config.lr, warmup=config.warmup, schedule=config.schedule
    )


def save(
    config: TrainConfig,
    fingerprint: str,
    position: Position,
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: Optimizer,
) -> None:
    """Write a checkpoint from the main process; the others wait for it."""
    if accelerator.is_main_process:
        write_checkpoint(
            Path(config.output),
            position,
            model=student,
            optimizer=optimizer,
            fingerprint=fingerprint,
            keep=config.keep_checkpoints,
        )
    accelerator.wait_for_everyone()


def export(config: TrainConfig, run: Preparation, accelerator: Accelerator) -> Path:
    """Save student, tokenizer and image processor where `from_pretrained` finds all three, atomically."""
    final = Path(config.output) / FINAL
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        clean_stale(final.parent, FINAL)
        temporary, lock = create_temporary(final, directory=True)
        run.student.save_pretrained(temporary)
        run.tokenizer.save_pretrained(temporary)
        run.image_processor.save_pretrained(temporary)
        provenance = {
            "fingerprint": run.fingerprint,
            "caches": {public_location(place): found for place, found in run.cache_hashes.items()},
            "config": config_to_dict(public_config(config)),
            "encoder": dict(run.encoder_description),
        }
        write_json_atomic(temporary / PROVENANCE, provenance)
        remove(final)
        publish_directory(temporary, final)
        if lock is not None:
            lock.release()
    accelerator.wait_for_everyone()
    return final
