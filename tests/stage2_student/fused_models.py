"""The smallest model that the fused losses can train, and what each of two processes does that train it."""

import os
from pathlib import Path

import torch
from logit_references import select
from loss_checks import normal
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vlm_distill_cache.common.codecs.live import SparseLogits
from vlm_distill_cache.stage2_student.losses.fused import fused_losses
from vlm_distill_cache.stage2_student.losses.logits import lm_loss, tail_bucket_loss

ROWS, WIDTH, VOCABULARY = 6, 8, 40
LM_WEIGHT, LOGIT_WEIGHT = 0.7, 1.3


class TinyModel(nn.Module):
    """Embedding, one layer, output projection; the losses are computed in its forward pass, as wrappers need."""

    def __init__(self, *, tied: bool = False, fused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.fused = fused

    def forward(self, ids: Tensor, labels: Tensor, teacher: SparseLogits) -> Tensor:
        hidden = torch.tanh(self.layer(self.embed(ids)))
        return total_of(hidden, self.head.weight, labels, teacher, fused=self.fused)


def total_of(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: SparseLogits, *, fused: bool = True) -> Tensor:
    if fused:
        return fused_losses(
            hidden, weight, labels, teacher, lm_weight=LM_WEIGHT, logit_weight=LOGIT_WEIGHT, chunk_rows=2
        ).total
    logits = nn.functional.linear(hidden, weight)
    return LM_WEIGHT * lm_loss(logits, labels) + LOGIT_WEIGHT * tail_bucket_loss(logits, teacher)


def batch(seed: int) -> tuple[Tensor, Tensor, SparseLogits]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(0, VOCABULARY, (2, ROWS), generator=generator)
    return ids, labels, select(normal(ROWS, VOCABULARY, seed=seed, scale=3))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def main(folder: Path) -> None:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    parallel = DistributedDataParallel(TinyModel(tied=True))
    parallel(*batch(rank)).backward()
    sharded = fully_shard(TinyModel(tied=True), mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    sharded(*batch(rank)).backward()
    found = {"ddp": gradients_of(parallel.module), "fsdp": gradients_of(sharded)}
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that the interpreter takes down in its own order
