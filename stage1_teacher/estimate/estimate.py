"""``teacher-cache estimate``: bytes, hours and cost of a build, from one small shard built in a temporary folder.

The comparison is with running the teacher beside the student in every step, which is what every public method
does. There the teacher's pass is paid per student and epoch, and slowly, because all its attention maps are
wanted; here it is paid once.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

from vlm_distill_cache.common.printing import size_words
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.estimate.probe import Probe, measure_probe
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage1_teacher.planning.parts import fix_threads, refuse_ranks
from vlm_distill_cache.stage1_teacher.quality.fidelity import CONTROL_BATCH

STEP_FORWARDS = 3.0  # a training step costs about three forward passes: one forward, two for the gradients
MAX_STUDENTS = 1_000_000
STUDENT_SHARE = 0.2  # MobileVLM 1.4B beside LLaVA-1.5 7B


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is to be trained from the cache, and what it costs.

    Attributes:
        students: Numbers of students to compare.
        epochs: Passes of each student over the data.
        student_parameters: Of one student; None: a fifth of the teacher's.
        student_step: Seconds of training a sample, if measured; None: three forward passes, scaled by parameters.
        price: Of one device for an hour, in any currency; None: hours only.
    """

    students: tuple[int, ...] = (1, 3, 10)
    epochs: float = 1.0
    student_parameters: float | None = None
    student_step: float | None = None
    price: float | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A probe carried over to a whole data set.

    Attributes:
        fidelity_samples: Of the fidelity card, with which a build ends.
        control_copies: Of each of them in the card's control.
    """

    name: str
    store: str
    sample_count: int
    shard_count: int
    fidelity_samples: int
    control_copies: int
    probe: Probe
    scenario: Scenario

    @property
    def cache_bytes(self) -> int:
        """Bytes of the whole cache on disk."""
        probe = self.probe
        return round(probe.stored * self.sample_count + probe.shard_bytes * self.shard_count + probe.side_bytes)

    @property
    def stage_one_hours(self) -> float:
        """Hours to build the cache on this machine: loading, the main loop, the fidelity probe."""
        passes = self.control_copies + 1  # each sample of the card alone, and once more among copies of itself
        checks = min(self.fidelity_samples, self.sample_count) * (passes * self.probe.teacher + self.probe.encode)
        return (self.probe.load + self.probe.loop * self.sample_count + checks) / 3600

    @property
    def student_parameters(self) -> float:
        """Of one student."""
        return self.scenario.student_parameters or STUDENT_SHARE * self.probe.teacher_parameters

    @property
    def student_step(self) -> float:
        """Seconds a sample that training one student takes without any teacher."""
        if self.scenario.student_step is not None:
            return self.scenario.student_step
        return STEP_FORWARDS * self.probe.plain * self.student_parameters / self.probe.teacher_parameters

    @property
    def online_teacher(self) -> float:
        """Seconds a sample of a teacher beside a student."""
        return self.probe.plain if self.probe.eager is None else self.probe.eager

    def hours(self, students: int) -> tuple[float, float]:
        """Hours for some students, one device: with the teacher beside each, and from the cache, stage one included."""
        passes = students * self.scenario.epochs * self.sample_count / 3600
        return (
            passes * (self.online_teacher + self.student_step),
            self.stage_one_hours + passes * self.student_step,
        )

    @property
    def pays_from(self) -> int | None:
        """The least number of students for which the cache takes less time; None: there is no such number."""
        saved = self.hours(1)[0] - (self.hours(1)[1] - self.stage_one_hours)  # by each student
        return math.floor(self.stage_one_hours / saved) + 1 if saved > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON."""
        rows = []
        for students in self.scenario.students:
            online, offline = self.hours(students)
            row = {"students": students, "online_hours": online, "offline_hours": offline}
            if (price := self.scenario.price) is not None:
                row |= {"online_cost": online * price, "offline_cost": offline * price}
            rows.append(row)
        return {
            "name": self.name,
            "store": self.store,
            "samples": self.sample_count,
            "shards": self.shard_count,
            "cache_bytes": self.cache_bytes,
            "stage_one_hours": self.stage_one_hours,
            "stage_one_samples_per_second": 1 / self.probe.loop,
            "student_parameters": self.student_parameters,
            "student_step_seconds_per_sample": self.student_step,
            "online_teacher_seconds_per_sample": self.online_teacher,
            "epochs": self.scenario.epochs,
            "comparison": rows,
            "pays_from_students": self.pays_from,
            "assumptions": assumptions(self),
            "probe": self.probe.to_dict(),
        }


def estimate(config: BuildConfig, scenario: Scenario, *, samples: int) -> Estimate:
    """Measure a probe and carry it over to the whole data set; writes nothing but temporary files.

    Args:
        config: The options a build would get.
        samples: Size of the probe; no more than the data set has.

    Raises:
        DistillError: With the remedy, if teacher or data cannot be used.
    """
    refuse_ranks(config, "estimate")
    started = time.perf_counter()
    work = open_build(fix_threads(config, several=False, overwrite=True))
    load = time.perf_counter() - started
    copies = min(work.plan.batch_size, CONTROL_BATCH)
    return Estimate(
        name=f"{work.plan.teacher.get('name')} on {work.plan.data.get('name')}",
        store=config.store,
        sample_count=work.plan.sample_count,
        shard_count=work.plan.shard_count,
        fidelity_samples=config.fidelity_samples,
        control_copies=copies,
        probe=measure_probe(work, samples=samples, load=load),
        scenario=scenario,
    )


def assumptions(estimate: Estimate) -> list[str]:
    """What the figures rest on, a sentence each."""
    probe, scenario = estimate.probe, estimate.scenario
    lines = [
        f"the probe's {probe.samples} samples stand for all {estimate.sample_count}: {probe.tokens:.0f} tokens and "
        f"{probe.rows:.1f} supervised rows a sample",
        "what a shard takes whatever it holds is in the line of the shards, not in those of the signals: of few samples it is "
        "much of the cache",
        f"times are this machine's ({probe.device}, {probe.threads} threads of {probe.cores} cores), one process; "
        "reading and writing run beside the teacher where cores are free",
    ]
    if scenario.student_step is None:
        lines.append(
            f"a student of {estimate.student_parameters:.3g} parameters trains at {STEP_FORWARDS:g} forward passes a "
            "sample, a forward pass scaled from the teacher's by parameters; measure one and give --student-step"
        )
    else:
        lines.append(f"a student trains at {scenario.student_step:g} s a sample, as given")
    if probe.eager is None:
        lines.append(
            "eager attention of one sample does not fit this memory: the teacher beside a student is counted "
            "with its SDPA time, which is too little"
        )
    else:
        lines.append(
            "the teacher beside a student runs with eager attention and returns all maps, as the released code "
            f"does, {probe.eager_batch} samples a pass ({probe.eager / probe.plain:.2f} times its SDPA pass)"
        )
    lines.append("both ways on the same device, and it holds teacher and student at once when online")
    return lines


def estimate_text(estimate: Estimate) -> str:
    """Describe an estimate for a terminal: sizes, hours, the comparison, the assumptions."""
    probe, scenario = estimate.probe, estimate.scenario
    rows = max(probe.rows, 1e-9)
    lines = [
        f"Estimate for {estimate.name}: {estimate.sample_count} samples, from {probe.samples} measured ones"
        + (f" ({probe.failed} of the probe could not be used)" if probe.failed else ""),
        f"  {'signal':<20}{'bytes/row':>12}{'bytes/sample':>14}{'on disk/sample':>16}{'on disk, all':>14}",
    ]
    for name, size in probe.signals.items():
        lines.append(
            f"  {name:<20}{size.decoded / rows:>12.1f}{size.decoded:>14.1f}{size.stored:>16.1f}"
            f"{size_words(size.stored * estimate.sample_count):>14}"
        )
    fixed = probe.shard_bytes * estimate.shard_count + probe.side_bytes
    total = estimate.cache_bytes / estimate.sample_count
    lines.append(f"  {f'{estimate.shard_count} shards, projector':<62}{size_words(fixed):>14}")
    whole, all_bytes = f"whole cache ({estimate.store})", size_words(estimate.cache_bytes)
    lines.append(f"  {whole:<20}{total / rows:>12.1f}{'':>14}{total:>16.1f}{all_bytes:>14}")
    lines.append(
        f"Stage one: {_hours(estimate.stage_one_hours)}{_money(scenario.price, estimate.stage_one_hours)} at "
        f"{1 / probe.loop:.1f} samples/s (alone, a sample: read {probe.encode * 1e3:.2f} ms, "
        f"teacher {probe.teacher * 1e3:.2f} ms, write {probe.write * 1e3:.2f} ms)"
    )
    lines.append(f"Memory at its peak: {_memory(probe)}")
    lines.append(f"Training, each student {scenario.epochs:g} times over the data:")
    lines.append(f"  {'students':<10}{'teacher beside the student':>28}{'cache, stage one included':>28}{'ratio':>8}")
    for students in scenario.students:
        online, offline = estimate.hours(students)
        left = _hours(online) + _money(scenario.price, online)
        right = _hours(offline) + _money(scenario.price, offline)
        ratio = online / offline if offline else math.inf
        lines.append(f"  {students:<10}{left:>28}{right:>28}{ratio:>8.2f}")
    pays = estimate.pays_from
    lines.append(
        "  the cache never pays" if pays is None else f"  the cache pays from {pays} student{'s' * (pays > 1)} on"
    )
    lines += ["Assumed:", *(f"  - {line}" for line in assumptions(estimate))]
    return "\n".join(lines)


def _memory(probe: Probe) -> str:
    device = "" if probe.device_memory is None else f"{size_words(probe.device_memory)} on the device, "
    return f"{device}{size_words(probe.host_memory)} in the process that runs the teacher, weights mapped from their files included"


def parse_students(text: str) -> tuple[int, ...]:
    """Read ``1,3,10``; raises ValueError if one is no whole number from 1 to ``MAX_STUDENTS``."""
    numbers = tuple(int(part) for part in text.split(","))
    for number in numbers:
        if not 1 <= number <= MAX_STUDENTS:
            raise ValueError(f"{number} students, of 1 to {MAX_STUDENTS}")
    return numbers


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def _money(price: float | None, hours: float) -> str:
    return "" if price is None else f", cost {hours * price:.2f}"
