"""Evaluation: equal to slow references, the same for teacher and student, honest about constant answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_cache import DATA
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.layers import student_groups
from vlm_distill_cache.common.attention.tiles import tiles_to_array
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.live import RowAttention, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.builtin import load_image_processor, load_tokenizer
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import EvaluationSet, Sample, Turn
from vlm_distill_cache.data.shapes.dataset import ShapesDataset, shapes_evaluation
from vlm_distill_cache.data.text.collate import collate, supervised_rows, visual_keys
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.generation import generate_answers
from vlm_distill_cache.data.text.templates import TEMPLATES
from vlm_distill_cache.stage2_student.batches.batch import TrainingSample
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset
from vlm_distill_cache.stage2_student.batches.signals import collate_samples, decode_signals
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.scores import evaluate
from vlm_distill_cache.stage2_student.scores.evaluate import (
    answer_log_probs,
    ask_letters,
    encode_pair,
    evaluate_model,
    score_agreement,
    score_pairs,
    score_questions,
)
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport, render_table, table_rows

TOKENIZER = load_tokenizer()
IMAGE = TOKENIZER.convert_tokens_to_ids("<image>")
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 72,
    "patch_size": 12,
}
TEXT = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def make_student(seed=0, projector_type="mlp"):
    torch.manual_seed(seed)
    config = MobileVLMConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_id=IMAGE,
        projector_type=projector_type,
    )
    return MobileVLMForConditionalGeneration(config).eval()


def make_encoder(grid=(6, 6), template="short"):
    return SampleEncoder(
        tokenizer=TOKENIZER,
        image_encoder=ImageEncoder(processor=load_image_processor(), layout="square", grid=grid),
        template=TEMPLATES[template],
        image_token_id=IMAGE,
        max_length=512,
    )


@pytest.fixture(scope="module")
def items():
    return shapes_evaluation("validation", items=3)


def reference_log_probs(model, encoder, image, caption):
    sample = Sample(sample_id="x", images=(image,), turns=(Turn(question="", answer=caption),))
    encoded = encoder(sample)
    logits = model(
        input_ids=torch.as_tensor(encoded.input_ids)[None],
        pixel_values=torch.as_tensor(encoded.image_inputs["pixel_values"]),
    ).logits[0]
    log_probs = logits.log_softmax(-1)
    return [float(log_probs[row, label]) for row, label in enumerate(encoded.labels.tolist()) if label != IGNORE_INDEX]


@torch.no_grad()
@pytest.mark.parametrize("template", ["short", "plain"])
def test_caption_scores_equal_each_caption_scored_alone(items, template):
    model, encoder = make_student(), make_encoder(template=template)
    pairs = items.pairs[::3]
    encoded = [sample for pair in pairs for sample in encode_pair(encoder, pair)]
    found = [
        rows[owner == segment]
        for rows, owner in answer_log_probs(model, encoded, 0)
        for segment in sorted(set(owner.tolist()))
    ]
    expected = [
        reference_log_probs(model, encoder, pair.image, caption)
        for pair in pairs
        for caption in (pair.right, pair.wrong)
    ]
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    scores = score_pairs(model, encoder, pairs, batch_size=4)
    sums, means = ([function(rows) for rows in expected] for function in (np.sum, np.mean))
    assert scores["likelihood"].tolist() == [float(r > w) for r, w in zip(sums[::2], sums[1::2], strict=True)]
    assert scores["likelihood_per_token"].tolist() == [
        float(r > w) for r, w in zip(means[::2], means[1::2], strict=True)
    ]


@torch.no_grad()
def test_batched_answers_equal_those_of_each_prompt_alone(items):
    model, encoder = make_student(), make_encoder()
    prompts = [build_prompt(encoder, item.image, item.question) for item in items.questions[::4]]
    assert len({len(prompt) for prompt in prompts}) > 1
    made = generate_answers(model, encoder, prompts, max_new_tokens=6)
    for prompt, text, first in zip(prompts, made.texts, made.first_logits, strict=True):
        alone = generate_answers(model, encoder, [prompt], max_new_tokens=6)
        assert alone.texts == (text,)
        torch.testing.assert_close(alone.first_logits[0], first, atol=1e-4, rtol=1e-4)


def test_questions_are_right_exactly_when_the_generated_answer_is_the_expected_one(items):
    model, encoder = make_student(), make_encoder()
    asked = items.questions[:6]
    prompts = [build_prompt(encoder, item.image, item.question) for item in asked]
    texts = generate_answers(model, encoder, prompts, max_new_tokens=16).texts
    given = [
        replace(item, answer=text.upper() + "." * (index % 2))
        for index, (item, text) in enumerate(zip(asked, texts, strict=True))
    ]
    given[2] = replace(given[2], answer=given[2].answer + " circle")
    assert score_questions(model, encoder, given, batch_size=4).tolist() == [1, 1, 0, 1, 1, 1]


def test_questions_are_asked_with_their_samples_system_prompt(items):
    model, encoder, system = make_student(), make_encoder(template="vicuna_v1"), "answer directly ."
    asked = [replace(item, system=system) for item in items.questions[:6]]
    prompts = [build_prompt(encoder, item.image, item.question, system) for item in asked]
    texts = generate_answers(model, encoder, prompts, max_new_tokens=16).texts
    given = [replace(item, answer=text) for item, text in zip(asked, texts, strict=True)]
    assert score_questions(model, encoder, given, batch_size=6).tolist() == [1] * 6
    plain = [build_prompt(encoder, item.image, item.question) for item in asked]
    assert all(len(one) != len(other) for one, other in zip(prompts, plain, strict=True))


class ConstantAnswer(torch.nn.Module):
    """Answers every prompt with the same words."""

    def __init__(self, text):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]

    def first_logits(self, rows):
        logits = torch.zeros(rows, len(TOKENIZER))
        logits[:, self.ids[0]] = 1
        return logits

    def generate(self, input_ids, logits_processor, **kwargs):
        answer = torch.tensor([*self.ids, TOKENIZER.eos_token_id]).expand(len(input_ids), -1)
        logits_processor(input_ids, self.first_logits(len(input_ids)))
        return torch.cat([input_ids, answer], 1)


def test_an_expected_answer_of_many_tokens_can_be_matched(items):
    class Cut(ConstantAnswer):
        def generate(self, input_ids, logits_processor, max_new_tokens, **kwargs):
            made = super().generate(input_ids, logits_processor)
            return made[:, : input_ids.shape[1] + max_new_tokens]

    answer = " ".join(["red"] * 40)
    asked = [replace(item, answer=answer) for item in items.questions[:2]]
    assert score_questions(Cut(answer), make_encoder(), asked, batch_size=2).tolist() == [1, 1]


@torch.no_grad()
def test_a_model_whose_logits_are_no_numbers_is_refused_not_scored(items):
    model = make_student()
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        score_pairs(model, make_encoder(), items.pairs[:2], batch_size=2)


def test_the_likelihood_of_letters_that_begin_alike_is_not_measured(items):
    encoder = make_encoder()
    alike = replace(items.pairs[0], item_id="alike")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_letter_token", lambda *_: 5)
        assert "likelihood" not in ask_letters(ConstantAnswer("A"), encoder, [alike], batch_size=2)


@pytest.mark.parametrize(("answer", "bias"), [("A", 1.0), ("(B)", -1.0)])
def test_a_constant_letter_is_half_right_never_in_both_orders_and_biased(items, answer, bias):
    scores = ask_letters(ConstantAnswer(answer), make_encoder(), items.pairs, batch_size=16)
    means = {name: float(values.mean()) for name, values in scores.items()}
    assert (means["mean"], means["both_right"], means["bias"], means["unparsed"]) == (0.5, 0.0, bias, 0.0)
    assert means["likelihood"] == 0.5


def test_an_answer_without_a_letter_counts_as_unparsed_and_wrong(items):
    scores = ask_letters(ConstantAnswer("red circle"), make_encoder(), items.pairs, batch_size=16)
    assert scores["unparsed"].mean() == 1.0
    assert scores["mean"].mean() == 0.0
    assert scores["likelihood"].mean() == 0.5


def test_letters_by_likelihood_follow_the_first_answer_token(items):
    class Knows(ConstantAnswer):
        def first_logits(self, rows):
            logits = torch.zeros(rows, len(TOKENIZER))
            for row in range(rows):  # orders alternate: the right caption is (A), then (B)
                logits[row, TOKENIZER.convert_tokens_to_ids("AB"[row % 2])] = 1
            return logits

    scores = ask_letters(Knows("red"), make_encoder(), items.pairs, batch_size=16)
    assert scores["likelihood"].mean() == 1.0


def test_a_llava_and_a_student_with_the_same_weights_get_the_same_report(items):
    student = make_student()
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**TEXT),
            vision_config=CLIPVisionConfig(**VISION),
            image_token_index=IMAGE,
            projector_hidden_act="gelu",
        )
    ).eval()
    llava.model.language_model.load_state_dict(
        {key: value for key, value in student.model.state_dict().items() if key.startswith(("embed", "layers", "norm"))}
    )
    llava.model.vision_tower.load_state_dict(student.model.vision_tower.vision_tower.vision_model.state_dict())
    llava.model.multi_modal_projector.linear_1.load_state_dict(student.model.mm_projector[0].state_dict())
    llava.model.multi_modal_projector.linear_2.load_state_dict(student.model.mm_projector[2].state_dict())
    llava.lm_head.load_state_dict(student.lm_head.state_dict())
    few = EvaluationSet(pairs=items.pairs[::2], questions=items.questions[::4])
    reports = [evaluate_model(model, make_encoder(), few, resamples=50) for model in (student, llava)]
    assert reports[0] == reports[1]


class JoinedSamples:
    """What `score_agreement` asks of cached data, from records in memory."""

    def __init__(self, encoder, samples, records, codecs, *, layers="middle"):
        self.layers, self.terms = layers, choose_terms(codecs)
        self.joined = [
            TrainingSample(encoded, decode_signals(record, codecs, self.terms, encoded.tiles, where="memory"))
            for encoded, record in zip([encoder(sample) for sample in samples], records, strict=True)
        ]

    def __len__(self):
        return len(self.joined)

    def student_groups(self, depth):
        return student_groups(depth, 1, self.layers)

    def batch(self, positions):
        return collate_samples([self.joined[position] for position in positions], self.terms, pad_token_id=0)


@torch.no_grad()
def make_records(model, encoder, samples, *, layers="middle"):
    """Records of a model's own signals, exact, and their codecs."""
    logit_codec = LogitCodec(floor=0.0, min_k=8, max_k=64, exact=True)
    attention_codec = RowAttentionCodec(grid=(6, 6), groups=1, exact=True)
    capture = AttentionCapture(model.language_model)
    groups = student_groups(3, 1, layers)
    records = []
    for sample in samples:
        encoded = encoder(sample)
        batch = collate([encoded], 0)
        rows, keys = supervised_rows(batch), visual_keys(batch)
        labels = batch.labels[batch.labels != IGNORE_INDEX]
        with capture.record({"answer": AttentionRequest(rows, keys, groups)}) as maps:
            logits = model(**batch.model_inputs(), supervised=batch.labels != IGNORE_INDEX).logits
        cells = maps["answer"][0].transpose(0, 1)  # [A, G, 36]
        signals = {
            **logit_codec.encode(select_entries(logit_codec, logits, labels)),
            **attention_codec.encode(RowAttention.from_cells(cells)),
        }
        records.append({"tiles": tiles_to_array(encoded.tiles), **signals})
    return records, {"logits": logit_codec, "answer_attention": attention_codec}


@pytest.mark.parametrize("layers", ["middle", "all", (0, 2)])
def test_a_model_agrees_fully_with_the_cache_of_itself_and_less_with_anothers(layers):
    encoder = make_encoder()
    samples = [ShapesDataset("train", 5)[index] for index in range(5)]
    model = make_student()
    records, codecs = make_records(model, encoder, samples, layers=layers)
    cached = JoinedSamples(encoder, samples, records, codecs, layers=layers)
    with torch.inference_mode():
        same = {name: values.mean() for name, values in score_agreement(model, cached, batch_size=2).items()}
        other = score_agreement(make_student(seed=1), cached, batch_size=2)
    assert same["teacher/kl"] == pytest.approx(0, abs=1e-5)
    assert same["attention/kl"] == pytest.approx(0, abs=1e-5)
    assert same["attention/cosine"] == pytest.approx(1, abs=1e-5)
    assert same["teacher/top1"] == 1.0
    assert {name: len(values) for name, values in other.items()} == dict.fromkeys(same, 5)
    assert other["teacher/kl"].min() > 0.01
    assert other["attention/kl"].min() > 0.001
    assert other["attention/cosine"].max() < 0.999
    assert other["teacher/top1"].max() < 0.9


def test_samples_that_the_teacher_does_not_look_at_have_no_agreement_of_attention():
    encoder, model = make_encoder(), make_student()
    samples = [ShapesDataset("train", 2)[index] for index in range(2)]
    records, codecs = make_records(model, encoder, samples)
    blind = {name: np.zeros_like(records[0][name]) for name in ("answer_attention", "answer_image_mass")}
    cached = JoinedSamples(encoder, samples, [records[0] | blind, records[1]], codecs)
    with torch.inference_mode():
        found = score_agreement(model, cached, batch_size=2)
    assert {name: len(values) for name, values in found.items()} == {
        "teacher/kl": 2, "teacher/top1": 2, "attention/kl": 1, "attention/cosine": 1
    }  # fmt: skip


def test_a_teacher_agrees_fully_with_its_own_cache_on_disk(tiny_cache):
    path, teacher = tiny_cache
    cached = CachedDataset(
        open_dataset(DATA),
        teacher.encoder,
        open_cache(path),
        terms=choose_terms(["logits", "answer_attention"]),
        pad_token_id=0,
    )
    report = evaluate_model(teacher.model, teacher.encoder, EvaluationSet(), cached=cached, resamples=20)
    scores = {name: score.value for name, score in report.scores.items()}
    assert scores == pytest.approx(
        {"teacher/kl": 0, "teacher/top1": 1, "attention/kl": 0, "attention/cosine": 1}, abs=1e-4
    )
    assert {score.items for score in report.scores.values()} == {len(cached)}


def test_only_the_signals_that_the_cache_is_read_for_are_compared():
    samples = [ShapesDataset("train", 2)[index] for index in range(2)]
    records, codecs = make_records(make_student(), make_encoder(), samples)
    student = make_student(projector_type="ldpnetv2")
    found = {}
    for signal in codecs:
        chosen = {signal: codecs[signal]}
        cached = JoinedSamples(make_encoder(grid=(3, 3)), samples, records, chosen)
        with torch.inference_mode():
            found[signal] = set(score_agreement(student, cached, batch_size=2))
    assert found == {
        "logits": {"teacher/kl", "teacher/top1"},
        "answer_attention": {"attention/kl", "attention/cosine"},
    }


def test_report_has_means_and_kinds_and_survives_json(items):
    model = make_student(projector_type="ldpnetv2").train()
    report = evaluate_model(model, make_encoder(grid=(3, 3)), items, letters=False, resamples=20)
    assert model.training
    kinds = {pair.kind for pair in items.pairs}
    parts = [report.scores[f"likelihood/{kind}"].value for kind in kinds]
    assert report.scores["likelihood"].value == pytest.approx(sum(parts) / len(parts))
    assert report.scores["likelihood"].items == len(items.pairs)
    assert report.scores["questions"].items == len(items.questions)
    assert not any(name.startswith(("letters", "teacher")) for name in report.scores)
    assert EvaluationReport.from_dict(report.to_dict()) == report


def test_a_model_is_back_in_training_mode_after_an_error(items):
    model = make_student(projector_type="ldpnetv2").train()
    with pytest.raises(ValueError, match="image tokens"):  # the encoder gives 36 visual tokens, the student takes 9
        evaluate_model(model, make_encoder(grid=(6, 6)), items)
    assert model.training


def test_table_leads_with_what_matters_and_leaves_out_what_says_nothing():
    half, none = Score(value=0.5, low=0.25, high=0.75, items=80), Score(value=0, low=0, high=0, items=80)
    both = {"likelihood": half, "likelihood/swap_att": half, "likelihood/swap_obj": none, "questions": half}
    both |= {"letters/mean": none, "teacher/top1": half}
    table = render_table(
        {
            "sft": EvaluationReport(scores=both),
            "distilled": EvaluationReport(scores={**both, "teacher/kl": half}),
        }
    )
    lines = table.splitlines()
    assert lines[0].split() == ["sft", "distilled"]
    assert [line.split()[0] for line in lines[1:4]] == ["captions", "questions,", "top-1"]
    assert lines[1].split()[-6:] == ["50.0", "[25.0,", "75.0]"] * 2
    assert lines[4:6] == ["", "captions by likelihood, by kind"]
    assert lines[6].startswith("  swap_att ")
    assert lines[-1].split()[-4:] == ["-", "0.500", "[0.250,", "0.750]"]
    assert len(lines) == 9
    assert "letter" not in table
    assert lines[7].startswith("  swap_obj ")  # all wrong says something of a kind
    some = render_table({"sft": EvaluationReport(scores={"letters/mean": none, "letters/unparsed": half})})
    assert [line.split("  ")[:2] for line in some.splitlines()[1:]] == [["captions by letter, %"], ["", "not a letter"]]


def test_the_gain_is_paired_where_both_models_have_the_same_items():
    def report(values):
        items = {"likelihood": {"a": values, "b": values}}
        score = Score(value=float(np.mean(values)), low=0.1, high=0.9, items=8)
        return EvaluationReport(scores={"likelihood": score, "questions": score}, items=items)

    reports = {"sft": report([0.0, 1.0, 0.0, 1.0]), "distilled": report([1.0, 1.0, 1.0, 1.0]), "teacher": report([1.0])}
    captions, questions = (row.gain for row in table_rows(reports, ("sft", "distilled"))[0])
    assert captions.value == questions.value == 0.5
    assert questions.high - questions.low > captions.high - captions.low  # of questions only the intervals are known
    assert questions.low == pytest.approx(0.5 - np.hypot(0.9, 0.4))
    same = table_rows({"sft": reports["sft"], "distilled": reports["sft"]}, ("sft", "distilled"))[0][0].gain
    assert (same.value, same.low, same.high) == (0, 0, 0)
    lines = render_table(reports, ("sft", "distilled")).splitlines()
    assert lines[0].split() == ["sft", "distilled", "teacher", "gain"]
    assert "+50.0 [+" in lines[1]
    assert all(row.gain is None for row in table_rows(reports)[0])


def test_names_of_a_caches_author_do_not_control_the_terminal():
    score = Score(value=0.5, low=0.4, high=0.6, items=4)
    name = "\x1b]0;owned\x07\u202e\n| [x](http://e)"
    report = EvaluationReport(scores={f"likelihood/{name}": score, f"questions/{name}": score})
    lines = render_table({"teacher": report}).splitlines()
    assert len(lines) == 5  # heads, two headings, two kinds
    assert all(line.isprintable() for line in lines)
