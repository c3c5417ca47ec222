"""The fused losses under what training puts around them: wrappers, mixed precision, checkpointing; and their memory."""

from unittest import mock

import pytest
import torch
from fused_models import ROWS, VOCABULARY, WIDTH, TinyModel, batch, gradients_of, total_of
from loss_checks import normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from vlm_distill_cache.common.codecs.live import SparseLogits
from vlm_distill_cache.stage2_student.losses import fused
from vlm_distill_cache.stage2_student.losses.fused import fused_losses
from vlm_distill_cache.stage2_student.losses.logits import lm_loss, tail_bucket_loss
from vlm_distill_cache.stage2_student.training.live_bytes import LiveBytes


def leaves(*, dtype: torch.dtype = torch.float32):
    hidden, weight = normal(ROWS, WIDTH, seed=1), normal(VOCABULARY, WIDTH, seed=2)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


class Shapes(TorchDispatchMode):
    """Shapes of all that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def test_a_tied_embedding_gets_both_gradients():
    found = []
    for is_fused in (True, False):
        model = TinyModel(tied=True, fused=is_fused)
        model(*batch(0)).backward()
        found.append(gradients_of(model))
    assert found[0].keys() == found[1].keys() == {"embed.weight", "layer.weight", "layer.bias"}
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_get_the_mean_of_their_gradients_under_ddp_and_fsdp2(in_two_processes):
    model = TinyModel(tied=True, fused=False)
    ((model(*batch(0)) + model(*batch(1))) / 2).backward()
    for found in torch.load(in_two_processes["fused"] / "gradients.pt").values():
        assert found.keys() == gradients_of(model).keys()
        for name, gradient in gradients_of(model).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_losses_changes_nothing(use_reentrant: bool):
    _, labels, teacher = batch(0)
    found = []
    for checkpointed in (False, True):
        hidden, weight = leaves()
        if checkpointed:
            total = checkpoint(total_of, hidden, weight, labels, teacher, use_reentrant=use_reentrant)
        else:
            total = total_of(hidden, weight, labels, teacher)
        total.backward()
        found.append((total.detach(), hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_scale_of_the_total_reaches_the_gradients():
    _, labels, teacher = batch(0)
    found = []
    for scale in (1.0, 1024.0):
        hidden, weight = leaves()
        (total_of(hidden, weight, labels, teacher) * scale).backward()
        found.append((hidden.grad, weight.grad))
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, plain * 1024.0)


def test_a_second_backward_pass_fails_instead_of_scaling_twice():
    _, labels, teacher = batch(0)
    total = total_of(*leaves(), labels, teacher)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_bfloat16_and_gives_gradients_of_the_leaves_dtype(kept: torch.dtype):
    _, labels, teacher = batch(0)
    found = []
    for is_fused in (True, False):
        hidden, weight = leaves(dtype=kept)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = total_of(hidden, weight, labels, teacher, fused=is_fused)
        assert total.dtype == torch.float32
        total.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        assert hidden.grad.dtype == weight.grad.dtype == kept
        found.append((total.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=2**-6, atol=2**-8)


def test_a_frozen_weight_costs_no_gradient_and_hidden_states_get_theirs():
    _, labels, teacher = batch(0)
    hidden, weight = leaves()
    trained, frozen = hidden.detach().clone().requires_grad_(), weight.detach()
    total_of(hidden, weight, labels, teacher).backward()
    with Shapes() as shapes:
        total_of(trained, frozen, labels, teacher).backward()
    assert (VOCABULARY, WIDTH) not in shapes.seen
    assert torch.equal(trained.grad, hidden.grad)
    with Shapes() as shapes:
        total_of(*leaves(), labels, teacher).backward()
    assert (VOCABULARY, WIDTH) in shapes.seen  # the check above sees what it looks for


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_values_and_computes_no_gradient(mode):
    _, labels, teacher = batch(0)
    hidden, weight = leaves()
    expected = fused_losses(hidden, weight, labels, teacher)
    with mode(), mock.patch("vlm_distill_cache.stage2_student.losses.fused_chunks._Gradients.add") as add:
        found = fused_losses(hidden, weight, labels, teacher)
    add.assert_not_called()
    assert not found.total.requires_grad
    assert torch.equal(found.total, expected.total.detach())
    assert torch.equal(found.lm, expected.lm)


def test_only_the_total_has_a_graph():
    _, labels, teacher = batch(0)
    found = fused_losses(*leaves(), labels, teacher)
    assert found.total.requires_grad
    assert not found.lm.requires_grad
    assert not found.logits.requires_grad


def meta_inputs(rows: int, vocabulary: int, width: int, *, dtype: torch.dtype = torch.float32):
    hidden = torch.empty(rows, width, device="meta", dtype=dtype, requires_grad=True)
    weight = torch.empty(vocabulary, width, device="meta", dtype=dtype, requires_grad=True)
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    ids = torch.empty(rows, 32, dtype=torch.int64, device="meta")
    floats = torch.empty(rows, 32, device="meta")
    return hidden, weight, labels, SparseLogits(ids, floats, ids > 0, floats[:, :2], (1.0, 2.0))


def peak(inputs, *, is_fused: bool, **options) -> int:
    hidden, weight, labels, teacher = inputs
    with LiveBytes(hidden, weight) as live:
        if is_fused:
            fused_losses(hidden, weight, labels, teacher, **options).total.backward()
        else:
            logits = hidden @ weight.t()
            (lm_loss(logits, labels) + tail_bucket_loss(logits, teacher, **options)).backward()
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.slow(quick=1)
def test_memory_is_an_eighth_of_the_unfused_form_at_real_sizes(device, temperature: float, dtype):
    """4,096 rows, 152,000 tokens, the width of a small language model: the weight's gradient is included."""
    sizes = {"rows": 4096, "vocabulary": 152_000, "width": 2048, "dtype": dtype}
    naive = peak(meta_inputs(**sizes), is_fused=False, temperature=temperature)
    assert naive >= 2 * 4 * 4096 * 152_000  # two float32 copies of all logits
    with mock.patch.dict(fused.CHUNK_BYTES, {"cpu": fused.CHUNK_BYTES[device]}):
        found = peak(meta_inputs(**sizes), is_fused=True, temperature=temperature)
    assert found <= naive / 8


def test_memory_beyond_the_gradients_does_not_grow_with_the_rows():
    peaks = [
        peak(meta_inputs(rows, 32_000, 64), is_fused=True, chunk_rows=64) - 4 * 64 * (rows + 32_000)
        for rows in (256, 4096)
    ]
    assert peaks[1] - peaks[0] < 4096 * 32 * 40  # the teacher's rows, cut for the student
    assert 4 * 64 * 32_000 < peaks[0] < 1.1 * 4 * 64 * 32_000


def test_live_bytes_counts_what_lives_at_once():
    with LiveBytes() as live:
        first = torch.zeros(100)
        view = first[:50]
        del first
        second = torch.zeros(10)
        del view
        torch.zeros(90)
        assert live.now == 40
        del second
    assert (live.now, live.peak) == (0, 440)
