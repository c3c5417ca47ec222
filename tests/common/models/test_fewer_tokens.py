"""Students that feed fewer visual tokens say what the whole sequence says with the others masked, in every family."""

import copy

import numpy as np
import pytest
import torch
from image_array import ImageArray
from tiny_families import TINY, save_tiny

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.hidden import HiddenCapture, HiddenRequest
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.around import surround
from vlm_distill_cache.common.models.changed import change_model
from vlm_distill_cache.common.models.tokens.decoding_tokens import decoding_counts
from vlm_distill_cache.common.models.tokens.fed_sequence import pool
from vlm_distill_cache.common.models.tokens.fewer_tokens import rows_needed, scores_given, tower_features
from vlm_distill_cache.common.models.tokens.visual_tokens import choose
from vlm_distill_cache.common.models.vision_language import PAST
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.templates import get_template

# The library's InternVL processor, up to 5.17.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
PICTURES = ((40, 30), (24, 60), None)
QUESTIONS = ("What is it?", "Is it green?", "Who?")


class Opened:
    """A tiny model of a family and three prompts, the last without a picture."""

    def __init__(self, name, folder):
        opened = open_family_model(save_tiny(name, folder))
        self.model, self.family = opened.model, opened.family
        self.parts = opened.family.parts
        self.encoder = encoder = SampleEncoder(
            tokenizer=opened.tokenizer,
            image_encoder=opened.image_encoder,
            template=get_template(opened.family.template, opened.tokenizer),
            image_token_id=opened.family.image_token_id(opened.model.config),
            max_length=1000,
        )
        self.prompts = [
            build_prompt(encoder, image(size), text) for size, text in zip(PICTURES, QUESTIONS, strict=True)
        ]

    def inputs(self, *which):
        chosen = [self.prompts[i] for i in which]
        return dict(
            self.family.generation_inputs(self.model.config, chosen, 0, torch.device("cpu"), dtype=torch.float32)
        )

    def training_batch(self):
        """Two conversations about one picture in one sequence where that can be, one about another, one about none."""
        turns = (Turn(question="What is it?", answer="A dog"), Turn(question="Is it green?", answer="Yes"))
        packs = self.family.packs
        shown = [
            ((image(PICTURES[0]),), turns if packs else turns[:1]),
            ((image(PICTURES[1]),), turns[:1]),
            ((), turns[:1]),
        ]
        samples = [
            Sample(sample_id=f"s{at}", images=images, turns=said, independent_turns=packs and len(said) > 1)
            for at, (images, said) in enumerate(shown)
        ]
        return collate([self.encoder(sample) for sample in samples], 0)


def image(size):
    if size is None:
        return None
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return ImageArray(pixels, f"p{size}")


@pytest.fixture(scope="module", params=list(TINY))
def opened(request, tmp_path_factory):
    return Opened(request.param, tmp_path_factory.mktemp(request.param))


def masked(model, parts, given):
    """The whole sequence, left out tokens masked and pooled ones in the place of theirs: slow and obvious."""

    def wrapper(run, decoder, **arguments):
        rows, length = arguments["inputs_embeds"].shape[:2]
        stands, here = given.repeat_interleave(rows // len(given), dim=0), torch.arange(length)
        gone = torch.zeros(len(stands), length, dtype=torch.bool)
        gone[:, : stands.shape[1]] = stands != here[: stands.shape[1]]
        front = pool(arguments["inputs_embeds"][:, : stands.shape[1]], stands)
        arguments["inputs_embeds"] = torch.cat([front, arguments["inputs_embeds"][:, stands.shape[1] :]], dim=1)
        if arguments.get("deepstack_visual_embeds") is not None:
            mask, found = arguments["visual_pos_masks"], []
            for feature in arguments["deepstack_visual_embeds"]:
                whole = feature.new_zeros(*mask.shape, feature.shape[-1]).index_put((mask,), feature)
                found.append(pool(whole[:, : stands.shape[1]], stands)[mask[:, : stands.shape[1]]])
            arguments["deepstack_visual_embeds"] = found
        arguments["attention_mask"] = blocked(arguments["attention_mask"], gone)
        return run(**arguments)

    surround(model, parts, wrapper)
    return model


def blocked(mask, gone):
    if isinstance(mask, dict):
        return {kind: blocked(part, gone) for kind, part in mask.items()}
    if mask is None:
        length = gone.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if mask.ndim == 2:
        return mask.masked_fill(gone, 0)
    return mask.masked_fill(gone[:, None, None], False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def visual_of(opened, inputs):
    return inputs["input_ids"] == opened.model.config.image_token_id


def select(opened, **settings):
    """A copy of a model that feeds fewer visual tokens."""
    model = copy.deepcopy(opened.model)
    change_model(model, opened.parts, visual_tokens={"keep": 0.5, **settings})
    return model


def decoder_of(model, opened):
    return model.get_submodule(opened.parts["language_model"])


@torch.no_grad()
@pytest.mark.slow(quick=("compodistill", "llava_onevision"))
def test_every_family_says_what_the_whole_sequence_says_with_the_others_masked(opened):
    inputs = opened.inputs(0, 1, 2)
    visual = inputs["input_ids"] == opened.model.config.image_token_id
    text = inputs["attention_mask"].bool() & ~visual
    # Noise is arranged in three ways: tiles that are joined, pictures of many shapes, and one tile a picture.
    drawn = ("random",) if opened.model.config.model_type in ("llava_next", "qwen2_5_vl", "llava") else ()
    for by in (*drawn, "attention", "grid"):
        model = select(opened, by=by)
        logits = model(**inputs).logits
        stands = decoder_of(model, opened).stands_for
        kept = (stands == torch.arange(stands.shape[1])) & visual
        for row, count in zip(kept.sum(1).tolist(), visual.sum(1).tolist(), strict=True):
            assert row == 0 == count or 0 < row <= max(1, int(count / 2 + 0.5))
        reference = masked(copy.deepcopy(opened.model), opened.parts, stands)
        expected = reference(**inputs).logits
        torch.testing.assert_close(logits[text | kept], expected[text | kept], atol=2e-4, rtol=1e-4)
        assert not logits[visual & ~kept].any()
    how = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    assert torch.equal(model.generate(**inputs, **how), reference.generate(**inputs, **how, use_cache=False))
    batch = opened.training_batch()
    inputs = opened.family.model_inputs(opened.model.config, batch, dtype=torch.float32)
    found = model(**inputs, use_cache=False).logits[batch.labels != IGNORE_INDEX]
    decoder = decoder_of(model, opened)
    # Nobody runs what is padding, so that the text without a picture does not keep the others long.
    runs = (decoder.stands_for == torch.arange(batch.labels.shape[1])).sum(1)
    assert (decoder.places >= 0).sum(1).max() < batch.labels.shape[1]
    assert (decoder.places >= 0).sum(1)[2] < runs[2] == batch.labels.shape[1]
    reference = masked(copy.deepcopy(opened.model), opened.parts, decoder.stands_for)
    expected = reference(**inputs, use_cache=False).logits[batch.labels != IGNORE_INDEX]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    inputs = opened.inputs(0, 1, 2)
    everything = select(opened, keep=10_000, by="attention")
    assert torch.equal(everything(**inputs).logits, opened.model(**inputs).logits)
    assert decoder_of(everything, opened).places is None


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return Opened("llava", tmp_path_factory.mktemp("llava"))


@torch.no_grad()
def test_beams_sampling_and_later_turns_go_on_from_a_shorter_cache(llava):
    model, inputs = select(llava, by="attention"), llava.inputs(0, 1, 2)
    model(**inputs)
    stands = decoder_of(model, llava).stands_for
    reference = masked(copy.deepcopy(llava.model), llava.parts, stands)
    how = {"max_new_tokens": 4, "suppress_tokens": [model.config.image_token_id]}
    for more in ({"num_beams": 3, "do_sample": False}, {"num_return_sequences": 2, "do_sample": True}):
        torch.manual_seed(0)
        slow = reference.generate(**inputs, **how, **more, use_cache=False)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **how, **more), slow)
    begun = model(**inputs, use_cache=True)
    past, length = begun[PAST], inputs["input_ids"].shape[1]
    assert past.get_seq_length() == length
    runs = (stands == torch.arange(length)) & inputs["attention_mask"].bool()
    assert past.layers[0].keys.shape[2] == int(runs.sum(1).max()) < length
    more = torch.tensor([[5, 6, 7]]).expand(3, -1)
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    expected = reference(
        input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=inputs["pixel_values"]
    ).logits[:, length:]
    past = model(**inputs, position_ids=positions[:, :length], use_cache=True)[PAST]
    step = {"attention_mask": mask, "position_ids": positions[:, length:], PAST: past}
    torch.testing.assert_close(model(input_ids=more, **step).logits, expected, atol=2e-4, rtol=1e-4)
    behind = int(visual_of(llava, inputs).flip(1).int().argmax(1)[:2].min())  # the text behind the pictures
    with pytest.raises(ModelError, match="tokens were to be taken back, more than follow the pictures"):
        past.crop(-behind - 12)  # 3 words, and 9 of a picture
    past.crop(-2)
    assert past.get_seq_length() == length + 1
    # Words behind the picture that were read with it are taken back, as guesses are.
    alone, again = llava.inputs(0), {"attention_mask": llava.inputs(0)["attention_mask"]}
    read = model(**alone, use_cache=True)
    read[PAST].crop(-2)
    found = model(input_ids=alone["input_ids"][:, -2:], **{PAST: read[PAST]}, **again).logits
    torch.testing.assert_close(found, read.logits[:, -2:], atol=2e-4, rtol=1e-4)
    last = {**step, "position_ids": positions[:, length + 1 :]}
    torch.testing.assert_close(
        copy.deepcopy(model)(input_ids=more[:, 1:], **last).logits, expected[:, 1:], atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_masks_that_are_ready_and_captures_are_those_of_the_masked_sequence(llava, implementation):
    model, inputs = select(llava, by="grid"), llava.inputs(0, 1, 2)
    reference = masked(copy.deepcopy(llava.model), llava.parts, stands_of(model, llava, inputs))
    ids, padding = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = ids == model.config.image_token_id
    ready = padding[:, None, None] & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    if implementation == "eager":
        ready = torch.zeros(ready.shape).masked_fill(~ready, torch.finfo(torch.float32).min)
    last = torch.full((3, 1), ids.shape[1] - 1)
    keys = torch.stack([torch.cat([row.nonzero()[:, 0], torch.tensor([-1] * 9)])[:9] for row in visual])
    found = []
    for one, mask in ((model, inputs["attention_mask"]), (model, ready), (reference, ready)):
        decoder = one.get_submodule(llava.parts["language_model"])
        one.zero_grad()
        capture = AttentionCapture(decoder)
        if implementation == "eager":
            decoder.set_attn_implementation("eager")
        with HiddenCapture(decoder).record({"h": HiddenRequest(last, (0, 2, 3))}) as states:
            if implementation == "eager":
                logits, maps = one(**{**inputs, "attention_mask": mask}, use_cache=False).logits, {"a": torch.zeros(1)}
            else:
                with capture.record({"a": AttentionRequest(last, keys, ((0,), (1, 2)))}) as maps:
                    logits = one(**{**inputs, "attention_mask": mask}, use_cache=False).logits
        logits[padding & ~visual].square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}
        found.append((gradients, maps["a"].detach(), states["h"].detach()))
    for gradients, attention, states in found[:2]:
        assert gradients.keys() == found[2][0].keys()
        assert any("multi_modal_projector" in name for name in gradients)
        for name, wanted in found[2][0].items():
            torch.testing.assert_close(gradients[name], wanted, atol=1e-5 + 1e-4 * float(wanted.abs().max()), rtol=1e-3)
        torch.testing.assert_close(attention, found[2][1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states, found[2][2], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def stands_of(model, opened, inputs):
    model(**inputs)
    return decoder_of(model, opened).stands_for


@torch.no_grad()
def test_scores_are_those_of_the_tower_of_a_regression_or_given(llava):
    inputs = llava.inputs(0, 2, 1)
    visual = inputs["input_ids"] == llava.model.config.image_token_id
    places = [row.nonzero()[:, 0] for row in visual]

    def kept(**settings):
        stands = stands_of(select(llava, keep=4, **settings), llava, inputs)
        return [(stands[b, places[b]] >= 0).tolist() for b in (0, 2)]

    eager = copy.deepcopy(llava.model)
    eager.model.vision_tower.set_attn_implementation("eager")
    # LLaVA reads the last hidden state but one: of 2 layers, the first one's attention made it.
    tower = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    attention = tower.attentions[0].mean(dim=(1, 2))[:, 1:]  # [2, 9], without the class token
    sinks = torch.linspace(0, 1, 9)
    assert kept(by="attention") == choose(attention, 4).tolist()
    assert kept(by="sinks", sinks=sinks.tolist(), sink_penalty=0.5) == choose(attention - 0.5 * sinks, 4).tolist()
    features = tower_features(copy.deepcopy(llava.model), llava.parts, inputs)
    for index, one in enumerate(features):
        torch.testing.assert_close(one, tower.hidden_states[-2][index, 1:], atol=1e-5, rtol=1e-5)
    weights = torch.randn(32, generator=torch.Generator().manual_seed(3))
    gaze = {"weights": weights.tolist(), "bias": 2.0}
    assert kept(by="gaze", gaze=gaze) == [choose((one @ weights)[None], 4)[0].tolist() for one in features]
    model = select(llava, keep=4, by="gaze", gaze=gaze)
    given = torch.full((3, 9), torch.nan)
    given[0] = torch.arange(9)
    with scores_given(model, given):
        stands = stands_of(model, llava, inputs)
    assert (stands[0, places[0]] >= 0).tolist() == [False] * 5 + [True] * 4
    assert (stands[2, places[2]] >= 0).tolist() == kept(by="gaze", gaze=gaze)[1]
    assert kept(by="random") == kept(by="random") != kept(by="random", seed=1)


@torch.no_grad()
@pytest.mark.parametrize("by", ["attention", "grid"])
def test_a_picture_that_an_answer_follows_at_once_keeps_its_last_token(llava, by):
    model, inputs = select(llava, keep=2, by=by), llava.inputs(0, 2)
    token = model.config.image_token_id
    end = int((inputs["input_ids"][0] == token).nonzero().max()) + 1
    inputs |= {"input_ids": inputs["input_ids"][:1, :end], "attention_mask": inputs["attention_mask"][:1, :end]}
    stands = stands_of(model, llava, inputs)
    assert stands[0, -1] == end - 1
    assert model(**inputs).logits[0, -1].any()
    longer = {**llava.inputs(0, 2)}
    rows = torch.zeros(longer["input_ids"].shape, dtype=torch.bool)
    last = int((longer["input_ids"][0] == token).nonzero().max())
    assert stands_of(model, llava, longer)[0, last] != last
    rows[0, last] = True
    with rows_needed(model, rows):
        assert stands_of(model, llava, longer)[0, last] == last
    assert (stands_of(model, llava, longer)[0] < 0).sum() == (0 if by == "grid" else 7)


@torch.no_grad()
def test_tokens_are_chosen_however_a_model_is_called_or_copied(llava):
    model, inputs = select(llava, by="attention"), llava.inputs(0, 1, 2)
    expected, three = model(**inputs).logits, ("input_ids", "pixel_values", "attention_mask")
    adapted = copy.deepcopy(model)  # as adapters take a part that is trained whole
    adapted.model.multi_modal_projector = copy.deepcopy(adapted.model.multi_modal_projector)
    for call in (
        lambda: model.forward(**inputs).logits,
        lambda: model.lm_head(model.model(**inputs).last_hidden_state),
        lambda: model(*(inputs[name] for name in three)).logits,
        lambda: model.lm_head(model.model(*(inputs[name] for name in three)).last_hidden_state),
        lambda: adapted(**inputs).logits,
    ):
        assert torch.equal(call(), expected)


@torch.no_grad()
def test_labels_right_behind_a_picture_are_asked_of_its_last_token(llava):
    model, inputs = select(llava, keep=2, by="attention"), llava.inputs(0, 1, 2)
    visual = inputs["input_ids"] == model.config.image_token_id
    ends = visual & ~visual.roll(-1, dims=1)
    first = (torch.arange(3), inputs["attention_mask"].argmax(1))
    labels = (
        inputs["input_ids"]
        .masked_fill(visual | (inputs["attention_mask"] == 0), -100)
        .index_put(first, torch.tensor(-100))
    )
    assert not (stands_of(model, llava, inputs)[ends] >= 0).all()
    loss = model(**inputs, labels=labels).loss
    stands = decoder_of(model, llava).stands_for
    assert (stands[ends] >= 0).all()
    assert (stands >= 0)[visual].sum() == 4
    reference = masked(copy.deepcopy(llava.model), llava.parts, stands)
    torch.testing.assert_close(loss, reference(**inputs, labels=labels).loss, atol=1e-5, rtol=1e-5)
    assert not (stands_of(model, llava, inputs)[ends] >= 0).all()


@torch.no_grad()
def test_frames_lose_places_that_stay_as_they_were(llava):
    one = llava.inputs(0)
    picture, other = one["pixel_values"], llava.inputs(1)["pixel_values"]
    image = one["input_ids"][one["input_ids"] == llava.model.config.image_token_id]
    ids = torch.cat([torch.tensor([1]), *[torch.cat([image, torch.tensor([5])]) for _ in range(4)]])[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([picture, picture, other, other]),
    }
    stands = stands_of(select(llava, keep=100, by="attention", merge_frames=0.9999), llava, inputs)
    kept = (stands[0] >= 0)[ids[0] == image[0]].view(4, 9)
    assert kept.all(dim=1).tolist() == [True, False, True, False]
    assert kept.any(dim=1).tolist() == [True, False, True, False]
    half = stands_of(select(llava, keep=6, by="random", merge_frames=0.9999), llava, inputs)
    kept = (half[0] >= 0)[ids[0] == image[0]].view(4, 9)
    assert kept.sum() == 6
    assert not kept[[1, 3]].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "fastest"}, "by 'fastest'; expected one of attention, sinks, gaze, grid, random"),
        ({"by": "sinks"}, "'sinks' without sinks"),
        ({"by": "grid", "keep": 1.5}, "expected a share above 0 and below 1"),
        ({"by": "grid", "more": 1}, "expected an object with keep and by"),
        ({"by": "gaze", "gaze": {"weights": "x", "bias": 1}}, "gaze.weights 'x'; expected a list of numbers"),
        ({"by": "gaze", "gaze": {"weights": [1.0], "bias": 1}}, "1 gaze.weights; expected 32, the width"),
        ({"by": "gaze"}, "the regression's weights and bias, or scores that are given"),
        ({"by": "sinks", "sinks": [0.0] * 8}, "8 sinks; expected one for each of the .9. visual tokens of a picture"),
        ({"by": "grid", "merge_frames": "alike"}, "merge_frames 'alike'; expected a number"),
        ({"by": "grid", "keep": 10**400}, "expected a share above 0 and below 1"),
        ({"by": "sinks", "sinks": [float("inf")] * 9}, "expected a list of numbers"),
        ({"by": "gaze", "gaze": {"weights": [1e300] * 32, "bias": 0.0}}, "expected a list of numbers"),
        ({"by": "random", "seed": 2**64}, "expected a whole number of 64 bits"),
        ({"by": "grid", "seed": 0.5}, "seed '0.5'; expected a whole number"),
    ],
)
def test_what_cannot_be_done_is_refused(llava, settings, message):
    with pytest.raises(ModelError, match=message), torch.no_grad():
        select(llava, **settings)(**llava.inputs(0))


@torch.no_grad()
def test_passes_that_hide_where_pictures_are_are_refused(llava):
    model, inputs = select(llava, by="grid"), llava.inputs(0)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ModelError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
    with pytest.raises(ModelError, match="has a fixed length"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    assert torch.equal(model(**llava.inputs(2)).logits, llava.model(**llava.inputs(2)).logits)
    change_model(model, llava.parts, visual_tokens=None)
    assert torch.equal(model(**inputs).logits, llava.model(**inputs).logits)


def cut_by_hand(model, parts, stands):
    """One prompt without padding, cut to what is fed, physically; steps go on from its cache."""

    def wrapper(run, decoder, **arguments):
        length = arguments["inputs_embeds"].shape[1]
        arguments["attention_mask"] = None
        if length == 1:
            return run(**arguments)
        kept = stands[0] == torch.arange(length)
        arguments["inputs_embeds"] = arguments["inputs_embeds"][:, kept]
        arguments["position_ids"] = torch.arange(length)[None, kept]
        decoder.visual_mask = decoder.visual_mask[:, kept]
        found = run(**arguments)
        found.last_hidden_state = torch.zeros(1, length, found.last_hidden_state.shape[2]).masked_scatter(
            kept[None, :, None], found.last_hidden_state
        )
        return found

    surround(model, parts, wrapper)
    return model


@torch.no_grad()
@pytest.mark.parametrize("by", ["fixed", "shift"])
def test_decoding_with_fewer_tokens_goes_on_from_those_that_were_fed(llava, by):
    decoding = {"keep": 2, "by": by, "shift_threshold": 1.0}
    model, inputs = select(llava, by="random"), llava.inputs(0)
    how = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    stands = stands_of(model, llava, inputs)
    fed = model.generate(**inputs, **how)
    change_model(model, llava.parts, decoding_tokens={**decoding, "keep": 1000})
    assert all(torch.equal(*pair) for pair in zip(model.generate(**inputs, **how).logits, fed.logits, strict=True))
    reference = copy.deepcopy(llava.model)
    for one in (model, reference):
        change_model(one, llava.parts, decoding_tokens=decoding)
    reference = cut_by_hand(reference, llava.parts, stands)
    ours, slow = model.generate(**inputs, **how), reference.generate(**inputs, **how)
    assert torch.equal(ours.sequences, slow.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(slow.logits), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(torch.stack(ours.logits)[1:], torch.stack(fed.logits)[1:], atol=1e-3)
    assert (len(decoding_counts(model).events), by == "fixed") == (5, not any(map(bool, decoding_counts(model).events)))
