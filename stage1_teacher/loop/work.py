"""What a build works with: teacher, data, codecs and the plan."""

from dataclasses import dataclass
from typing import Any

from vlm_distill_cache.common.cache.manifest import Plan
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.text.collate import Batch
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.stage1_teacher.teacher.inputs import TeacherInputs, Wanted
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher, TeacherOutput


@dataclass(frozen=True, kw_only=True)
class Build:
    """Everything a build or a fidelity run works with.

    Attributes:
        teacher: The loaded teacher.
        dataset: The data.
        encoder: From a sample to the teacher's input.
        codecs: Codec by signal.
        groups: Teacher layers of each attention group.
        plan: What the cache will hold.
        workers: Processes that read and encode ahead of the teacher; 0: a thread.
    """

    teacher: Teacher
    dataset: Dataset
    encoder: SampleEncoder
    codecs: dict[str, Any]
    groups: tuple[tuple[int, ...], ...]
    plan: Plan
    workers: int

    @property
    def wanted(self) -> Wanted:
        """What the codecs need of a forward pass."""
        return Wanted(
            groups=self.groups,
            answer_rows="answer_attention" in self.codecs,
            visual_rows="visual_map" in self.codecs,
            columns="visual_columns" in self.codecs,
            text="text_attention" in self.codecs,
            hidden={name: codec.layers for name, codec in self.codecs.items() if isinstance(codec, HiddenCodec)},
            visual_logits="visual_logits" in self.codecs,
        )

    def run(self, batch: Batch, inputs: TeacherInputs | None = None) -> TeacherOutput:
        """Run the teacher on one batch, capturing what the codecs need.

        Args:
            batch: On the CPU.
            inputs: What the teacher's ``prepare`` made of it, if that was done ahead of time.
        """
        return self.teacher.run(batch, inputs=inputs or self.teacher.prepare(batch, self.wanted))
