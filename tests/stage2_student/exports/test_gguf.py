"""GGUF files hold the student: every weight where llama.cpp looks for it, and a tokenizer that cuts texts as ours does."""

import json
import random
from itertools import chain, pairwise

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.compodistill import CompoDistillConfig, CompoDistillForConditionalGeneration
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.stage2_student.exports.gguf import TYPES, write_gguf

TEXT_LINE = "the quick brown fox jumps over 1234 lazy dogs. What is in the picture? two red circles, 567 blue ones"
WORDS = TEXT_LINE.split()
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama's: blanks are a letter, and bytes stand for unknown ones."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(WORDS * 3, trainers.BpeTrainer(vocab_size=390, special_tokens=special))
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    fast = Tokenizer.from_str(json.dumps(described))
    fast.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(*steps) -> PreTrainedTokenizerFast:
    """As GPT-2's and those after it; ``steps`` cut a text into words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        WORDS * 3, trainers.BpeTrainer(vocab_size=390, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


QWEN2_CUT = (
    pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
)


def own(model_class, config_class, text, vision, **options):
    torch.manual_seed(0)
    config = config_class(text_config=text, vision_config=vision, image_token_id=text.vocab_size, **options)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def clip(**options):
    return CLIPVisionConfig(**{**TOWER, "image_size": 336, "patch_size": 14, **options})


def mobilevlm(projector, **options):
    text = LlamaConfig(**TEXT, num_key_value_heads=2)
    return own(MobileVLMForConditionalGeneration, MobileVLMConfig, text, clip(**options), projector_type=projector)


def compodistill(select="full", **options):
    vision = SiglipVisionConfig(**TOWER, image_size=28, patch_size=14, hidden_act="gelu_pytorch_tanh")
    text = Qwen2Config(**TEXT, num_key_value_heads=4)
    teacher = {"act": "gelu", "in": 32, "hidden": 48, "out": 48}
    return own(
        CompoDistillForConditionalGeneration, CompoDistillConfig, text, vision, projector_type="taf",
        teacher_projector=teacher, vision_feature_select_strategy=select, **options,
    )  # fmt: skip


def llava(**options):
    text = LlamaConfig(**TEXT, num_key_value_heads=4)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=clip(image_size=28), text_config=text, image_token_index=3, **options)
    return LlavaForConditionalGeneration(config)


def write(folder, model, tokenizer, dtype="float32"):
    folder.mkdir(exist_ok=True)
    files = write_gguf(
        folder, model=model, tokenizer=tokenizer, image_processor=CLIPImageProcessorPil(), template="", dtype=dtype
    )
    return [gguf.GGUFReader(file) for file in files]


def tensors(reader):
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def settings(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


def rotate_back(rows, heads):
    """Rows that lie in rotated pairs, half a head apart as the model library has them: one row after the other."""
    width = len(rows) // heads
    return np.stack([rows[head * width + (2 * i if i < width // 2 else 2 * (i - width // 2) + 1)]
                     for head in range(heads) for i in range(width)])  # fmt: skip


@pytest.mark.parametrize("case", ["ldpnet", "ldpnetv2", "mlp", "taf", "llava"])
def test_every_weight_is_where_llama_cpp_looks_for_it(tmp_path, case):
    model = {"taf": compodistill, "llava": llava}.get(case, lambda: mobilevlm(case))()
    language, vision = map(tensors, write(tmp_path / case, model, sentencepiece_like()))
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    inner = "model.language_model." if case == "llava" else "model."
    heads = {"q": 4, "k": model.config.text_config.num_key_value_heads}
    pairs = {
        "self_attn.{}_proj": "attn_{}", "self_attn.o_proj": "attn_output", "mlp.{}_proj": "ffn_{}",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    expected = {
        "token_embd.weight": state[f"{inner}embed_tokens.weight"],
        "output_norm.weight": state[f"{inner}norm.weight"],
    }
    expected["output.weight"] = state["lm_head.weight"]
    found = dict(language)
    for layer in range(2):
        for theirs, ours in pairs.items():
            for part in {"self_attn.{}_proj": "qkv", "mlp.{}_proj": ("gate", "up", "down")}.get(theirs, ("",)):
                for kind in ("weight", "bias"):
                    if (value := state.get(f"{inner}layers.{layer}.{theirs.format(part)}.{kind}")) is None:
                        continue
                    name = f"blk.{layer}.{ours.format(part)}.{kind}"
                    expected[name] = value
                    if part in heads and theirs.startswith("self_attn") and case != "taf":
                        found[name] = rotate_back(language[name], heads[part])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)

    tower = "model.vision_tower." + ("" if case == "llava" else "vision_tower.vision_model.")
    places = {
        "ffn_up.weight": "mlp.fc1.weight",
        "attn_out.bias": "self_attn.out_proj.bias",
        "ln2.bias": "layer_norm2.bias",
    }
    for name, value in places.items():
        key = next(key for key in state if key.startswith(tower) and key.endswith(f"encoder.layers.1.{value}"))
        np.testing.assert_array_equal(vision[f"v.blk.1.{name}"], state[key])
    assert not any(name.startswith(("v.blk.2", "v.post_ln")) for name in vision)  # the hidden state -2 needs neither
    features = torch.randn(1, 4 if case in ("taf", "llava") else 576, 32)
    projector = model.model.multi_modal_projector if case == "llava" else model.model.mm_projector
    with torch.no_grad():
        said = projector(features)[0].numpy()
        np.testing.assert_allclose(_project(vision, features[0]), said, rtol=2e-3, atol=2e-3 * abs(said).max())


def _project(named, features):
    """llama.cpp's graph of each projector (tools/mtmd/models/llava.cpp) on features ``[N, D_v]``."""
    w = {name.removeprefix("mm.").removeprefix("model."): torch.tensor(value) for name, value in named.items()}
    gelu, conv = torch.nn.functional.gelu, torch.nn.functional.conv2d

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(plane, name):
        last = torch.nn.functional.layer_norm(
            plane.permute(1, 2, 0), (plane.shape[0],), w[f"{name}.weight"], w[f"{name}.bias"]
        )
        return last.permute(2, 0, 1)

    if "0.weight" in w:
        return linear(gelu(linear(features, "0")), "2").numpy()
    if "peg.0.weight" in w:
        plane = linear(gelu(linear(features, "mlp.0")), "mlp.2").T.reshape(-1, 24, 24)
        pooled = torch.nn.functional.avg_pool2d(plane, 2)
        mixed = conv(pooled[None], w["peg.0.weight"][:, None], w["peg.0.bias"], padding=1, groups=len(pooled))[0]
        return (pooled + mixed).flatten(1).T.numpy()
    plane = linear(gelu(linear(features, "mlp.1")), "mlp.3").T.reshape(-1, 24, 24)
    for block, stride in ((1, 1), (2, 2)):
        at = f"mb_block.{block}.block"
        mixed = conv(plane[None], w[f"{at}.0.0.weight"][:, None], stride=stride, padding=1, groups=len(plane))[0]
        mixed = torch.nn.functional.hardswish(norm(mixed, f"{at}.0.1"))
        scale = linear(torch.relu(linear(mixed.mean((1, 2)), f"{at}.1.fc1")), f"{at}.1.fc2")
        mixed = mixed * torch.nn.functional.hardsigmoid(scale)[:, None, None]
        mixed = norm(torch.einsum("oc,chw->ohw", w[f"{at}.2.0.weight"], mixed), f"{at}.2.1")
        plane = plane + mixed if stride == 1 else mixed
    return plane.flatten(1).T.numpy()


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_each_precision_reads_back_within_its_step(tmp_path, dtype):
    model = mobilevlm("ldpnetv2")
    found = tensors(write(tmp_path / dtype, model, sentencepiece_like(), dtype)[0])["output.weight"]
    value = model.lm_head.weight.detach().numpy()
    step = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "8bit": 1 / 127, "4bit": 1 / 7}[dtype]
    np.testing.assert_allclose(found, value, rtol=0, atol=step * abs(value).max())
    assert dtype == "float32" or (found != value).any()


def test_a_sentencepiece_tokenizer_cuts_as_its_scores_say(tmp_path):
    """llama.cpp joins the neighbours whose union has the highest score, the first of equals, until none are left."""
    tokenizer = sentencepiece_like()
    told = settings(write(tmp_path / "x", mobilevlm("mlp"), tokenizer)[0])
    tokens, scores = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.scores"]
    types = told["tokenizer.ggml.token_type"]
    score = {token: scores[i] for i, token in enumerate(tokens) if types[i] == gguf.TokenType.NORMAL}
    index = {token: i for i, token in enumerate(tokens)}
    draw = random.Random(0)
    for _ in range(200):
        # Words that were never seen: which neighbours are joined first decides what is left over.
        unseen = ["".join(draw.choices("".join(WORDS), k=9)) for _ in range(4)]
        text = " ".join(draw.choices([*WORDS, *unseen, "wholly", "éa", "x  y"], k=draw.randrange(1, 6)))
        pieces = list("▁" + text.replace(" ", "▁"))
        while True:
            joined = [(score.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(pairwise(pieces))]
            best, place = max(joined, default=(-np.inf, 0))
            if best == -np.inf:
                break
            pieces[-place : 2 - place] = ["".join(pieces[-place : 2 - place])]
        by_bytes = [[index[p]] if p in score else [index[f"<0x{b:02X}>"] for b in p.encode()] for p in pieces]
        assert list(chain(*by_bytes)) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    assert len(tokens) == 400
    assert told["tokenizer.ggml.model"] == "llama"
    assert told["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((pre_tokenizers.ByteLevel(add_prefix_space=False),), "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)), "smollm"),
        (QWEN2_CUT, "qwen2"),
    ],
)
def test_a_byte_level_tokenizer_is_named_by_how_it_cuts(tmp_path, steps, name):
    tokenizer = byte_level(*steps)
    told = settings(write(tmp_path / name, mobilevlm("mlp"), tokenizer)[0])
    assert (told["tokenizer.ggml.model"], told["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert told["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(told["tokenizer.ggml.merges"]) > 10


@pytest.mark.parametrize(
    ("make", "tokenizer", "named"),
    [
        (lambda: mobilevlm("ldpnetv2", image_size=56), sentencepiece_like, "4 x 4 patches"),
        (lambda: compodistill("patch"), sentencepiece_like, "drops no first patch"),
        (lambda: compodistill(pool_teacher_tokens=True), sentencepiece_like, "pools a teacher's tokens"),
        (lambda: llava(vision_feature_layer=[-2, -1]), sentencepiece_like, "one layer"),
        (lambda: mobilevlm("mlp", hidden_act="relu"), sentencepiece_like, "hidden_act of the vision tower is 'relu'"),
        (lambda: mobilevlm("mlp"), lambda: byte_level(pre_tokenizers.Whitespace()), "cuts words by"),
        (
            lambda: mobilevlm("mlp"),
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
            "WordLevel",
        ),
        (lambda: torch.nn.Linear(1, 1), sentencepiece_like, "--layout auto"),
    ],
)
def test_what_llama_cpp_has_no_code_for_is_refused(tmp_path, make, tokenizer, named):
    with pytest.raises(ModelError, match=named):
        write(tmp_path / "x", make(), tokenizer())
