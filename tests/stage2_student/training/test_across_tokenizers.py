"""A student that reads other tokens than the teacher learns where the teacher looks in pictures, and nothing else of it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from test_check_cache import make_config
from tiny_cache import DATA, build_tiny_cache
from tiny_families import byte_tokenizer, save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vlm_distill_cache.common.attention.boxes import tile_boxes
from vlm_distill_cache.common.attention.capture import AttentionCapture
from vlm_distill_cache.common.attention.layers import student_groups
from vlm_distill_cache.common.attention.tiles import tiles_from_array
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.processors import tokenizer_fingerprint
from vlm_distill_cache.stage2_student.losses.objective import step_shares, units_of
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.students.library import open_library_student
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.checks import check_tokenizer
from vlm_distill_cache.stage2_student.training.preparation import prepare

TWO = "shapes:images=2,seed=5"
PICTURE_ONLY = {"lm": 1.0, "visual_columns": 1.0, "visual_map": 1.0}


def trained_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Byte-pair merges learnt from the very data, so that its tokens are neither the teacher's words nor bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        f"{turn.question} {turn.answer}"
        for sample in map(open_dataset(DATA).__getitem__, range(20))
        for turn in sample.turns
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>", *special], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=list(special), clean_up_tokenization_spaces=False,
    )  # fmt: skip


def with_trained_tokenizer(folder):
    """A tiny LLaVA whose tokenizer is replaced by one trained on the data."""
    tokenizer = trained_tokenizer("<image>")
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.config.image_token_index = model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["qwen2_vl", "llava"])
def student(request, tmp_path_factory):
    """A directory of another family, tokenizer, template, image processor and token grid than the cache's teacher."""
    folder = save_tiny(request.param, tmp_path_factory.mktemp("students") / request.param)
    return with_trained_tokenizer(folder) if request.param == "llava" else folder


def config_for(cache, student, output="unused", *, losses=None, data=DATA, limit=None, **phase):
    phase = {"steps": 2, "batch_size": 2, "losses": losses or PICTURE_ONLY} | phase
    return make_config(cache, output, student=str(student), data=data, limit=limit, dft=phase, device="cpu")


def test_the_student_reads_its_own_tokens_in_its_own_template(tiny_cache, student):
    prepared = prepare(config_for(tiny_cache[0], student))
    encoded = prepared.phases[0].dataset.load(0).encoded
    sample = open_dataset(DATA)[0]
    answers = prepared.tokenizer.decode(encoded.labels[encoded.supervised_rows])
    for turn in sample.turns:
        assert turn.answer in answers
    record = open_cache(tiny_cache[0]).read(sample.sample_id)
    assert len(record["labels"]) != len(encoded.supervised_rows)
    assert prepared.encoder.template.name in ("chat", "vicuna_v1")
    assert prepared.encoder.template.to_dict() == prepared.encoder_description["template"]


def test_the_column_loss_is_the_cosine_of_both_sides_on_shared_places(tiny_cache, student):
    """The reference pools each token's box on the picture with plain loops and takes eager attention."""
    prepared = prepare(config_for(tiny_cache[0], student, losses={"lm": 0.0, "visual_columns": 1.0}))
    phase, model = prepared.phases[0], prepared.student.eval()
    batch = phase.dataset.batch([0])
    encoded = phase.dataset.load(0).encoded
    shares = step_shares([batch], units_of(batch))
    loss = phase.objective(model, AttentionCapture(model.language_model), batch, shares[0]).terms["visual_columns"]

    model.language_model.set_attn_implementation("eager")
    sample = open_dataset(DATA)[0]  # of its packed conversations the first: visual rows see none of them
    inputs = model.model_inputs(collate([prepared.encoder(replace(sample, turns=sample.turns[:1]))], 0))
    attention = model.model(**inputs, output_attentions=True).attentions
    layers = student_groups(3, 1)[0]
    mean = torch.stack([attention[layer][0].mean(0) for layer in layers]).mean(0)  # [T, T]
    seen = (inputs["input_ids"][0] == model.image_token_id).nonzero()[:, 0]
    mine = mean[seen][:, seen].detach().mean(0)  # [N_s]
    record = open_cache(tiny_cache[0]).read(encoded.sample_id)
    theirs = torch.from_numpy(np.asarray(record["visual_columns"], dtype=np.float32))[:, 0]
    sides = {
        "teacher": (theirs, tile_boxes(tiles_from_array(record["tiles"]))),
        "student": (mine, tile_boxes(encoded.tiles)),
    }
    coarse = min(sides.values(), key=lambda side: len(side[0]))[1]
    pooled = {name: _pool(values, boxes, coarse) for name, (values, boxes) in sides.items()}
    expected = 1 - torch.nn.functional.cosine_similarity(pooled["teacher"], pooled["student"], dim=0)
    torch.testing.assert_close(loss.detach(), expected, atol=2e-5, rtol=1e-4)
    loss.backward()
    gradients = [p.grad.abs().max() for p in model.language_model.parameters() if p.grad is not None]
    assert max(gradients) > 0


def _pool(values, boxes, cells):
    """Sum of values on cells, by the share of each box's area that lies in the cell."""
    pooled = torch.zeros(len(cells))
    for value, (x0, y0, x1, y1) in zip(values, boxes[:, :4].tolist(), strict=True):
        for cell, (u0, v0, u1, v1) in enumerate(cells[:, :4].tolist()):
            shared = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
            pooled[cell] += float(value) * shared / ((x1 - x0) * (y1 - y0))
    return pooled


@pytest.mark.slow(quick=("llava",))
def test_training_on_the_signals_of_pictures_brings_the_student_closer(tiny_cache, student, tmp_path):
    losses = {"lm": 0.0, "visual_columns": 1.0}
    result = train(config_for(tiny_cache[0], student, tmp_path, losses=losses, limit=2, steps=20, lr=1e-2))
    values = [record["visual_columns"] for record in result.log]
    assert np.isfinite(values).all()
    assert np.mean(values[-5:]) < 0.6 * np.mean(values[:3])
    again = open_library_student(result.final)
    assert again.model.config.model_type == result.model.config.model_type
    provenance = json.loads((result.final / "distillation.json").read_text())
    assert provenance["encoder"]["template"] == result.preparation.encoder.template.to_dict()


@pytest.mark.parametrize("signal", ["logits", "answer_attention", "text_attention"])
def test_what_belongs_to_tokens_is_refused_with_both_fingerprints_and_what_would_work(
    tmp_path_factory, student, signal
):
    path = tmp_path_factory.getbasetemp() / "with-text"
    if not path.exists():
        build_tiny_cache(path, data=TWO)
    cache = open_cache(path)
    if signal == "text_attention":  # the tiny cache has none: the check looks at names
        cache.plan.signals["text_attention"] = {"codec": "text_attention"}
    tokenizer = AutoTokenizer.from_pretrained(student)
    theirs, mine = cache.plan.fingerprints["tokenizer"], tokenizer_fingerprint(tokenizer)
    message = (
        rf"student X: fingerprint {mine}, .* used {theirs}; {signal} cannot.*"
        rf"picture alone \(visual_columns, visual_map\) and set the weights of {signal} to 0"
    )
    with pytest.raises(CacheMismatchError, match=message):
        check_tokenizer(cache, tokenizer, choose_terms([signal, "visual_map"]), where="student X")
    check_tokenizer(cache, tokenizer, choose_terms(["visual_columns", "visual_map"]), where="student X")
    if signal != "text_attention":
        with pytest.raises(CacheMismatchError, match=f"{signal} cannot be distilled across tokenizers"):
            prepare(config_for(path, student, losses=PICTURE_ONLY | {signal: 1.0}, data=TWO))


def test_a_cache_without_signals_of_pictures_says_which_to_build(tmp_path):
    build_tiny_cache(tmp_path / "c", data="shapes:images=1,seed=5", signals=("logits",))
    with pytest.raises(CacheMismatchError, match="or build a cache with visual_columns or visual_map"):
        check_tokenizer(open_cache(tmp_path / "c"), byte_tokenizer(), choose_terms(["logits"]), where="student X")


def test_a_phase_of_language_modelling_alone_needs_no_common_tokenizer(tiny_cache, student):
    prepared = prepare(config_for(tiny_cache[0], student, losses={"lm": 1.0}))
    assert prepared.phases[0].steps == 2


def test_another_picture_is_refused_across_tokenizers_too(tmp_path, student):
    turns = [{"from": "human", "value": "<image>\nwhat color ?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    PIL.Image.new("RGB", (72, 72), "red").save(tmp_path / "a.png")
    build_tiny_cache(tmp_path / "c", data=str(tmp_path / "data.json"))
    options = {"student": str(student), "data": str(tmp_path / "data.json"),
               "dft": {"steps": 1, "losses": {"visual_columns": 1.0}}}  # fmt: skip
    prepare(make_config(tmp_path / "c", **options))
    PIL.Image.new("RGB", (72, 72), "blue").save(tmp_path / "a.png")
    with pytest.raises(CacheMismatchError, match=r"sample 'a' .*picture's hash was"):
        prepare(make_config(tmp_path / "c", **options))


def test_another_template_fits_the_signals_of_pictures_alone(tiny_cache):
    prepared = prepare(make_config(tiny_cache[0], template="vicuna_v1", dft={"steps": 1, "losses": PICTURE_ONLY}))
    assert prepared.encoder.template.name == "vicuna_v1"
    assert prepared.phases[0].dataset.load(0).targets.keys() == {"visual_columns", "visual_map"}
    with pytest.raises(CacheMismatchError, match=r"'vicuna_v1' .* saw: 'short'"):
        prepare(make_config(tiny_cache[0], template="vicuna_v1", dft={"steps": 1, "losses": {"logits": 1.0}}))


def test_a_student_without_a_template_must_be_given_one(tiny_cache, tmp_path, student):
    shutil.copytree(student, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    if student.name == "qwen2_vl":
        with pytest.raises(ConfigError, match=r"no prompt template of its own; name one \(--set template"):
            prepare(config_for(tiny_cache[0], tmp_path / "bare"))
    config = make_config(
        tiny_cache[0],
        student=str(tmp_path / "bare"),
        template="short",
        dft={"steps": 1, "losses": PICTURE_ONLY},
    )
    assert prepare(config).encoder.template.name == "short"
