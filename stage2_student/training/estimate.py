"""``distill estimate``: memory, hours and cost of a training, from a few steps of each of its phases.

Weights, gradients and averages follow from the student's shapes and the options; what a step takes beside them, and how long
it is, is measured by the code of a real training, which is stopped before it writes a checkpoint. Where a student cannot be
trained here, for lack of its weights or of memory, its decoder is passed without values, and hours are not known.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.disk import free_main_memory
from vlm_distill_cache.common.hub import is_without_weights, public_name
from vlm_distill_cache.common.models.published import is_published
from vlm_distill_cache.common.printing import size_words
from vlm_distill_cache.stage2_student.batches.sampler import micro_batch_count
from vlm_distill_cache.stage2_student.config import MOST, PhaseName, TrainConfig
from vlm_distill_cache.stage2_student.students.build import preset_shell
from vlm_distill_cache.stage2_student.students.encoder import longest_sequence
from vlm_distill_cache.stage2_student.training.live_bytes import LiveBytes
from vlm_distill_cache.stage2_student.training.memory import Held, decoder_activations, predicted
from vlm_distill_cache.stage2_student.training.preparation import Found, find_all

LOOKED_AT = 8  # samples that tell how long a pass is, where none is run
MOST_PROCESSES = 64
_FLOAT = 4
_log = logging.getLogger(__name__)
Train = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class PhaseFigures:
    """One phase.

    Attributes:
        steps: Optimizer steps.
        samples: Of a step.
        passed: Of a forward pass.
        tokens: Of the longest sample of a pass; None: not looked at, because passes were measured.
        held: From step to step.
        step_bytes: What a step takes beside weights, gradients and averages: activations, and whatever else lives for a while.
        seconds: Of a step; None: not known.
    """

    name: PhaseName
    steps: int
    samples: int
    passed: int
    tokens: int | None
    held: Held
    step_bytes: int
    seconds: float | None

    @property
    def memory(self) -> int:
        """Bytes at its peak."""
        return self.held.total + self.step_bytes


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way of training the same student.

    Attributes:
        options: What is set otherwise than asked for.
        memory: Bytes of one process at the peak of the largest phase.
        processes: That are needed.
        same: The student is the same up to rounding.
    """

    options: str
    memory: int
    processes: int = 1
    same: bool = True


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All that is known of a training.

    Attributes:
        load: Seconds until the first step.
        unknown: Why nothing was run; None: steps were.
        memory_limit: Bytes of a device, if that was asked for.
        price: Of the machine for an hour.
    """

    student: str
    parameters: int
    device: str
    phases: tuple[PhaseFigures, ...]
    choices: tuple[Choice, ...]
    load: float
    unknown: str | None
    memory_limit: float | None
    price: float | None

    @property
    def memory(self) -> int:
        """Bytes at the peak of the largest phase."""
        return max(phase.memory for phase in self.phases)

    @property
    def hours(self) -> float | None:
        """Of all steps, one process; scores that are made on the way are not counted."""
        if self.unknown is not None:
            return None
        return (self.load + sum(phase.steps * (phase.seconds or 0.0) for phase in self.phases)) / 3600

    def fits(self, memory: int) -> bool | None:
        """Whether so many bytes fit; None where nobody asked."""
        return None if self.memory_limit is None else memory <= self.memory_limit

    @property
    def fitting(self) -> Choice | None:
        """The first way that fits: those of the same result come first."""
        return next((choice for choice in self.choices if self.fits(choice.memory)), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON."""
        hours = self.hours
        return {
            "student": self.student,
            "parameters": self.parameters,
            "device": self.device,
            "memory_bytes": self.memory,
            "memory_limit": self.memory_limit,
            "fits": self.fits(self.memory),
            "hours": hours,
            "cost": None if hours is None or self.price is None else hours * self.price,
            "hours_unknown": self.unknown,
            "phases": [{**asdict(phase), "memory_bytes": phase.memory} for phase in self.phases],
            "choices": [{**asdict(choice), "fits": self.fits(choice.memory)} for choice in self.choices],
            "fitting": None if self.fitting is None else self.fitting.options,
            "assumptions": assumptions(self),
        }


def estimate(
    config: TrainConfig,
    caches: Mapping[str, TeacherCache],
    *,
    train: Train,
    steps: int,
    memory: float | None = None,
    price: float | None = None,
) -> Estimate:
    """Run a few steps of each phase, and carry them over to the whole training; nothing is written but temporary files.

    Args:
        config: What `train` would get.
        caches: Those it names.
        train: `stage2_student.train.train`.
        steps: That are timed of each phase, behind one that is not and one whose memory is counted.
        memory: Bytes of a device.
        price: For an hour.

    Raises:
        DistillError: With the remedy, if student, cache or data cannot be used.
    """
    began = time.perf_counter()
    shell, found, unknown = _look(config, caches)
    sizes = _sizes(config, caches, found)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    held = {name: predicted(shell, config, config.phase(name)) for name in sizes}
    half = config.dtype == "bfloat16"
    tokens = {name: _tokens(config, caches, found, name) for name in sizes} if unknown else {}
    parameters = sum(value.numel() for value in shell.parameters())
    if unknown is None:
        needed = max(max(of_one.total for of_one in held.values()), _FLOAT * parameters)
        free = torch.cuda.mem_get_info()[0] if on_gpu else free_main_memory()
        if needed > free:
            unknown = f"a step needs {size_words(needed)} and more, and {size_words(free)} are free here"
            tokens = {name: _tokens(config, caches, found, name) for name in sizes}
    figures = []
    for name, (count, samples) in sizes.items():
        passed = -(-samples // _passes(config, name))
        if unknown is None:
            _log.info("%s: %d steps of %d samples are run to be measured", name, steps + 2, samples)
            seconds, taken = _measure(config, name, count, caches, train=train, steps=steps)
            beside = max(0, taken - held[name].gradients)
        else:
            seconds = None
            beside = decoder_activations(
                shell, tokens=tokens[name], samples=passed, half=half, checkpointing=config.gradient_checkpointing
            )
        figures.append(
            PhaseFigures(
                name=name,
                steps=count,
                samples=samples,
                passed=passed,
                tokens=tokens.get(name),
                held=held[name],
                step_bytes=beside,
                seconds=seconds,
            )
        )
    ran = sum((steps + 2) * (phase.seconds or 0.0) for phase in figures)
    return Estimate(
        student=public_name(config.student),
        parameters=parameters,
        device=torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        phases=tuple(figures),
        choices=tuple(_choices(config, shell, figures, memory)),
        load=max(0.0, time.perf_counter() - began - ran) / len(figures),
        unknown=unknown,
        memory_limit=memory,
        price=price,
    )


def _look(config: TrainConfig, caches: Mapping[str, TeacherCache]) -> tuple[Any, Found | None, str | None]:
    """The student on no device, what else was found, and why it cannot be run."""
    first = caches[str(config.phase(config.phases[0]).cache)]
    if config.student_weights is None and config.vision_tower is None:
        shell = preset_shell(config.student, first.path, projector=config.projector)
        if shell is not None:
            return shell, None, "its weights and its vision tower are not here, and sizes are those of its preset"
    folder = Path(config.student_weights or config.student)
    missing = is_without_weights(folder)
    if missing and is_published(folder):
        raise ConfigError(
            f"student {public_name(config.student)}: what it holds is known once its weights are here; `hf download` brings "
            "them. Or give its name and size, whose sizes are known without: --student mobilevlm-1.7b"
        )
    found = find_all(config, caches)
    return found.parts.model, found, "its weights are not here; `hf download` brings them" if missing else None


def _sizes(
    config: TrainConfig, caches: Mapping[str, TeacherCache], found: Found | None
) -> dict[PhaseName, tuple[int, int]]:
    """Steps, and samples of a step, of each phase that has any."""
    if found is not None:
        return {phase.name: (phase.steps, phase.config.batch_size) for phase in found.phases if phase.steps}
    phases = {name: config.phase(name) for name in config.phases}
    counts = {name: phase.step_count(len(caches[str(phase.cache)])) for name, phase in phases.items()}
    if not any(counts.values()):
        raise ConfigError(f"no phase of {', '.join(config.phases)} has a step; set steps or epochs")
    return {name: (count, phases[name].batch_size) for name, count in counts.items() if count}


def _passes(config: TrainConfig, name: PhaseName, processes: int = 1) -> int:
    phase = config.phase(name)
    return processes * micro_batch_count(
        phase.batch_size, world_size=processes, micro_batch_size=phase.micro_batch_size
    )


def _tokens(config: TrainConfig, caches: Mapping[str, TeacherCache], found: Found | None, name: PhaseName) -> int:
    """How long a pass is, where none is run: the longest of a few samples, or what the cache admits."""
    phase = next((phase for phase in found.phases if phase.name == name), None) if found else None
    if phase is None:
        return config.max_length or longest_sequence(caches[str(config.phase(name).cache)].plan)
    places = phase.shuffle.take(0, min(LOOKED_AT, phase.config.batch_size))
    return int(phase.dataset.batch(places).inputs.input_ids.shape[1])


class _Enough(Exception):  # noqa: N818 - not an error
    """The steps that were wanted are done."""


class _Watch:
    """Called after each step of a training: the first warms up, of the second the memory is counted, others are timed."""

    def __init__(self, steps: int) -> None:
        self._steps, self._taken, self._began = steps, 0, 0.0
        self._live: LiveBytes | None = None
        self._before = 0
        self.seconds: list[float] = []
        self.bytes = 0

    def __call__(self, position: Any, student: Any) -> None:
        now = time.perf_counter()
        self._taken += 1
        if self._taken == 1:
            self._begin(student)
        elif self._taken == 2:
            self.end()
        else:
            self.seconds.append(now - self._began)
            if len(self.seconds) == self._steps:
                raise _Enough
        self._began = time.perf_counter()

    def _begin(self, student: Any) -> None:
        device = next(student.parameters()).device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._live = LiveBytes(*student.parameters(), *student.buffers())
            self._live.__enter__()

    def end(self) -> None:
        """Count no longer."""
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self.bytes, self._live = self._live.peak, None
        elif self._before:
            self.bytes = torch.cuda.max_memory_allocated() - self._before


def _measure(
    config: TrainConfig,
    name: PhaseName,
    count: int,
    caches: Mapping[str, TeacherCache],
    *,
    train: Train,
    steps: int,
) -> tuple[float, int]:
    """Seconds of a step of a phase, and bytes that one takes beside weights and averages."""
    watch = _Watch(steps)
    with tempfile.TemporaryDirectory() as scratch:
        # As many steps as it will have, or one that is not reached: the last step of a phase writes a checkpoint.
        phase = replace(getattr(config, name), steps=max(count, steps + 3), epochs=None)
        alone: dict[str, Any] = {name: phase, "phases": (name,)}
        quiet = replace(config.evaluation, every=None)
        probe = replace(
            config, **alone, output=scratch, report_to=(), evaluation=quiet, pixel_cache="none", checkpoint_every=MOST
        )
        try:
            train(probe, caches=dict(caches), after_step=watch)
        except _Enough:
            pass
        finally:
            watch.end()
    return median(watch.seconds), watch.bytes


def _choices(config: TrainConfig, shell: Any, figures: list[PhaseFigures], limit: float | None) -> Iterator[Choice]:
    """Ways of training the same student in less memory: first those of the same result, then others."""
    yield Choice(options="", memory=max(phase.memory for phase in figures))
    small = {phase.name: {"micro_batch_size": 1} for phase in figures if phase.passed > 1}
    whole = [phase.name for phase in figures if config.phase(phase.name).trainable in ("all", "tower")]
    adapted = {name: {**small.get(name, {}), "trainable": "lora", "tower_lr": None} for name in whole}
    lora = {} if not adapted else small | adapted
    again = {} if config.gradient_checkpointing else {"gradient_checkpointing": True}
    half = {} if config.weights == "bfloat16" else {"dtype": "bfloat16", "weights": "bfloat16"}
    bits = {} if config.optimizer == "adamw8bit" else {"optimizer": "adamw8bit"}
    ways: list[tuple[dict[str, Any], dict[PhaseName, dict[str, Any]], bool]] = [
        ({}, small, True),
        (again, small, True),
        (again | bits, small, False),
        (again | half, small, False),
        (again | half | bits, small, False),
        (again, lora, False),
        (again | half | {"quantisation": "4bit"}, lora, False),
    ]
    seen: set[tuple[str, ...]] = {()}
    for top, below, same in ways:
        words = _words(top, below)
        if tuple(words) in seen or (below is lora and not lora) or (not same and top == again and below is small):
            continue
        seen.add(tuple(words))
        memory = _memory_of(config, shell, figures, top, below)
        if memory is not None:
            yield Choice(options=" ".join(words), memory=memory, same=same)
    if config.sharding == "none" and not any((config.weights == "bfloat16", config.quantisation != "none")):
        yield from _divided(config, shell, figures, again | {"sharding": "fsdp2", "optimizer": "adamw"}, limit)


def _divided(
    config: TrainConfig, shell: Any, figures: list[PhaseFigures], top: dict[str, Any], limit: float | None
) -> Iterator[Choice]:
    """The least number of processes whose shares fit; without a limit, eight."""
    most = min(MOST_PROCESSES, *(phase.samples for phase in figures))
    small: dict[PhaseName, dict[str, Any]] = {phase.name: {"micro_batch_size": 1} for phase in figures}
    counts = [2**power for power in range(1, 7) if 2**power <= most]
    for processes in counts if limit is not None else counts[2:3] or counts[-1:]:
        memory = _memory_of(config, shell, figures, top, small, processes=processes)
        if memory is not None and (limit is None or memory <= limit or processes == counts[-1]):
            shown = _words({name: value for name, value in top.items() if value != getattr(config, name)}, small)
            yield Choice(options=" ".join(shown), memory=memory, processes=processes)
            return


def _words(top: Mapping[str, Any], below: Mapping[PhaseName, Mapping[str, Any]]) -> list[str]:
    """Options as they are given."""
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in top.items()]
    for name, given in below.items():
        words += [f"{name}.{key}={value}" for key, value in given.items() if value is not None]
    return words


def _memory_of(
    config: TrainConfig,
    shell: Any,
    figures: list[PhaseFigures],
    top: Mapping[str, Any],
    below: Mapping[PhaseName, Mapping[str, Any]],
    *,
    processes: int = 1,
) -> int | None:
    """Bytes at the peak with other options; None: they do not go together with the others."""
    try:
        phases = {name: replace(getattr(config, name), **given) for name, given in below.items()}
        other = replace(config, **phases, **top)
        found = []
        for phase in figures:
            held = predicted(shell, other, other.phase(phase.name), processes=processes)
            passed = -(-phase.samples // _passes(other, phase.name, processes))
            beside = phase.step_bytes * passed / phase.passed
            if other.dtype != config.dtype:
                beside /= 2  # most of what is kept is in the arithmetic's precision
            if other.gradient_checkpointing and not config.gradient_checkpointing:
                beside *= _kept_share(shell)
            found.append(held.total + round(beside))
    except (ConfigError, ModelError):
        return None
    return max(found)


def _kept_share(shell: Any) -> float:
    """What a decoder keeps with gradient checkpointing, of what it keeps without."""
    sizes = [
        decoder_activations(shell, tokens=LOOKED_AT, samples=1, half=False, checkpointing=again)
        for again in (True, False)
    ]
    return sizes[0] / sizes[1]


def assumptions(estimate: Estimate) -> list[str]:
    """What the figures rest on, a sentence each."""
    lines = []
    if estimate.unknown is None:
        lines.append(
            f"steps are timed on this machine ({estimate.device}), one process; a few stand for all, and scores are not counted"
        )
        if estimate.device.startswith("CPU"):
            lines.append(
                "what a step takes is counted from tensors: what is inside one operation of the library is not seen"
            )
    else:
        tokens = max(phase.tokens or 0 for phase in estimate.phases)
        lines.append(
            f"nothing was run: activations are the decoder's alone, of samples of {tokens} tokens; vision tower and losses "
            "come on top"
        )
    lines.append(
        "memory of other ways is reckoned from this one: activations by samples of a pass and by layers that are computed again, "
        "all else from shapes; a device's allocator takes 5 to 10 % more"
    )
    return lines


def estimate_text(estimate: Estimate) -> str:
    """Describe an estimate for a terminal: memory of each phase, hours, other ways, the assumptions."""
    total = sum(phase.steps for phase in estimate.phases)
    lines = [
        f"Estimate for student {estimate.student}: {estimate.parameters:,} parameters, {total} steps",
        f"  {'phase':<7}{'steps':>8}{'a pass':>8}{'trained':>16}{'weights':>11}{'gradients':>11}{'averages':>11}"
        f"{'step':>11}{'memory':>11}{'s/step':>9}",
    ]
    for phase in estimate.phases:
        held = phase.held
        sizes = (held.weights, held.gradients, held.averages, phase.step_bytes, phase.memory)
        lines.append(
            f"  {phase.name:<7}{phase.steps:>8}{phase.passed:>8}{held.trained:>16,}"
            + "".join(f"{size_words(size):>11}" for size in sizes)
            + ("        -" if phase.seconds is None else f"{phase.seconds:>9.2f}")
        )
    limit = estimate.memory_limit
    asked = (
        "" if limit is None else f" ({'fits' if estimate.fits(estimate.memory) else 'more than'} {size_words(limit)})"
    )
    lines.append(f"Memory at its peak: {size_words(estimate.memory)}{asked}")
    hours = estimate.hours
    if hours is None:
        lines.append(f"Hours: not known: {estimate.unknown}")
    else:
        cost = "" if estimate.price is None else f", cost {hours * estimate.price:.2f}"
        lines.append(f"Hours: {_hours(hours)}{cost}")
    lines.append("Other ways, one process each unless stated:")
    for choice in estimate.choices[1:]:
        fits = {None: "", True: "  fits", False: "  no"}[estimate.fits(choice.memory)]
        several = "" if choice.processes == 1 else f" ({choice.processes} processes)"
        other = "" if choice.same else "  (another student)"
        lines.append(f"  {size_words(choice.memory):>10}{fits:<6}  {choice.options}{several}{other}")
    if limit is not None and not estimate.fits(estimate.memory):
        found = estimate.fitting
        lines.append(
            f"None of these fits {size_words(limit)}: choose a smaller student, or shorter samples (max_length)"
            if found is None
            else "Fits: "
            + " ".join(f"--set {option}" for option in found.options.split())
            + (f", with {found.processes} processes" if found.processes > 1 else "")
        )
    return "\n".join([*lines, "Assumed:", *(f"  - {line}" for line in assumptions(estimate))])


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"
