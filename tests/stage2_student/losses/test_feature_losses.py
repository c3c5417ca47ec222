"""Losses on hidden states and visual logits: formulas, a student that is its own teacher, and how batches are split."""

import pytest
import torch
import torch.nn.functional as F

from vlm_distill_cache.common.attention.hidden import HiddenCapture, HiddenRequest, gather_rows, student_layers
from vlm_distill_cache.common.attention.tiles import grid_tile, tiles_to_array
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.hidden_states import VisualHiddenCodec
from vlm_distill_cache.common.errors import CacheMismatchError, ModelError
from vlm_distill_cache.stage2_student.batches.signals import decode_signals
from vlm_distill_cache.stage2_student.config import PhaseConfig, TrainConfig
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.features import hidden_loss
from vlm_distill_cache.stage2_student.losses.objective import step_shares, units_of
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.training.preparation import prepare
from vlm_distill_cache.stage2_student.training.resolve import resolve_config

TERMS = ("hidden", "visual_hidden", "projector_output", "visual_logits")
KINDS = ("relative_mse", "mse", "cosine", "relation")
COUNTS = (3, 0, 4)


def slow_loss(student, teacher, kind):
    """Row by row in float64."""
    student, teacher = student.double(), teacher.double()
    values, start = [], 0
    for count in COUNTS:
        for row in range(start, start + count):
            for layer in range(student.shape[1]):
                s, t = student[row, layer], teacher[row, layer]
                if kind == "relative_mse":
                    values.append(((s - t) ** 2).sum() / (t**2).sum())
                elif kind == "mse":
                    values.append(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s))
                elif kind == "cosine":
                    values.append(1 - s @ t / (s.norm() * t.norm()))
                else:
                    both = [
                        torch.stack([x[row, layer] @ x[other, layer] / (x[row, layer].norm() * x[other, layer].norm())
                                     for other in range(start, start + count)])
                        for x in (student, teacher)
                    ]  # fmt: skip
                    values.append(1 - both[0] @ both[1] / (both[0].norm() * both[1].norm()))
        start += count
    return torch.stack(values).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_formula(kind, dtype):
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(7, 2, 6, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(7, 2, 9 if kind == "relation" else 6, generator=generator)
    loss = hidden_loss(student, teacher, kind=kind, row_counts=COUNTS)
    (gradient,) = torch.autograd.grad(loss, student)
    reference = student.detach().double().requires_grad_()
    expected = slow_loss(reference, teacher, kind)
    (wanted,) = torch.autograd.grad(expected, reference)
    exact = dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, atol=1e-6 if exact else 2e-3, rtol=1e-4 if exact else 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_zero_with_a_graph_and_zero_states_no_nan(kind):
    empty = torch.zeros(0, 2, 6, requires_grad=True)
    loss = hidden_loss(empty, torch.zeros(0, 2, 6), kind=kind, row_counts=(0,))
    assert float(loss.detach()) == 0
    loss.backward()
    zeros = torch.zeros(7, 1, 4, requires_grad=True)
    hidden_loss(zeros, torch.zeros(7, 1, 4), kind=kind, row_counts=COUNTS).backward()
    assert bool(zeros.grad.isfinite().all())


def test_shapes_and_kinds_that_do_not_fit_are_refused():
    states = torch.ones(7, 2, 6)
    with pytest.raises(ValueError, match="needs equal shapes"):
        hidden_loss(states, torch.ones(7, 2, 5), kind="cosine", row_counts=COUNTS)
    with pytest.raises(ValueError, match="needs equal rows and layers"):
        hidden_loss(states, torch.ones(7, 1, 5), kind="relation", row_counts=COUNTS)
    with pytest.raises(ValueError, match="samples 3 rows"):
        hidden_loss(states, states, kind="cosine", row_counts=(3,))
    with pytest.raises(ValueError, match="expected one of"):
        hidden_loss(states, states, kind="l1", row_counts=COUNTS)


@pytest.mark.parametrize(
    ("layers", "teacher", "student", "expected"),
    [
        ((0, 4), 4, 4, (0, 4)),
        ((0, 16, 32), 32, 24, (0, 12, 24)),
        ((1, 2, 3, 4), 4, 2, (1, 1, 2, 2)),
        ((3,), 6, 3, (2,)),
    ],
)
def test_layers_meet_at_the_same_share_of_the_depth(layers, teacher, student, expected):
    assert student_layers(layers, teacher_depth=teacher, student_depth=student) == expected


@pytest.fixture(scope="module")
def feature_cache(tiny_llava, tmp_path_factory):
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.extract import extract

    path = tmp_path_factory.mktemp("features") / "cache"
    extract(
        BuildConfig(
            teacher=str(tiny_llava), cache=str(path), template="short", data="shapes", limit=6, shard_size=4, batch_size=3,
            fidelity_samples=0, signals=("logits", *TERMS), hidden_layers=(1, -1), hidden_dtype="f4", logits="exact",
        )
    )  # fmt: skip
    return path


def open_run(path, student, tmp_path, **losses):
    phase = PhaseConfig(steps=1, batch_size=4, losses=LossWeights(**losses))
    options = {"projector": "mlp"} if student == "mobilevlm-tiny" else {}
    return prepare(
        TrainConfig(student=str(student), cache=str(path), output=str(tmp_path), phases=("dft",), dft=phase, **options)
    )


def losses_of(run, splits):
    """Terms of one step whose samples are split so, and the gradient of one of the student's matrices."""
    phase = run.phases[0]
    batches = [phase.dataset.batch(part) for part in splits]
    totals = torch.tensor([units_of(batch) for batch in batches], dtype=torch.float64).sum(0).tolist()
    run.student.zero_grad()
    run.student.trainable_parameters("dft")
    sums = {}
    for batch, share in zip(batches, step_shares(batches, totals), strict=True):
        terms = phase.objective(run.student, None, batch, share)
        terms.total.backward()
        for name, value in terms.named().items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
    parameter = run.student.language_model.layers[0].mlp.up_proj.weight
    return sums, parameter.grad.clone()


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_own_teacher_has_no_loss(kind, feature_cache, tiny_llava, tmp_path):
    weights = dict.fromkeys(TERMS, 1.0) | {"lm": 0.0, "hidden_kind": kind}
    run = open_run(feature_cache, tiny_llava, tmp_path, **weights)
    sums, gradient = losses_of(run, [[0, 1, 2, 3]])
    for term in TERMS:
        assert sums[term] == pytest.approx(0.0, abs=2e-5), term
    assert float(gradient.abs().max()) < 2e-3


def test_another_student_is_compared_row_by_row_and_cell_by_cell(feature_cache, tmp_path):
    """A student with the teacher's tokens but another width: each term from the library's own hidden states."""
    weights = {
        "lm": 0.0,
        "hidden": 1.0,
        "visual_hidden": 1.0,
        "visual_logits": 1.0,
        "hidden_kind": "relation",
    }
    run = open_run(feature_cache, "mobilevlm-tiny", tmp_path, **weights)
    phase, student = run.phases[0], run.student
    batch = phase.dataset.batch([0, 4])
    terms = phase.objective(student, None, batch, step_shares([batch], list(units_of(batch)))[0])
    depth = int(student.language_model.config.num_hidden_layers)
    with torch.no_grad():
        output = student.model(**batch.inputs.model_inputs(), output_hidden_states=True, use_cache=False)
        logits = student(**batch.inputs.model_inputs(), use_cache=False).logits
    layers = student_layers((1, 4), teacher_depth=4, student_depth=depth)
    states = torch.stack([output.hidden_states[layer] for layer in layers], dim=2)  # [B, T, S, D]
    supervised, visual = batch.inputs.labels != IGNORE_INDEX, batch.inputs.visual_mask
    for term, mask in (("hidden", supervised), ("visual_hidden", visual)):
        counts = tuple(int(n) for n in mask.sum(1))
        expected = hidden_loss(states[mask], batch.targets[term].teacher, kind="relation", row_counts=counts)
        torch.testing.assert_close(terms.named()[term].detach(), expected, atol=1e-6, rtol=1e-4)
    sparse, dense = batch.targets["visual_logits"].teacher, logits[visual].log_softmax(-1)
    p = sparse.log_probs.exp() * sparse.entry_mask
    kept = dense.gather(1, sparse.token_ids)
    inside = torch.zeros_like(dense).scatter_(1, sparse.token_ids, sparse.entry_mask.float()) > 0
    tail, eps = dense.masked_fill(inside, -torch.inf).logsumexp(1), sparse.tail_log_mass[:, 0]
    rest = torch.where(eps > -torch.inf, eps.exp() * (eps - tail), 0.0)
    by_hand = ((p * (sparse.log_probs - kept)).nan_to_num().sum(1) + rest).mean()
    torch.testing.assert_close(terms.named()["visual_logits"].detach(), by_hand, atol=1e-5, rtol=1e-4)


def test_the_published_recovery_is_alpha_times_mse_and_the_rest_cross_entropy(feature_cache, tiny_llava, tmp_path):
    """By recipe=recovery-hidden, and with another alpha: from the library's own outputs of a disturbed teacher."""
    given = [
        f"student={tiny_llava}",
        f"cache={feature_cache}",
        f"output={tmp_path}",
        "recipe=recovery-hidden",
        "dft.steps=1",
    ]
    for alpha, options in ((0.5, []), (0.2, ["dft.losses.hidden=0.2", "dft.losses.lm=0.8"])):
        config = resolve_config(None, [*given, *options], teacher_width=96)
        run = prepare(config)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in run.student.language_model.parameters():
                parameter.add_(0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter))
        phase = run.phases[0]
        batch = phase.dataset.batch([0, 4])
        with torch.no_grad():
            total = phase.objective(run.student, None, batch, step_shares([batch], list(units_of(batch)))[0]).total
            output = run.student(**batch.inputs.model_inputs(), output_hidden_states=True, use_cache=False)
        supervised = batch.inputs.labels != IGNORE_INDEX
        states = torch.stack([output.hidden_states[layer][supervised] for layer in (1, -1)], dim=1)
        error = ((states - batch.targets["hidden"].teacher) ** 2).mean()
        cross_entropy = F.cross_entropy(output.logits[supervised], batch.inputs.labels[supervised])
        torch.testing.assert_close(total, alpha * error + (1 - alpha) * cross_entropy, atol=1e-5, rtol=1e-4)


def test_a_step_is_the_same_however_it_is_split(feature_cache, tiny_llava, tmp_path):
    """Of a student that differs: the teacher's own weights, disturbed."""
    for kind in KINDS:
        weights = dict.fromkeys(TERMS, 1.0) | {"hidden_kind": kind}
        run = open_run(feature_cache, tiny_llava, tmp_path, **weights)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in run.student.language_model.parameters():
                parameter.add_(0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter))
        whole, gradient = losses_of(run, [[0, 1, 2, 3]])
        assert all(whole[term] > 1e-4 for term in TERMS if term != "projector_output")
        for parts in ([[0], [1, 2, 3]], [[0, 2], [1, 3]]):
            sums, other = losses_of(run, parts)
            assert sums == pytest.approx(whole, rel=1e-3, abs=1e-5)
            torch.testing.assert_close(other, gradient, atol=1e-4, rtol=1e-2)


def test_students_that_cannot_be_compared_are_refused_with_the_remedy(feature_cache, tmp_path):
    with pytest.raises(CacheMismatchError, match=r"width 48, the student has width 64.*hidden_kind=relation"):
        open_run(feature_cache, "mobilevlm-tiny", tmp_path, hidden=1.0)
    run_options = TrainConfig(
        student="mobilevlm-tiny", projector="ldpnetv2", cache=str(feature_cache), output=str(tmp_path), phases=("dft",),
        dft=PhaseConfig(steps=1, losses=LossWeights(visual_logits=1.0)),
    )  # fmt: skip
    with pytest.raises(CacheMismatchError, match=r"visual_logits need equal visual tokens.*projector=mlp"):
        prepare(run_options)


def test_captured_states_are_the_librarys_and_the_block_covers_one_pass(tiny_llava):
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava).model.language_model
    ids = torch.arange(12).reshape(2, 6)
    rows = torch.tensor([[0, 5, 3], [2, -1, -1]])
    capture = HiddenCapture(model)
    with capture.record({"a": HiddenRequest(rows, (4, 0, 2))}) as found:
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    states = torch.stack([expected[layer] for layer in (4, 0, 2)], dim=2)
    torch.testing.assert_close(found["a"], gather_rows(states, rows))
    assert found["a"][1, 1:].abs().sum() == 0
    assert found["a"].requires_grad
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    def run_twice():
        with capture.record({"a": HiddenRequest(rows, (0, 1, 4))}):
            model(input_ids=ids)
            model(input_ids=ids)

    with pytest.raises(ModelError, match="ran twice"):
        run_twice()
    with (
        pytest.raises(ModelError, match="run the model once"),
        capture.record({"a": HiddenRequest(rows, (1,))}),
    ):
        pass
    with pytest.raises(ModelError, match="has 4 layers"), capture.record({"a": HiddenRequest(rows, (5,))}):
        pass
    left = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert left == hooks  # the library's own stay


def test_a_finer_students_tokens_are_averaged_to_the_teachers():
    """12 x 12 student tokens of one picture meet 6 x 6 of the teacher: plain means of 2 x 2."""
    codec = VisualHiddenCodec(layers=(1,), width=3, exact=True)
    teacher = torch.randn(36, 1, 3, generator=torch.Generator().manual_seed(0))
    found = decode_signals(
        codec.encode(teacher) | {"tiles": tiles_to_array((grid_tile(6, 6),))},
        {"visual_hidden": codec},
        choose_terms(["visual_hidden"]),
        (grid_tile(12, 12),),
        where="test",
    )["visual_hidden"]
    student = torch.randn(144, 5, generator=torch.Generator().manual_seed(1))
    by_hand = student.reshape(6, 2, 6, 2, 5).mean((1, 3)).reshape(36, 5)
    torch.testing.assert_close(found.teacher, teacher)
    torch.testing.assert_close(found.student_pool @ student, by_hand)
