"""The paper's A[:, :N_v], visual and text rows in one loss, against its formula: values and gradients."""

import pytest
import torch
from loss_checks import assert_agree, cosine, maps_of, normal, value_and_gradient
from torch import Tensor

from vlm_distill_cache.stage2_student.losses.attention import all_attention_loss


class AllRows:
    """Some samples' attention of every row, visual and text, on visual tokens; sample 1 has no text row."""

    tokens, counts = 6, (2, 0, 3)

    def __init__(self, seed: int) -> None:
        self.maps = maps_of(3, 2, self.tokens, seed=seed)
        text = normal(sum(self.counts), 2, self.tokens, seed=seed + 9, scale=2)
        self.text = 0.3 * text.softmax(-1)
        self.samples = torch.tensor([b for b, count in enumerate(self.counts) for _ in range(count)])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_all_rows_are_the_papers_formula(masked: bool, reduction: str):
    """1 - mean over layers of the cosine of the flattened A[:, :N_v]."""
    teacher, student = AllRows(0), AllRows(1)
    mask = torch.ones(3, 6, dtype=torch.bool)
    if masked:
        mask[2, 4:] = False

    def loss(both: Tensor) -> Tensor:
        maps, text = both[: student.maps.numel()].view_as(student.maps), both[student.maps.numel() :]
        return all_attention_loss(
            maps,
            text.view_as(student.text),
            teacher.maps,
            teacher.text,
            text_sample=student.samples,
            row_weights=torch.ones(3, 6),
            token_mask=mask if masked else None,
            reduction=reduction,  # type: ignore[arg-type]
        )

    def reference(both: Tensor) -> Tensor:
        maps, text = both[: student.maps.numel()].view_as(student.maps), both[student.maps.numel() :]
        text, total = text.view_as(student.text), both.new_zeros(())
        for b in range(3):
            for g in range(2):
                flat = []
                for own_maps, own_text in ((maps, text), (teacher.maps.double(), teacher.text.double())):
                    rows = torch.cat([own_maps[b, g][mask[b]], own_text[student.samples == b, g]])  # [rows, N_v]
                    flat.append(rows[:, mask[b]].flatten())
                total = total + 1 - cosine(*flat)
        return total / (3 if reduction == "sum" else 6)

    assert_agree(loss, reference, torch.cat([student.maps.flatten(), student.text.flatten()]))


def test_a_cell_of_two_equal_tokens_counts_as_both():
    """Pooling equal visual rows to cells leaves the loss as it is: the balance with text rows is kept."""
    generator = torch.Generator().manual_seed(0)
    sides = [(torch.rand(1, 1, 3, 6, generator=generator), torch.rand(2, 1, 6, generator=generator)) for _ in "ab"]
    (student, student_text), (teacher, teacher_text) = sides
    samples, fine = torch.tensor([0, 0]), [maps.repeat_interleave(2, dim=2) for maps in (student, teacher)]
    expected = all_attention_loss(
        fine[0], student_text, fine[1], teacher_text, text_sample=samples, row_weights=torch.ones(1, 6)
    )
    found = all_attention_loss(
        student, student_text, teacher, teacher_text, text_sample=samples, row_weights=torch.full((1, 3), 2.0)
    )
    torch.testing.assert_close(found, expected)


def test_all_rows_without_an_image_or_of_unequal_cells():
    empty, no_text = torch.zeros(2, 1, 4, 4), torch.zeros(0, 1, 4)
    value, gradient = value_and_gradient(
        lambda s: all_attention_loss(
            s,
            no_text,
            empty,
            no_text,
            text_sample=torch.zeros(0, dtype=torch.int64),
            row_weights=torch.ones(2, 4),
        ),
        empty,
    )
    assert float(value) == 0
    assert not bool(gradient.any())
    with pytest.raises(ValueError, match="text rows: student has shape"):
        all_attention_loss(
            empty,
            torch.zeros(2, 1, 4),
            empty,
            torch.zeros(3, 1, 4),
            text_sample=torch.tensor([0, 1]),
            row_weights=torch.ones(2, 4),
        )
