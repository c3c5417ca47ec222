"""VLMEvalKit asks a student: its run.py with one model more, called student. docs/harness.md says how it is run."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import run  # VLMEvalKit's: its clone is the working directory
from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.stage2_student.final_folder import trained_folder
from vlm_distill_cache.stage2_student.suite.ask import ask
from vlm_distill_cache.stage2_student.suite.opened import find_model, load_model
from vlm_distill_cache.stage2_student.suite.requests import Generate

MOST_TOKENS = 256


class Student(BaseModel):
    """One picture, then the text; of several pictures VLMEvalKit shows the first and warns."""

    INTERLEAVE = False

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model, self.encoder = load_model(find_model(trained_folder(folder), None))

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The greedy answer to one message."""
        question, picture = self.message_to_promptimg(message, dataset=dataset)
        image = None if picture is None else ImageFile(Path(picture))
        (answer,) = ask(self.model, self.encoder, [Generate(image=image, question=question, max_tokens=MOST_TOKENS)])
        if isinstance(answer, SampleError):
            raise answer
        return str(answer)


if __name__ == "__main__":
    supported_VLM["student"] = partial(Student, os.environ["STUDENT"])
    run.load_env()
    run.main()
