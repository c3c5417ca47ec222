"""Divergences over listed tokens and one bucket, from dense distributions: slow, obvious, float64."""

import math

import torch
from torch import Tensor

from vlm_distill_cache.common.codecs.live import SparseLogits, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.stage2_student.losses.logits import REVERSE_FLOOR_NATS

KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")


def select(logits: Tensor, *, max_k: int = 6, floor: float = 0.0) -> SparseLogits:
    codec = LogitCodec(floor=floor, min_k=1, max_k=max_k)
    return select_entries(codec, logits, torch.arange(len(logits)) % logits.shape[1])


def kl(p: Tensor, q: Tensor) -> Tensor:
    return sum((a * (a / b).log() for a, b in zip(p, q, strict=True) if a > 0), q.new_zeros(()))


def of_buckets(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """A divergence of two explicit distributions, bucket by bucket, as textbooks have it."""
    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p.clamp_min(math.exp(REVERSE_FLOOR_NATS)))
    if kind == "jsd":
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    return (p - q).abs().sum() / 2


def bucketed(student: Tensor, dense: Tensor, sparse: SparseLogits, kind: str, temperature: float = 1) -> Tensor:
    """Row by row, from both dense distributions: the listed tokens, and all others as one bucket."""
    total = student.new_zeros(())
    for row in range(len(student)):
        ids = sparse.token_ids[row][sparse.entry_mask[row]]
        ids = ids[ids < student.shape[1]]
        sides = []
        for logits in (dense[row].double(), student[row].double()):
            mass = (logits / temperature).softmax(0)
            others = torch.ones(len(mass), dtype=torch.bool).index_fill(0, ids, False)
            sides.append(torch.cat([mass[ids], mass[others].sum()[None]]))
        p, q = sides
        if kind == "forward_kl" and len(ids) == student.shape[1]:
            p, q = p[:-1], q[:-1]  # no token of the student is in the bucket: the loss leaves it out
        total = total + of_buckets(p, q, kind)
    return total * (temperature if kind == "tvd" else temperature**2) / len(student)
