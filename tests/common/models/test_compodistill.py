"""CompoDistill's class: what it shares with MobileVLM holds behind SigLIP and in a Qwen2 as well."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2Config, SiglipVisionConfig

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models import published  # noqa: F401 - tells the library of our classes
from vlm_distill_cache.common.models.compodistill import CompoDistillConfig, CompoDistillForConditionalGeneration
from vlm_distill_cache.data.images.encoder import ImageEncoder

IMAGE, VISUAL = 40, 35
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}


def make_model(attention="sdpa", **changes):
    torch.manual_seed(0)
    text = Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    config = CompoDistillConfig(
        text_config=text, vision_config=SiglipVisionConfig(**VISION), image_token_id=IMAGE, **changes
    )
    config._attn_implementation = attention
    return CompoDistillForConditionalGeneration(config).eval()


def make_prompt(words, visual=VISUAL):
    return torch.tensor([[1] + [IMAGE] * visual + words])


@pytest.mark.parametrize(("layer", "index"), [(-2, 2), (-1, 3), (0, 0)])
@pytest.mark.parametrize("select", ["patch", "full"])
def test_the_tower_gives_the_librarys_hidden_state_with_or_without_its_first_patch(layer, index, select):
    model = make_model(vision_feature_layer=layer, vision_feature_select_strategy=select)
    pixels = torch.randn(2, 3, 24, 24)
    hidden = model.vision_encoder(pixels, output_hidden_states=True).hidden_states[index]
    dropped = 1 if select == "patch" else 0
    assert torch.equal(model.model.vision_tower(pixels), hidden[:, dropped:])
    assert (model.image_grid, model.dropped_tokens) == ((6, 6), dropped)


def test_the_published_tower_gives_728_tokens_which_are_the_boxes_of_the_image_encoder():
    from transformers import SiglipImageProcessorPil

    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=384,
        patch_size=14,
    )
    config = CompoDistillConfig(text_config={"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1},
                                vision_config=vision)  # fmt: skip
    with torch.device("meta"):
        model = CompoDistillForConditionalGeneration(config)
        visual = model.model.mm_projector(model.model.vision_tower(torch.empty(1, 3, 384, 384)))
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    encoder = ImageEncoder(
        processor=processor,
        layout="square",
        grid=model.image_grid,
        patch_size=14,
        drops_first=bool(model.dropped_tokens),
    )
    assert visual.shape[1] == encoder.token_count == 728


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_conversations_packed_with_a_4d_mask_equal_each_alone(attention):
    model = make_model(attention)
    pixels = torch.randn(1, 3, 24, 24)
    turns = [[5, 6, 7], [8, 9]]
    start = VISUAL + 1
    alone = [model(input_ids=make_prompt(turn), pixel_values=pixels).logits[0, start:] for turn in turns]
    segments = torch.tensor([0] * start + [1] * 3 + [2] * 2)
    causal = torch.ones(start + 5, start + 5, dtype=torch.bool).tril()
    mask = (causal & ((segments[:, None] == segments) | (segments == 0)))[None, None]
    inputs = {
        "input_ids": make_prompt([5, 6, 7, 8, 9]),
        "pixel_values": pixels,
        "position_ids": torch.tensor([[*range(start + 3), start, start + 1]]),
    }
    packed = model(attention_mask=mask, **inputs).logits[0, start:]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_supervised_rows_equal_the_same_rows_of_all_logits_in_value_and_gradient():
    pixels, ids = torch.randn(1, 3, 24, 24), make_prompt([5, 6, 7])
    supervised = torch.zeros(ids.shape, dtype=torch.bool)
    supervised[0, [4, VISUAL + 2]] = True
    results = []
    for rows in (None, supervised):
        model = make_model()
        model.trainable_parameters("dft")
        logits = model(input_ids=ids, pixel_values=pixels, supervised=rows).logits
        kept = logits if rows is not None else logits[supervised]
        kept.square().sum().backward()
        results.append((kept.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-4, rtol=1e-3)


def test_cached_left_padded_generation_equals_recomputing_every_step():
    model = make_model()
    pixels = torch.randn(2, 3, 24, 24)
    prompts = [[5, 6, 7], [8]]
    expected = []
    for prompt, image in zip(prompts, pixels, strict=True):
        words = list(prompt)
        for _ in range(4):
            logits = model(input_ids=make_prompt(words), pixel_values=image[None]).logits
            words.append(int(logits[0, -1].argmax()))
        expected.append(words[len(prompt) :])
    rows = [[0] * (3 - len(prompt)) + make_prompt(prompt)[0].tolist() for prompt in prompts]
    mask = torch.tensor([[0] * (3 - len(p)) + [1] * (VISUAL + 1 + len(p)) for p in prompts])
    generated = model.generate(
        input_ids=torch.tensor(rows), attention_mask=mask, pixel_values=pixels, max_new_tokens=4, min_new_tokens=4,
        do_sample=False, eos_token_id=39,
    )[:, VISUAL + 4 :]  # fmt: skip
    assert generated.tolist() == expected


@pytest.mark.parametrize("projector_type", ["mlp", "taf"])
@pytest.mark.parametrize("phase", ["dpt", "dft"])
def test_each_phase_trains_exactly_its_parts(phase, projector_type):
    teacher = {"act": "gelu", "in": 16, "hidden": 8, "out": 8}
    model = make_model(projector_type=projector_type, teacher_projector=teacher)
    trained = {id(parameter) for parameter in model.trainable_parameters(phase)}
    for name, parameter in model.named_parameters():
        projector_side = ".mm_projector." in name and ".teacher." not in name
        language_model = not any(part in name for part in (".mm_projector.", ".vision_tower."))
        assert (id(parameter) in trained) == (projector_side or (language_model and phase != "dpt")), name


def test_a_saved_model_loads_through_the_auto_class_with_identical_logits(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = {"input_ids": make_prompt([5, 6, 7]), "pixel_values": torch.randn(1, 3, 24, 24)}
    assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


def test_switching_the_language_models_attention_leaves_the_vision_tower_alone():
    model = make_model()
    model.language_model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert model.vision_encoder.encoder.layers[0].self_attn.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_type": "ldpnetv2"}, "pools a whole grid of patches"),
        ({"projector_type": "ldpnet"}, "pools a whole grid of patches"),
        (
            {"vision_feature_select_strategy": "default"},
            "got 'default' for a siglip_vision_model; expected 'patch' or 'full'",
        ),
        ({"vision_feature_layer": 5}, "got 5, the tower has 3 layers"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        make_model(**changes)
