"""What of a student's vision tower a phase can train: the parameters that the visual tokens depend on.

Layers above the hidden state that is projected, and heads, get no gradient. They must not count as trained: processes that
exchange gradients would wait for theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Never

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.models.projectors import TeacherAdapter
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.data.families.table import submodule
from vlm_distill_cache.data.text.collate import Batch
from vlm_distill_cache.stage2_student.students.library import LibraryStudent
from vlm_distill_cache.stage2_student.students.model import StudentModel


def check_tower_is_free(model: StudentModel, *, phase: str, where: str) -> None:
    """Refuse to train a tower that something else relies on, or whose place is unknown.

    Raises:
        ConfigError: If the student has the teacher's projector (TAF), or is of a family that is not listed.
    """
    if any(isinstance(module, TeacherAdapter) for module in model.modules()):
        raise ConfigError(
            f"phase {phase}: trainable=tower: {where} has the teacher's projector (TAF), which is frozen and presumes the "
            f"tower it was trained on. Use another projector (--set projector=mlp), or {phase}.trainable=all"
        )
    if isinstance(model, LibraryStudent) and not model.family.is_listed:
        raise ConfigError(
            f"phase {phase}: trainable=tower: {where} is of model_type {model.config.model_type!r}, which is not in the table of "
            f"families (data/families/table.py); {phase}.trainable=all trains all of it, its tower too"
        )


def tower_parameters(model: StudentModel, batch: Batch) -> tuple[str, ...]:
    """Names of the parameters of a student's vision tower that get a gradient.

    Args:
        batch: On the model's device, with at least one picture. A model of the library runs on it up to its language
            model, once forward and once backward; one of ours knows without.

    Returns:
        Names as of ``named_parameters``; a projector inside the tower (Qwen-VL's merger) is part of it.
    """
    core = model.model if isinstance(model, LibraryStudent) else model
    if isinstance(core, VisionLanguageModel):
        used = core.model.vision_tower.used_parameters()
    else:
        assert isinstance(model, LibraryStudent)
        used = _with_gradient(model, batch)
    known = {id(parameter) for parameter in used}
    assert isinstance(model, nn.Module)
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in known)


class _Reached(Exception):  # noqa: N818 - not an error
    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs


def _with_gradient(student: LibraryStudent, batch: Batch) -> list[nn.Parameter]:
    """Parameters of the tower that what enters the language model depends on."""

    def stop(module: nn.Module, arguments: Any, named: Any) -> Never:
        raise _Reached((arguments, named))

    tower = list(submodule(student.model, student.family.vision_tower).parameters())
    hook = student.language_model.register_forward_pre_hook(stop, with_kwargs=True)
    with _requiring_gradients(student, tower), torch.enable_grad():
        try:
            student.model(**student.model_inputs(batch))
            raise ModelError(
                f"model_type {student.config.model_type!r}: its forward pass does not reach its language model"
            )
        except _Reached as reached:
            entered = [leaf for leaf in tree_leaves(reached.inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        finally:
            hook.remove()
        total = torch.stack([leaf.float().sum() for leaf in entered]).sum()
        grads = torch.autograd.grad(total, tower, allow_unused=True)
    return [parameter for parameter, grad in zip(tower, grads, strict=True) if grad is not None]


@contextmanager
def _requiring_gradients(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let these alone require gradients, and all as before afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
