"""One JSON object an optimizer step, and the same curves for trackers.

Losses stay tensors until ``flush``: reading a number from an accelerator at every step would make the host
wait for it. On resume, lines after the checkpoint are cut away, so that no step appears twice. What is logged is
shown and never decides what is trained: lines that cannot be read are left out, and their number is said.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import parse_json, read_bounded, write_bytes_atomic
from vlm_distill_cache.common.files.signed import refuse_out_of_reach
from vlm_distill_cache.stage2_student.config import PHASE_NAMES, Tracker
from vlm_distill_cache.stage2_student.training.trackers import Trackers

LOG = "log.jsonl"
TIMES = ("step_s", "samples_per_s", "data_wait")
NOT_LOSSES = ("step", "phase", "lr", "projector_lr", "tower_lr", *TIMES)
_MOST_BYTES = 1 << 30
_MOST = 1e300  # larger numbers are none of ours, and need not be floats
_log = logging.getLogger(__name__)


def read_log(output: Path, phases: Sequence[tuple[str, int]] = ()) -> list[dict[str, Any]]:
    """The logged steps of a run, in order; what cannot be read is left out, and said in a line.

    ``phases`` are name and steps of each, as far as the run has come: a step of another phase is none of it, and steps
    that are not there are said as well. The unfinished last line of a killed run is nothing to mention.

    Raises:
        ConfigError: If the system does not let it be read: a resumed run would write it anew.
    """
    path = output / LOG
    try:
        lines = read_bounded(Path(os.path.realpath(path)), max_bytes=_MOST_BYTES).split(b"\n")
    except FileNotFoundError:
        lines = []
    except CacheFormatError as error:
        refuse_out_of_reach(path, error)
        _log.warning("the log is left out: %s", error)
        lines = []
    names = [name for name, steps in phases for _ in range(steps)]
    found: dict[int, dict[str, Any]] = {}
    damaged = 0
    for number, line in enumerate(filter(None, lines), 1):
        record = _parse_record(line, f"{path}, line {number}")
        if record is not None and (not phases or names[record["step"] - 1 : record["step"]] in ([], [record["phase"]])):
            found[record["step"]] = record
        elif line is not lines[-1]:
            damaged += 1
    lost = len(names) - len(found.keys() & set(range(1, len(names) + 1)))
    if damaged or lost:
        missing = f", and {lost} of {len(names)} steps are missing" if lost else ""
        _log.warning("%s: %d lines are damaged and left out%s; this changes no student", path, damaged, missing)
    return [found[step] for step in sorted(found)]


def _parse_record(line: bytes, where: str) -> dict[str, Any] | None:
    """A line of the log; None if it is not one that `TrainingLog` writes."""
    try:
        record = parse_json(line, where)
    except CacheFormatError:
        return None
    sound = (
        isinstance(record, dict)
        and record.keys() >= {"step", "phase", "total", *TIMES}
        and record["phase"] in PHASE_NAMES
        and all(key.isidentifier() for key in record)
        and all(type(value) in (int, float) and abs(value) < _MOST for key, value in record.items() if key != "phase")
        and type(record["step"]) is int
        and record["step"] > 0
    )
    return record if sound else None


def phase_values(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each phase: ``phase``, ``steps``, ``seconds``, ``samples_per_s``, ``data_wait`` (a share), ``last`` (losses)."""
    values = []
    for phase in dict.fromkeys(str(record["phase"]) for record in log):
        records = [record for record in log if record["phase"] == phase]
        seconds = max(sum(record["step_s"] for record in records), 1e-9)
        values.append(
            {
                "phase": phase,
                "steps": len(records),
                "seconds": seconds,
                "samples_per_s": sum(record["samples_per_s"] * record["step_s"] for record in records) / seconds,
                "data_wait": sum(record["data_wait"] * record["step_s"] for record in records) / seconds,
                "last": {name: value for name, value in records[-1].items() if name not in NOT_LOSSES},
            }
        )
    return values


def summarise(log: Sequence[Mapping[str, Any]]) -> str:
    """`phase_values` as a text table."""
    return "\n".join(
        f"{found['phase']}: {found['steps']} steps, {found['seconds']:.0f} s, {found['samples_per_s']:.1f} samples/s, "
        f"data_wait {100 * found['data_wait']:.1f} %; last "
        + ", ".join(f"{name} {value:.3f}" for name, value in found["last"].items())
        for found in phase_values(log)
    )


class TrainingLog:
    """Collects the steps of all processes; the main one writes them.

    Attributes:
        records: Every step of the run so far, those before a resume included (main process only).
    """

    def __init__(
        self,
        output: Path,
        accelerator: Accelerator,
        *,
        done: Sequence[tuple[str, int]],
        flush_every: int = 1,
        trackers: Sequence[Tracker] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log, keeping the steps of the phases, by name and steps, that are ``done``.

        ``done`` is empty for a fresh start; ``flush_every`` is in steps; ``trackers`` draw the curves, and services among
        them are told the ``settings``, nested plain values.

        Raises:
            ConfigError: If a tracker does not start.
        """
        resume_step = sum(steps for _, steps in done)
        self._accelerator = accelerator
        self._flush_every = flush_every
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self.records: list[dict[str, Any]] = []
        self._path = output / LOG
        self._trackers: Trackers | None = None
        if accelerator.is_main_process:
            if resume_step:
                self.records = [record for record in read_log(output, done) if record["step"] <= resume_step]
            text = "".join(json.dumps(record) + "\n" for record in self.records)
            write_bytes_atomic(self._path, text.encode())
            self._trackers = Trackers(trackers, output, done=resume_step, settings=settings or {})

    def add(self, losses: dict[str, Tensor], **values: Any) -> None:
        """Remember one step.

        Of each loss term (float scalars) this process has its share; the sum over processes is logged. ``values`` are
        plain, such as ``step`` and ``phase``, and the main process's.
        """
        self._pending.append((values, {name: value.detach() for name, value in losses.items()}))
        if len(self._pending) >= self._flush_every:
            self.flush()

    def flush(self, *, durably: bool = False) -> None:
        """Write the remembered steps, and the log so far to the disk; every process must call it at the same steps."""
        if self._pending:
            self._write()
        if durably and self._accelerator.is_main_process:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def _write(self) -> None:
        stacked = torch.stack([torch.stack(list(losses.values())).float() for _, losses in self._pending])
        numbers = self._accelerator.reduce(stacked, reduction="sum").tolist()
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                for (values, losses), row in zip(self._pending, numbers, strict=True):
                    record = {**values, **dict(zip(losses, row, strict=True))}
                    self.records.append(record)
                    file.write(json.dumps(record) + "\n")
                    self.draw("train", record, step=record["step"])
        self._pending.clear()

    def draw(self, group: str, values: Mapping[str, Any], *, step: int) -> None:
        """Show the floats among some values of a step, counted from 1, by the trackers alone."""
        if self._trackers is not None:
            floats = {f"{group}/{name}": value for name, value in values.items() if isinstance(value, float)}
            self._trackers.log(floats, step=step)

    def close(self) -> None:
        """Write what is left and close the files."""
        self.flush()
        if self._trackers is not None:
            self._trackers.close()
