"""How far a decoded cache bends the gradient of each attention loss, for a stand-in student.

The stand-in looks where the teacher looks, flattened by a square root. A cosine compares the gradient that
the decoded signal gives with the one that the live signal gives; a loss's weight cancels.

Dims: A supervised rows, G layer groups, C grid cells, N cells of a visual map.
"""

from torch import Tensor
from torch.nn import functional as F

from vlm_distill_cache.common.codecs.row_attention import RowAttention
from vlm_distill_cache.common.codecs.teacher_map import TeacherMap


def row_gradient_cosines(cached: RowAttention, live: Tensor, student: Tensor) -> Tensor:
    """Cosine of the row-wise KL's gradient on the student's cells, cached against live.

    Args:
        cached: Decoded rows.
        live: The teacher's cells, float32 `[A, G, C]`.
        student: The stand-in's.

    Returns:
        float32 `[A]`; 0 for a row that does not look at the image.
    """
    live_mass = live.sum(-1, keepdim=True).clamp_min(1e-12)
    cached_mass = cached.image_mass[..., None].clamp_min(1e-12)
    weights = student / student.sum(-1, keepdim=True).clamp_min(1e-12)
    exact = live_mass * (weights - live / live_mass)
    approximate = cached_mass * (weights - cached.cells / cached_mass)
    return F.cosine_similarity(approximate.flatten(1), exact.flatten(1), dim=1)


def column_gradient_cosine(cached: Tensor, live: Tensor) -> float:
    """Cosine of the gradient of 1 - cos of column means, cached against live.

    Args:
        cached: Decoded columns, float32 `[G, N]`.
        live: The teacher's.
    """
    gradients = []
    for teacher in (live, cached):
        student = live.sqrt().requires_grad_()
        (1 - F.cosine_similarity(student, teacher, dim=-1)).sum().backward()
        assert student.grad is not None
        gradients.append(student.grad.nan_to_num())
    return _cosine(*gradients)


def map_gradients(teacher: TeacherMap, student: Tensor, content: Tensor | None) -> dict[str, Tensor]:
    """Gradients of the losses that a teacher's map can serve.

    Args:
        teacher: Live or decoded, `[G, N, N]`.
        student: The stand-in's maps, float32 `[G, N, N]`.
        content: Cells that carry image, bool `[N]`. None: all do.

    Returns:
        `sink_filtered` and, if the map is complete, `cosine`: float32 `[G, N, N]`.
    """
    losses = ["sink_filtered", "cosine"] if teacher.complete else ["sink_filtered"]
    gradients = {}
    for loss in losses:
        leaf = student.detach().clone().requires_grad_()
        whole = loss == "cosine"
        left, right = (leaf, teacher.values) if whole else teacher.mean_columns(leaf, content)
        (1 - F.cosine_similarity(left.flatten(1), right.flatten(1), dim=-1)).sum().backward()
        assert leaf.grad is not None
        gradients[loss] = leaf.grad
    return gradients


def map_gradient_cosines(
    cached: TeacherMap, live: Tensor, content: Tensor | None, *, student: Tensor | None = None
) -> dict[str, float]:
    """Cosine of each loss's gradient with the one of the live map.

    Args:
        cached: The decoded map, `[G, N, N]`.
        live: The teacher's, float32 `[G, N, N]`, on the same cells.
        content: Cells that carry image, bool `[N]`. None: all do.
        student: Maps of a student; None: the stand-in.

    Returns:
        By loss; without those that the cached map cannot serve, or that give no gradient.
    """
    if student is None:
        student = live.sqrt()
    exact = map_gradients(TeacherMap.from_maps(live, token_mask=content), student, content)
    found = map_gradients(cached, student, content)
    return {loss: _cosine(found[loss], exact[loss]) for loss in found if bool(exact[loss].any())}


def _cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of two tensors as vectors, in float64."""
    return float(F.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0))
