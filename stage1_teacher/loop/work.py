"""What a build works with: teacher, data, codecs and the plan."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.errors import DistillError, SampleError
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.text.collate import Batch
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.stage1_teacher.loop.kept import Kept
from vlm_distill_cache.stage1_teacher.loop.signals import requests_of
from vlm_distill_cache.stage1_teacher.teacher.inputs import TeacherInputs
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

logger = logging.getLogger(__name__)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say at what an error that is no matter of one sample alone ends the build; it passes as it is."""
    try:
        yield
    except SampleError:
        raise
    except (DistillError, OSError):  # which the command prints as a line
        logger.log(logging.ERROR, "the build ends at %s:", what)
        raise
    except Exception as error:
        error.add_note(f"at {what}")
        raise


@dataclass(frozen=True, kw_only=True)
class Build:
    """Everything a build or a fidelity run works with.

    Attributes:
        encoder: From a sample to the teacher's input.
        groups: Teacher layers of each attention group.
        plan: What the cache will hold.
        workers: Processes that read and encode ahead of the teacher; 0: a thread.
        scratch: Folder where pixels of large shards wait; None: they do in memory.
        kept: What is there already, of a cache that is topped up; None: nothing is.
    """

    teacher: Teacher
    dataset: Dataset
    encoder: SampleEncoder
    codecs: dict[str, Any]
    groups: tuple[tuple[int, ...], ...]
    plan: Plan
    workers: int
    scratch: Path | None = None
    kept: Kept | None = None

    def prepare(self, batch: Batch) -> TeacherInputs:
        """Make on the CPU what the teacher needs of a batch for the codecs' signals."""
        return self.teacher.prepare(batch, requests_of(batch, self.codecs, self.groups))

    def run(self, batch: Batch, inputs: TeacherInputs | None = None) -> dict[str, Tensor]:
        """Run the teacher on one batch, on the CPU; what it found by signal, see `Teacher.run`.

        Args:
            batch: On the CPU.
            inputs: What `prepare` made of it, if that was done ahead of time.
        """
        return self.teacher.run(inputs or self.prepare(batch))
