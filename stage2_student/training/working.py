"""What one phase trains: the student itself, or a copy of it that is divided among processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim import Optimizer

from vlm_distill_cache.stage2_student.students.model import StudentModel
from vlm_distill_cache.stage2_student.students.shards import gather_into, shard_student
from vlm_distill_cache.stage2_student.training.checkpoint import Position, restore_training, write_checkpoint
from vlm_distill_cache.stage2_student.training.optimizers import Kind
from vlm_distill_cache.stage2_student.training.parts import TrainedParts
from vlm_distill_cache.stage2_student.training.preparation import PreparedPhase
from vlm_distill_cache.stage2_student.training.shard_files import write_shares
from vlm_distill_cache.stage2_student.training.steps import build_optimizer


class Working:
    """The model and the optimizer of a phase.

    Attributes:
        model: To run: the student in what accelerate puts around it, or a divided copy.
        core: The same without what is around it.
        parameters: What is trained of it.
        optimizer: Of these.
    """

    model: Any
    core: Any
    parameters: list[nn.Parameter]
    optimizer: Optimizer

    def __init__(
        self,
        phase: PreparedPhase,
        student: StudentModel,
        parts: TrainedParts,
        saved: Mapping[str, Any] | None,
        accelerator: Accelerator,
        *,
        seed: int,
        sharded: bool,
        optimizer: Kind = "adamw",
    ) -> None:
        """Begin a phase afresh, or where a checkpoint of it left it.

        Args:
            phase: What is trained, and how.
            student: On the accelerator's device; where it is divided, on the CPU.
            parts: Its parts.
            saved: What a checkpoint of this phase holds, from `read_checkpoint`; None: it begins.
            accelerator: Of all processes.
            seed: Of new adapters, and of the rounding of bfloat16 weights.
            sharded: Whether the student is divided.
            optimizer: Its kind.
        """
        config, self._accelerator, self._parts, self._student = phase.config, accelerator, parts, student
        by_rate = parts.begin(
            trainable=config.trainable, freeze=config.freeze, seed=seed, tower=phase.tower, apart=config.rates
        )
        if saved is not None:
            parts.load(saved["student"])
        # Accelerate remembers a student that it has prepared, and would leave it without autocast from the second phase on.
        vars(student).pop("_is_accelerate_prepared", None)
        self.core, self.sharded = student, sharded
        if sharded:
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            self.core = shard_student(
                student, device=accelerator.device, processes=accelerator.num_processes, dtype=dtype
            )
            shares = dict(zip(map(id, student.parameters()), self.core.parameters(), strict=True))
            by_rate = {rate: [shares[id(value)] for value in whole] for rate, whole in by_rate.items()}
        built = build_optimizer(by_rate, config.rates, weight_decay=config.weight_decay, kind=optimizer, seed=seed)
        if saved is not None:
            restore_training(saved, built)
        self.parameters = [value for values in by_rate.values() for value in values]
        if sharded:  # its gathered weights have the arithmetic's precision, which autocast would keep copies of
            self.model, self.optimizer = self.core, accelerator.prepare_optimizer(built, device_placement=False)
        else:
            self.model, self.optimizer = accelerator.prepare(self.core, built)
        self.model.train()

    def bring_back(self) -> None:
        """Let the student be what is trained of it; every process calls this."""
        if self.sharded:
            gather_into(self._student, self.core)

    def save(self, output: Path, position: Position, *, fingerprint: str, keep: int) -> None:
        """Write a checkpoint, from the main process or, of a divided student, from all; they wait for each other."""
        state = self._parts.state(self.core)

        def write(folder: Path | None) -> None:
            place = broadcast_object_list([folder])[0]
            write_shares(place, state["values"], self.optimizer)

        if self._accelerator.is_main_process:
            write_checkpoint(
                output,
                position,
                student=state,
                optimizer=self.optimizer,
                fingerprint=fingerprint,
                keep=keep,
                shares=write if self.sharded else None,
            )
        elif self.sharded:
            write(None)
        self._accelerator.wait_for_everyone()

    def end(self) -> None:
        """Take the student out of its wrappers, and merge what adapters it has."""
        self.bring_back()
        self._accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        del self.model, self.core, self.parameters, self.optimizer
        self._accelerator.free_memory()
        self._parts.finish()
