"""Text attention in a cache equals eager attention of the same rows; students are trained on exactly these."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.attention.boxes import overlap_matrix, pool_keys, tile_boxes
from vlm_distill_cache.common.attention.capture import AttentionCapture
from vlm_distill_cache.common.attention.tiles import grid_tile
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.objective import Objective, Shares, step_shares, units_of
from vlm_distill_cache.stage2_student.losses.terms import TERMS, choose_terms
from vlm_distill_cache.stage2_student.students.build import find_student
from vlm_distill_cache.stage2_student.training.checks import check_signals

SIGNALS = ("answer_attention", "text_attention")
EXACT = {"attention_dtype": "f4", "signals": SIGNALS, "fidelity_samples": 0}
LOSSES = LossWeights(lm=0.0, text_attention=1.0)
TURNS = [("what color is the circle ?", "red"), ("is there a square ?", "yes , there is")]


def write_data(folder: Path) -> Path:
    """Conversations of different lengths, and one without a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(4):
        turns = TURNS[: 1 + index % 2]
        messages = [
            {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)
        ]
        entry = {"id": f"s{index}", "image": f"{index}.png", "conversations": messages}
        if index == 2:
            del entry["image"]
        else:
            messages[0]["value"] = "<image>\n" + messages[0]["value"]
            pixels = np.random.default_rng(index).integers(0, 256, (30, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
        entries.append(entry)
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def teacher(tiny_llava):
    return Teacher(tiny_llava)


@pytest.fixture(scope="module")
def encoder(teacher):
    return build_encoder(teacher, template="short", max_length=2048)


@pytest.fixture(scope="module", params=["packed", "llava"])
def data(request, tmp_path_factory):
    if request.param == "packed":  # eight independent turns behind one picture, block-diagonal mask
        return "shapes:images=3,seed=2"
    return str(write_data(tmp_path_factory.mktemp("data")))


def eager_rows(model, batch, groups):
    """Slow reference: full eager maps of one sample, text rows behind the image by visual keys, ``[X, N]``."""
    inputs = batch.model_inputs()
    if batch.attention_mask.ndim == 4:
        mask = torch.zeros(batch.attention_mask.shape).masked_fill(~batch.attention_mask, -torch.inf)
        inputs["attention_mask"] = mask
    attentions = model(**inputs, output_attentions=True).attentions
    mean = torch.stack([attentions[layer][0].mean(0) for layer in groups[0]]).mean(0)  # [T, T]
    visual = batch.visual_mask[0].nonzero()[:, 0]
    if not len(visual):
        return torch.zeros(0, 36)
    return mean[int(visual[-1]) + 1 :, visual]


def test_cached_rows_equal_eager_attention_of_every_text_row(tmp_path, build_cache, tiny_llava, encoder, data):
    build_cache(tmp_path / "cache", data=data, batch_size=4, limit=0, **EXACT)
    cache = open_cache(tmp_path / "cache")
    codec = codec_from_dict(cache.plan.signals["text_attention"])
    answers = codec_from_dict(cache.plan.signals["answer_attention"])
    eager = LlavaForConditionalGeneration.from_pretrained(tiny_llava, attn_implementation="eager").eval()
    dataset = open_dataset(data)
    for index in range(len(dataset)):
        batch = collate([encoder(dataset[index])], 0)
        record = cache.read(dataset.sample_ids[index])
        with torch.no_grad():
            expected = eager_rows(eager, batch, cache.plan.teacher["groups"])
        boxes = tile_boxes(batch.tiles[0])
        if len(boxes):
            expected = pool_keys(expected, overlap_matrix(boxes, tile_boxes((grid_tile(6, 6),))))
        cells = as_tensors(codec.decode(record)).cells[:, 0]
        assert cells.shape == expected.shape
        torch.testing.assert_close(cells, expected, atol=1e-5, rtol=0)
        # Answer rows are some of the text rows.
        if len(boxes):
            first = int(batch.visual_mask[0].nonzero()[-1]) + 1
            rows = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0] - first
            torch.testing.assert_close(as_tensors(answers.decode(record)).cells[:, 0], cells[rows], atol=1e-6, rtol=0)


def test_eight_bits_keep_text_rows_as_well_as_answer_rows(tmp_path, build_cache):
    build_cache(tmp_path / "cache", signals=SIGNALS, limit=4, fidelity_samples=4)
    fidelity = open_cache(tmp_path / "cache").manifest.fidelity
    # A random teacher's nearly even attention leaves a small gradient, of which eight bits take their share.
    assert fidelity["text_attention_gradient_cosine"] > 0.95
    assert fidelity["text_attention_gradient_cosine"] > fidelity["answer_attention_gradient_cosine"] - 0.01
    assert fidelity["control_text_attention_gradient_cosine"] == pytest.approx(1.0, abs=1e-6)


@pytest.fixture(scope="module")
def trained(tiny_llava, tmp_path_factory, teacher, encoder, data):
    """A cache, its join for a student of 3 x 3 tokens, and that student."""
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.extract import extract

    path = tmp_path_factory.mktemp("trained") / "cache"
    extract(BuildConfig(cache=str(path), teacher=str(tiny_llava), template="short", data=data, **EXACT))
    joined = CachedDataset(
        open_dataset(data),
        encoder.with_grid((3, 3)),
        open_cache(path),
        terms=choose_terms(["text_attention"]),
        pad_token_id=0,
    )
    torch.manual_seed(0)
    tokenizer = encoder.tokenizer
    student = find_student(
        "mobilevlm",
        cache_dir=path,
        vocab_size=len(tokenizer),
        image_token_id=encoder.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        size="tiny",
    ).load()
    return joined, student.train()


def reference_loss(student, joined, dataset, encoder, batch, kind):
    """Row by row from the student's eager attention; the teacher's side from the batch."""
    student.language_model.set_attn_implementation("eager")
    teacher_cells = batch.targets["text_attention"].teacher[:, 0]  # [X, 9]
    rows = [eager_rows(student, collate([encoder(dataset[i])], 0), ((1,),)) for i in range(len(dataset))]
    seen = torch.cat([found[:, :9] for found in rows if len(found)])
    mass = teacher_cells.sum(-1)
    if kind == "cosine":
        values = mass * (1 - torch.nn.functional.cosine_similarity(teacher_cells, seen, dim=-1))
    else:
        share = teacher_cells / mass[:, None]
        ratio = share.log() - (seen / seen.sum(-1, keepdim=True)).log()
        values = mass * (share * ratio).sum(-1)
    return values.mean()


@pytest.mark.parametrize("kind", ["kl", "cosine"])
def test_the_loss_equals_a_reference_from_eager_attention_of_the_same_rows(trained, encoder, data, kind):
    joined, student = trained
    dataset = open_dataset(data)
    ids = list(dataset.sample_ids)
    batch = joined.batch([joined.sample_ids.index(name) for name in ids])
    objective = Objective(losses=replace(LOSSES, answer_kind=kind), groups=((1,),))
    student.language_model.set_attn_implementation("sdpa")
    terms = objective(student, AttentionCapture(student.language_model), batch, Shares())
    student.zero_grad()
    terms.total.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    expected = reference_loss(student, joined, dataset, encoder.with_grid((3, 3)), batch, kind)
    torch.testing.assert_close(terms.named()["text_attention"], expected, atol=2e-5, rtol=1e-4)
    student.zero_grad()
    expected.backward()
    compared = 0
    for name, parameter in student.named_parameters():
        scale = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        if scale > 1e-6:
            torch.testing.assert_close(found[name], parameter.grad, atol=2e-4 * scale + 1e-7, rtol=1e-3)
            compared += 1
    assert compared > 5


def test_micro_batches_share_the_mean_over_text_rows(trained):
    joined, student = trained
    objective = Objective(losses=LOSSES, groups=((1,),))
    capture = AttentionCapture(student.language_model)
    whole = joined.batch(range(len(joined)))
    parts = [joined.batch([position]) for position in range(len(joined))]
    totals = [sum(units) for units in zip(*(units_of(part) for part in parts), strict=True)]
    assert totals == list(units_of(whole))
    assert units_of(whole)[1 + [*TERMS].index("text_attention")] == len(whole.targets["text_attention"].teacher)
    with torch.no_grad():
        expected = objective(student, capture, whole, Shares()).total
        shares = step_shares(parts, totals)
        found = sum(objective(student, capture, part, share).total for part, share in zip(parts, shares, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_training_steps_bring_the_loss_down(trained):
    joined, student = trained
    objective = Objective(losses=LOSSES, groups=((1,),))
    capture = AttentionCapture(student.language_model)
    batch = joined.batch(range(len(joined)))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = objective(student, capture, batch, Shares()).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_weight_asks_for_the_signal_and_a_cache_without_it_is_refused(trained, tmp_path, build_cache):
    losses = LossWeights(text_attention=0.5)
    assert [term.reads for term in choose_terms(losses.distilled).values()] == [("text_attention",)]
    build_cache(tmp_path / "cache", limit=2)
    with pytest.raises(CacheMismatchError, match=r"'text_attention' needs a signal that .* does not hold"):
        check_signals(open_cache(tmp_path / "cache"), losses, phase="dft")


def test_a_changed_question_is_refused_by_the_number_of_text_rows(trained):
    joined, _ = trained
    sample = joined._dataset[0]
    first = replace(sample.turns[0], question=sample.turns[0].question + " is it big ?")
    changed = replace(sample, turns=(first, *sample.turns[1:]))
    place = joined.sample_ids.index(sample.sample_id)
    with pytest.raises(CacheMismatchError, match="text rows, the data now has"):
        joined._decode(place, joined._encoder(changed))


def test_rows_of_another_image_are_repeated_or_cut_to_the_samples_own(trained):
    joined, _ = trained
    control = CachedDataset(
        joined._dataset,
        joined._encoder,
        joined._cache,
        terms=choose_terms(["text_attention"]),
        pad_token_id=0,
        shuffle_teacher_images=True,
    )
    own, foreign = joined.batch(range(len(joined))), control.batch(range(len(joined)))
    left, right = (batch.targets["text_attention"].teacher for batch in (own, foreign))
    assert left.shape == right.shape
    assert not torch.equal(left, right)
