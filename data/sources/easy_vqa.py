"""easy-VQA: a small published benchmark that comes as a Python package.

5,000 pictures of one coloured shape (64 x 64), about ten questions each and 13 possible answers. The
questions about a picture do not depend on each other, so a picture is one sample whose turns are packed
behind one image prefix.

Source: Victor Zhou, "easy-VQA" (2019), https://github.com/vzhou842/easy-VQA, MIT licence.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.sample import Dataset, EvaluationSet, Sample, Turn, iterate_readable, questions_of

SPLITS = ("train", "validation", "test")
VALIDATION_EVERY = 10  # each tenth picture of the package's train part is held out

_SHAPES = frozenset({"circle", "rectangle", "triangle"})


class EasyVqaDataset(Dataset):
    """One sample per picture, ids ``train-123`` and ``test-123`` after the package's files.

    Args:
        split: ``train``, ``validation`` (a tenth of the package's train part, not in ``train``) or ``test``.

    Raises:
        DataError: Unknown split, or the package is not installed.
    """

    def __init__(self, split: str = "train") -> None:
        if split not in SPLITS:
            raise DataError(f"easy-vqa has no split {split!r}; choose one of {list(SPLITS)}")
        package = _import_package()
        self.name = f"easy-vqa/{split}"
        part = "test" if split == "test" else "train"
        texts, answers, image_ids = getattr(package, f"get_{part}_questions")()
        paths = getattr(package, f"get_{part}_image_paths")()
        turns: dict[int, list[Turn]] = {}
        for text, answer, image_id in zip(texts, answers, image_ids, strict=True):
            turns.setdefault(image_id, []).append(Turn(question=text, answer=answer))
        held_out = split == "validation"
        self._samples = [
            Sample(
                sample_id=f"{part}-{image_id}",
                images=(ImageFile(Path(paths[image_id])),),
                turns=tuple(turns[image_id]),
                independent_turns=True,
            )
            for image_id in sorted(turns)
            if part == "test" or (image_id % VALIDATION_EVERY == VALIDATION_EVERY - 1) == held_out
        ]
        self.sample_ids: Sequence[str] = [sample.sample_id for sample in self._samples]

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def easy_vqa_evaluation(split: str = "test", limit: int | None = None) -> EvaluationSet:
    """Every question of a split as an item; its kind is what is asked for.

    Args:
        split: As for `EasyVqaDataset`.
        limit: Most items; they are taken evenly over the pictures' order. None: all.
    """
    questions = [item for sample in iterate_readable(EasyVqaDataset(split)) for item in questions_of(sample, _kind)]
    if limit is not None and limit < len(questions):
        questions = [questions[position * len(questions) // limit] for position in range(limit)]
    return EvaluationSet(questions=tuple(questions))


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in _SHAPES else "colour"


def _import_package() -> Any:
    try:
        return import_module("easy_vqa")
    except ImportError as error:
        raise DataError(
            "easy-vqa is a published benchmark in a package of its own, which is not installed; "
            "pip install 'vlm-distill-cache[easy-vqa]'"
        ) from error
