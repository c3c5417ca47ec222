"""One JSON object an optimizer step, and the same curves for TensorBoard.

Losses stay tensors until ``flush``: reading a number from an accelerator at every step would make the host
wait for it. On resume, lines after the checkpoint are cut away, so that no step appears twice.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vlm_distill_cache.common.files.atomic import write_bytes_atomic

LOG = "log.jsonl"
NOT_LOSSES = ("step", "phase", "lr", "projector_lr", "tower_lr", "step_s", "samples_per_s", "data_wait")


def read_log(output: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, in order; an unfinished last line of a killed run is left out."""
    path = output / LOG
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]


def summarise(log: Sequence[Mapping[str, Any]]) -> str:
    """Steps, speed, waiting and last losses of each phase, as a text table."""
    lines = []
    for phase in dict.fromkeys(str(record["phase"]) for record in log):
        records = [record for record in log if record["phase"] == phase]
        seconds = sum(record["step_s"] for record in records)
        samples = sum(record["samples_per_s"] * record["step_s"] for record in records)
        waited = sum(record["data_wait"] * record["step_s"] for record in records)
        last = {k: v for k, v in records[-1].items() if k not in NOT_LOSSES}
        lines.append(
            f"{phase}: {len(records)} steps, {seconds:.0f} s, {samples / seconds:.1f} samples/s, "
            f"data_wait {100 * waited / seconds:.1f} %; last "
            + ", ".join(f"{name} {value:.3f}" for name, value in last.items())
        )
    return "\n".join(lines)


class TrainingLog:
    """Collects the steps of all processes; the main one writes them.

    Attributes:
        records: Every step of the run so far, those before a resume included (main process only).
    """

    def __init__(self, output: Path, accelerator: Accelerator, *, resume_step: int, flush_every: int = 1) -> None:
        """Open the log, keeping the steps up to ``resume_step``.

        ``resume_step`` is 0 for a fresh start; ``flush_every`` is in steps.
        """
        self._accelerator = accelerator
        self._flush_every = flush_every
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self.records: list[dict[str, Any]] = []
        self._writer: SummaryWriter | None = None
        if accelerator.is_main_process:
            self.records = [record for record in read_log(output) if record["step"] <= resume_step]
            text = "".join(json.dumps(record) + "\n" for record in self.records)
            write_bytes_atomic(output / LOG, text.encode())
            self._path = output / LOG
            self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=resume_step + 1)

    def add(self, losses: dict[str, Tensor], **values: Any) -> None:
        """Remember one step.

        Of each loss term (float scalars) this process has its share; the sum over processes is logged. ``values`` are
        plain, such as ``step`` and ``phase``, and the main process's.
        """
        self._pending.append((values, {name: value.detach() for name, value in losses.items()}))
        if len(self._pending) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Write the remembered steps; every process must call it at the same steps."""
        if not self._pending:
            return
        stacked = torch.stack([torch.stack(list(losses.values())).float() for _, losses in self._pending])
        numbers = self._accelerator.reduce(stacked, reduction="sum").tolist()
        if self._accelerator.is_main_process and self._writer is not None:
            with self._path.open("a") as file:
                for (values, losses), row in zip(self._pending, numbers, strict=True):
                    record = {**values, **dict(zip(losses, row, strict=True))}
                    self.records.append(record)
                    file.write(json.dumps(record) + "\n")
                    for name, value in record.items():
                        if isinstance(value, float):
                            self._writer.add_scalar(f"train/{name}", value, record["step"])
        self._pending.clear()

    def close(self) -> None:
        """Write what is left and close the files."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
