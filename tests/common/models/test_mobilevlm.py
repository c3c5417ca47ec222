"""MobileVLM: published names, one visual path, dropped rows, cached generation, what each phase trains."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models import published  # noqa: F401 - tells the library of our classes
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.common.models.vision_language import PAST

IMAGE = 40  # outside the vocabulary, as for the published models
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}


def make_student(attention="sdpa", **changes):
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    config = MobileVLMConfig(
        text_config=text, vision_config=CLIPVisionConfig(**VISION), image_token_id=IMAGE, **changes
    )
    config._attn_implementation = attention
    return MobileVLMForConditionalGeneration(config).eval()


def make_prompt(words, visual=9):
    return torch.tensor([[1] + [IMAGE] * visual + words])


def test_state_dict_keys_are_the_published_ones(tmp_path):
    make_student().save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    tower = "model.vision_tower.vision_tower.vision_model."
    assert {key for key in keys if not key.startswith(("model.layers.", tower))} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.mm_projector.mlp.mlp.0.weight",
        "model.mm_projector.mlp.mlp.0.bias",
        "model.mm_projector.mlp.mlp.2.weight",
        "model.mm_projector.mlp.mlp.2.bias",
        "model.mm_projector.peg.peg.0.weight",
        "model.mm_projector.peg.peg.0.bias",
    }
    assert tower + "embeddings.class_embedding" in keys
    assert tower + "encoder.layers.2.self_attn.q_proj.weight" in keys


def test_saved_and_loaded_student_gives_identical_logits_through_the_auto_class(tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mobilevlm_distill"
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = {"input_ids": make_prompt([5, 6, 7]), "pixel_values": torch.randn(1, 3, 24, 24)}
    assert torch.equal(student(**inputs).logits, loaded(**inputs).logits)


def test_vision_tower_equals_the_librarys_hidden_state_without_the_class_token():
    student = make_student()
    tower = student.model.vision_tower
    pixels = torch.randn(2, 3, 24, 24)
    hidden = tower.vision_tower.vision_model(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(tower(pixels), hidden[-2][:, 1:])
    assert tower.grid == (6, 6)


@pytest.mark.parametrize(("layer", "index"), [(-1, 3), (0, 0), (2, 2)])
def test_vision_feature_layer_counts_hidden_states_as_the_library_does(layer, index):
    student = make_student(vision_feature_layer=layer)
    pixels = torch.randn(1, 3, 24, 24)
    tower = student.model.vision_tower
    hidden = tower.vision_tower.vision_model(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(tower(pixels), hidden[index][:, 1:])


def test_vision_feature_layer_outside_the_tower_is_refused():
    with pytest.raises(ModelError, match="got -5, the tower has 3 layers"):
        make_student(vision_feature_layer=-5)


def test_projected_images_stand_where_the_image_tokens_are_in_batch_order():
    student = make_student()
    pixels = torch.randn(2, 3, 24, 24)
    input_ids = torch.tensor(
        [
            [1, 5, 6] + [IMAGE] * 9 + [7],
            [1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
            [1] + [IMAGE] * 9 + [5, 6, 7],
        ]
    )
    embeds = student.model.embed_multimodal(input_ids, pixels)
    visual = student.model.mm_projector(student.model.vision_tower(pixels))
    assert torch.equal(embeds[0, 3:12], visual[0])
    assert torch.equal(embeds[2, 1:10], visual[1])
    assert torch.equal(embeds[1], student.model.embed_tokens(input_ids[1]))
    assert torch.equal(embeds[0, :3], student.model.embed_tokens(input_ids[0, :3]))


@torch.no_grad()
@pytest.mark.parametrize("image", [IMAGE, 3])
def test_embeddings_of_a_text_get_its_pictures_as_its_ids_do_or_are_refused(image):
    student = make_student()
    student.config.image_token_id = student.model.image_token_id = image
    pixels, tokens = torch.randn(2, 3, 24, 24), [image] * 9
    # In front, what a tokenizer without a padding token of its own pads with: row 0, as an image token beyond the rows has.
    ids = torch.tensor([[0, 0, 1, 5, *tokens, 7], [1, 6, *tokens, 7, 8, 9]])
    inputs = {"attention_mask": (ids != 0).long(), "pixel_values": pixels}
    embeds = student.get_input_embeddings()(ids)
    there = inputs["attention_mask"].bool()
    found, expected = student(inputs_embeds=embeds, **inputs).logits, student(input_ids=ids, **inputs).logits
    assert torch.equal(found[there], expected[there])
    other = student(inputs_embeds=embeds, **inputs | {"pixel_values": pixels.flip(0)}).logits
    assert not torch.allclose(found[there], other[there])
    causal = torch.ones(14, 14).tril().bool() & there[:, None, None]
    for mask in (causal, torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)):
        masked = inputs | {"attention_mask": mask}
        found = student(inputs_embeds=embeds, **masked).logits
        torch.testing.assert_close(found[there], student(input_ids=ids, **masked).logits[there])
    if image == IMAGE:
        with pytest.raises(ModelError, match="an attention_mask"):
            student(inputs_embeds=embeds, pixel_values=pixels)
    with pytest.raises(ModelError, match="give pixel_values with the first step only"):
        student(input_ids=ids[:, -1:], pixel_values=pixels)
    with pytest.raises(
        ModelError, match=r"holds 0 image tokens, expected 2 images x 9 .*; give input_ids: .* which an attention_mask"
    ):
        student(inputs_embeds=embeds + 1e-3, **inputs)
    embeds[1, -1] = student.get_input_embeddings()(torch.tensor(image))
    with pytest.raises(ModelError, match="holds 19 image tokens"):
        student(inputs_embeds=embeds, **inputs)
    with pytest.raises(ModelError, match="give one of them"):
        student(input_ids=ids, inputs_embeds=embeds, **inputs)


@torch.no_grad()
def test_a_tuple_is_what_the_named_output_holds():
    student, ids = make_student(), make_prompt([5, 6])
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 24, 24), "labels": ids}
    expected = student(**given, use_cache=False)
    asked = [student(**given, use_cache=False, return_dict=False)]
    student.config.return_dict = student.config.text_config.return_dict = False
    for found in [*asked, student(**given, use_cache=False)]:
        assert isinstance(found, tuple)
        assert len(found) == 2
        assert torch.equal(found[0], expected.loss)
        assert torch.equal(found[1], expected.logits)
    assert torch.equal(student(**given, return_dict=True).logits, expected.logits)


@pytest.mark.parametrize(
    ("visual", "pixels", "message"),
    [
        (8, torch.zeros(1, 3, 24, 24), r"8 image tokens, expected 1 images x 9"),
        (9, None, "pixel_values is None"),
    ],
)
def test_image_tokens_that_do_not_match_the_images_are_refused(visual, pixels, message):
    with pytest.raises(ModelError, match=message):
        make_student()(input_ids=make_prompt([5], visual), pixel_values=pixels)


def test_supervised_rows_equal_the_same_rows_of_all_logits():
    student = make_student()
    input_ids = make_prompt([5, 6, 7]).repeat(2, 1)
    pixels = torch.randn(2, 3, 24, 24)
    supervised = torch.zeros(2, 13, dtype=torch.bool)
    supervised[0, [4, 12]] = True
    supervised[1, 11] = True
    everything = student(input_ids=input_ids, pixel_values=pixels).logits
    some = student(input_ids=input_ids, pixel_values=pixels, supervised=supervised).logits
    torch.testing.assert_close(some, everything[supervised])
    assert student(input_ids=input_ids, pixel_values=pixels, supervised=supervised & False).logits.shape == (
        0,
        40,
    )


def test_switching_the_language_models_attention_leaves_the_vision_tower_alone():
    student = make_student()
    student.language_model.set_attn_implementation("eager")
    assert student.model.layers[0].self_attn.config._attn_implementation == "eager"
    tower = student.model.vision_tower.vision_tower.vision_model
    assert tower.encoder.layers[0].self_attn.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_conversations_packed_with_a_4d_mask_equal_each_alone(attention):
    student = make_student(attention)
    pixels = torch.randn(1, 3, 24, 24)
    turns = [[5, 6, 7], [8, 9]]
    alone = [student(input_ids=make_prompt(turn), pixel_values=pixels).logits[0, 10:] for turn in turns]
    segments = torch.tensor([0] * 10 + [1] * 3 + [2] * 2)
    causal = torch.ones(15, 15, dtype=torch.bool).tril()
    mask = causal & ((segments[:, None] == segments) | (segments == 0))
    positions = torch.tensor([[*range(13), 10, 11]])
    packed = student(
        input_ids=make_prompt([5, 6, 7, 8, 9]),
        pixel_values=pixels,
        attention_mask=mask[None, None],
        position_ids=positions,
    ).logits[0, 10:]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_cached_left_padded_generation_equals_recomputing_every_step_without_padding():
    student = make_student()
    pixels = torch.randn(2, 3, 24, 24)
    prompts = [[5, 6, 7], [8]]
    expected = []
    for prompt, image in zip(prompts, pixels, strict=True):
        words = list(prompt)
        for _ in range(5):
            words.append(int(student(input_ids=make_prompt(words), pixel_values=image[None]).logits[0, -1].argmax()))
        expected.append(words[len(prompt) :])
    rows = [[0] * (3 - len(prompt)) + make_prompt(prompt)[0].tolist() for prompt in prompts]
    mask = torch.tensor([[0] * (3 - len(p)) + [1] * (10 + len(p)) for p in prompts])
    generated = student.generate(
        input_ids=torch.tensor(rows),
        attention_mask=mask,
        pixel_values=pixels,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        eos_token_id=39,
        suppress_tokens=None,
    )[:, 13:]
    assert generated.tolist() == expected


@pytest.mark.parametrize("projector_type", ["ldpnet", "ldpnetv2", "mlp", "taf"])
@pytest.mark.parametrize("phase", ["dpt", "dft", "sft"])
def test_each_phase_trains_exactly_its_parts(phase, projector_type):
    teacher = {"act": "gelu", "in": 16, "hidden": 8, "out": 8}
    student = make_student(projector_type=projector_type, teacher_projector=teacher)
    trained = {id(parameter) for parameter in student.trainable_parameters(phase)}
    for name, parameter in student.named_parameters():
        projector_side = ".mm_projector." in name and ".teacher." not in name
        language_model = not any(part in name for part in (".mm_projector.", ".vision_tower."))
        expected = projector_side or (language_model and phase != "dpt")
        assert (id(parameter) in trained) == parameter.requires_grad == expected, name


def test_going_back_from_dpt_to_dft_thaws_the_language_model():
    student = make_student()
    count = len(student.trainable_parameters("dft"))
    assert len(student.trainable_parameters("dpt")) == 6
    assert len(student.trainable_parameters("dft")) == count


def test_unknown_phase_names_the_choices():
    with pytest.raises(ModelError, match="choose one of dpt, dft, sft"):
        make_student().trainable_parameters("pretrain")


def test_dpt_reaches_the_projector_through_the_frozen_language_model():
    student = make_student()
    parameters = student.trainable_parameters("dpt")
    student(input_ids=make_prompt([5, 6]), pixel_values=torch.randn(1, 3, 24, 24)).logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)
    assert student.model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight.grad is None


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        student = make_student().train()
        if checkpointing:
            # Renamed after transformers 5.17, where the new name is missing; later the old one warns.
            getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
        student.trainable_parameters("dft")
        torch.manual_seed(1)
        pixels = torch.randn(1, 3, 24, 24)
        student(input_ids=make_prompt([5, 6]), pixel_values=pixels, use_cache=False).logits.sum().backward()
        gradients.append({name: value.grad for name, value in student.named_parameters() if value.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_an_image_token_that_the_model_itself_generates_is_a_token_like_others():
    student = make_student()
    pixels = torch.randn(1, 3, 24, 24)
    first = student(input_ids=make_prompt([5]), pixel_values=pixels, use_cache=True)
    after = student(input_ids=torch.tensor([[IMAGE]]), **{PAST: first[PAST]}, use_cache=True)
    assert after.logits.shape == (1, 1, 40)
