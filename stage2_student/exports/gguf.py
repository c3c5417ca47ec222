"""Students as llama.cpp reads them: a GGUF file of the language model and one of vision tower and projector (``mmproj``).

llama.cpp's own converter reads the library's families from the folder that training saves; it knows neither MobileVLM nor
LLaVA-1.5 any more, while its programs still run both, so those are written here.

Source:
    Key and tensor names: the ``gguf`` package; ``tools/mtmd/clip.cpp`` and ``tools/mtmd/models/llava.cpp`` of llama.cpp.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.models.projectors import LDPProjector, LDPv2Projector, MlpProjector, TeacherAdapter
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.stage2_student.students.library import LibraryStudent

MODEL, PROJECTOR = "model-{}.gguf", "mmproj-{}.gguf"
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "8bit": "Q8_0", "4bit": "Q4_0"}
_GRID = 24  # llama.cpp's code of both LDP projectors has this side in it
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2"}
_ACTIVATIONS = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# How byte-level tokenizers cut text before they merge, and llama.cpp's name of it.
_CUTS: dict[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_QWEN2, "bytes"): "qwen2",
    (_LLAMA3, "bytes"): "llama-bpe",
}


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A student in llama.cpp's two files.

    Attributes:
        decoder: The language model's weights by the library's names (``embed_tokens``, ``layers``, ``norm``), and
            ``lm_head`` where it is not tied.
        tower: The tower's weights by the library's names, without what stands above the last layer that runs.
        projector: The projector's weights by llama.cpp's names.
        kind: Its name of the projector.
        layers: Layers of the tower that run.
    """

    text: Any
    vision: Any
    decoder: Mapping[str, Tensor]
    tower: Mapping[str, Tensor]
    projector: Mapping[str, Tensor]
    kind: str
    layers: int


def write_gguf(
    folder: Path, *, model: Any, tokenizer: Any, image_processor: Any, template: str, dtype: str
) -> tuple[Path, Path]:
    """Write both files of a student into a folder.

    Args:
        model: A `StudentModel`.
        tokenizer: The library's.
        template: The student's chat template.
        dtype: One of `TYPES`: of matrices; vectors are float32, and a convolution's weights float16, which llama.cpp needs.

    Returns:
        The language model's file, and the projector's with the tower.

    Raises:
        ConfigError: If the package ``gguf`` is not installed.
        ModelError: If llama.cpp has no code for a part of the student, naming the part.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"layout gguf needs the package gguf ({error}); run: pip install 'vlm-distill-cache[gguf]'"
        ) from error
    pieces = take_apart(model)
    vocabulary = _read_vocabulary(tokenizer, rows=int(pieces.text.vocab_size), gguf=gguf)
    name = TYPES[dtype].lower()
    files = folder / MODEL.format(name), folder / PROJECTOR.format(name)
    _write_model(files[0], pieces, vocabulary, tokenizer, template=template, kind=TYPES[dtype], gguf=gguf)
    _write_projector(files[1], pieces, image_processor, kind=TYPES[dtype], gguf=gguf)
    return files


def take_apart(model: Any) -> Pieces:
    """The parts of a student by llama.cpp's names; a ModelError if it has no code for one of them."""
    model = model.model if isinstance(model, LibraryStudent) else model
    if isinstance(model, VisionLanguageModel):
        tower = model.vision_encoder
        of_decoder = ("embed_tokens", "layers", "norm")
        state = model.model.state_dict()
        decoder = {name: value for name, value in state.items() if name.partition(".")[0] in of_decoder}
        if model.dropped_tokens:
            raise ModelError("layout gguf: llama.cpp drops no first patch of a SigLIP tower, which this student does")
        kind, projector = _own_projector(model.model.mm_projector, model.image_grid)
        layers = int(model.model.vision_tower.layers_used)
    elif type(model) is LlavaForConditionalGeneration:
        tower, inner = model.model.vision_tower, model.model.multi_modal_projector
        decoder = model.model.language_model.state_dict()
        layer, full = model.config.vision_feature_layer, model.config.vision_feature_select_strategy == "full"
        if not isinstance(layer, int) or full == (model.config.vision_config.model_type == "clip_vision_model"):
            raise ModelError(
                f"layout gguf: vision_feature_layer {layer!r} with vision_feature_select_strategy "
                f"{model.config.vision_feature_select_strategy!r}; llama.cpp takes one layer, all patches and no class token"
            )
        kind, projector = "mlp", _two_layers(inner.linear_1, inner.linear_2, act=model.config.projector_hidden_act)
        layers = layer % (int(model.config.vision_config.num_hidden_layers) + 1)
    else:
        raise ModelError(
            f"layout gguf is for MobileVLM and LLaVA-1.5 students, this is a {type(model).__name__}; export it with --layout "
            "auto and let llama.cpp's convert_hf_to_gguf.py read that folder, once plainly and once with --mmproj"
        )
    text, vision = model.config.text_config, model.config.vision_config
    if not getattr(text, "tie_word_embeddings", False) and not model.config.tie_word_embeddings:
        decoder = {**decoder, "lm_head.weight": model.lm_head.weight}
    _check_configs(text, vision)
    used = {name: value for name, value in tower.state_dict().items() if _runs(name, layers)}
    return Pieces(text=text, vision=vision, decoder=decoder, tower=used, projector=projector, kind=kind, layers=layers)


def _runs(name: str, layers: int) -> bool:
    """Whether a tower's tensor has a part in what is projected."""
    parts = name.split(".")
    if "layers" in parts:
        return int(parts[parts.index("layers") + 1]) < layers
    return "post_layernorm" not in parts and "head" not in parts and parts[-1] != "position_ids"


def _own_projector(projector: Any, grid: tuple[int, int]) -> tuple[str, dict[str, Tensor]]:
    state = projector.state_dict()
    if isinstance(projector, MlpProjector):
        return "mlp", {f"mm.{name}": value for name, value in state.items()}
    if isinstance(projector, TeacherAdapter) and projector.out_grid == projector.in_grid:
        # Nothing stands between the teacher's second layer and the post-projector: together they are one layer.
        second, post = projector.teacher.linear_2, projector.post
        bias = post.bias if second.bias is None else post.weight @ second.bias + post.bias
        merged = torch.nn.Linear(second.in_features, post.out_features)
        merged.weight.data, merged.bias.data = (post.weight @ second.weight).detach(), bias.detach()
        return "mlp", _two_layers(projector.teacher.linear_1, merged, act=projector.teacher.act)
    if not isinstance(projector, LDPProjector | LDPv2Projector):
        raise ModelError("layout gguf: llama.cpp has no projector that pools a teacher's tokens (pool_teacher_tokens)")
    if projector.in_grid != (_GRID, _GRID):
        raise ModelError(
            f"layout gguf: the vision tower has {projector.in_grid[0]} x {projector.in_grid[1]} patches; llama.cpp's code of "
            f"MobileVLM's projectors works for {_GRID} x {_GRID} alone (336 pixels in patches of 14)"
        )
    if isinstance(projector, LDPProjector):
        return "ldp", {f"mm.{name}": value for name, value in state.items()}
    return "ldpv2", {f"mm.model.{name.partition('.')[2]}": value for name, value in state.items()}


def _two_layers(first: torch.nn.Linear, second: torch.nn.Linear, *, act: Any) -> dict[str, Tensor]:
    if not isinstance(act, str):
        act = "gelu" if isinstance(act, torch.nn.GELU) or "gelu" in type(act).__name__.lower() else type(act).__name__
    if act not in ("gelu", "gelu_pytorch_tanh", "gelu_new"):
        raise ModelError(f"layout gguf: the projector's activation is {act!r}; llama.cpp computes GELU there")
    found = {}
    for place, layer in ((0, first), (2, second)):
        found[f"mm.{place}.weight"] = layer.weight
        found[f"mm.{place}.bias"] = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    return found


def _check_configs(text: Any, vision: Any) -> None:
    rope = getattr(text, "rope_parameters", None) or {}
    wrong = {
        "model_type": text.model_type not in _ARCHITECTURES,
        "hidden_act": text.hidden_act != "silu",
        "rope_parameters": rope.get("rope_type", "default") not in ("default", "linear"),
        "use_sliding_window": bool(getattr(text, "use_sliding_window", False)),
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        told = ", ".join(f"{name} {getattr(text, name)!r}" for name in found)
        raise ModelError(f"layout gguf: language model with {told}; only plain {', '.join(_ARCHITECTURES)} are written")
    if vision.hidden_act not in _ACTIVATIONS:
        raise ModelError(
            f"layout gguf: hidden_act of the vision tower is {vision.hidden_act!r}, expected one of {', '.join(_ACTIVATIONS)}"
        )


def _write_model(
    path: Path, pieces: Pieces, vocabulary: "Vocabulary", tokenizer: Any, *, template: str, kind: str, gguf: Any
) -> None:
    text = pieces.text
    architecture = _ARCHITECTURES[text.model_type]
    writer = gguf.GGUFWriter(path, architecture.lower())
    heads, key_value_heads = int(text.num_attention_heads), int(text.num_key_value_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    rope = getattr(text, "rope_parameters", None) or {}
    writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(kind)))
    writer.add_vocab_size(int(text.vocab_size))
    writer.add_context_length(int(text.max_position_embeddings))
    writer.add_embedding_length(int(text.hidden_size))
    writer.add_block_count(int(text.num_hidden_layers))
    writer.add_feed_forward_length(int(text.intermediate_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_layer_norm_rms_eps(float(text.rms_norm_eps))
    vocabulary.add_to(writer)
    for name in ("bos", "eos", "unk", "pad"):
        if (found := getattr(tokenizer, f"{name}_token_id", None)) is not None and found < text.vocab_size:
            getattr(writer, f"add_{name}_token_id")(found)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id])
    writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), int(text.num_hidden_layers))
    for name, value in pieces.decoder.items():
        known = name if name.startswith("lm_head") else f"model.{name}"
        if architecture == "LLAMA" and ".self_attn." in name and name.rpartition("_proj.")[0][-1:] in ("q", "k"):
            value = _interleaved(value, heads if ".q_proj." in name else key_value_heads)
        _add(writer, _name(names, known), value, kind, gguf=gguf)
    _finish(writer)


def _interleaved(value: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order: rotated pairs side by side, not half a head apart."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _write_projector(path: Path, pieces: Pieces, image_processor: Any, *, kind: str, gguf: Any) -> None:
    vision = pieces.vision
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(kind)))
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(pieces.kind)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_vision_projection_dim(int(pieces.text.hidden_size))
    writer.add_vision_image_size(int(vision.image_size))
    writer.add_vision_patch_size(int(vision.patch_size))
    writer.add_vision_embedding_length(int(vision.hidden_size))
    writer.add_vision_feed_forward_length(int(vision.intermediate_size))
    writer.add_vision_block_count(pieces.layers)
    writer.add_vision_head_count(int(vision.num_attention_heads))
    writer.add_vision_attention_layernorm_eps(float(vision.layer_norm_eps))
    writer.add_array("clip.vision.feature_layer", [pieces.layers])
    writer.add_vision_image_mean([float(value) for value in image_processor.image_mean])
    writer.add_vision_image_std([float(value) for value in image_processor.image_std])
    writer.add_vision_use_gelu(_ACTIVATIONS[vision.hidden_act])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, pieces.layers)
    for name, value in pieces.tower.items():
        inner = name.removeprefix("vision_model.")
        # llama.cpp takes such layers for those of old files, whose names were swapped.
        if vision.intermediate_size == vision.hidden_size and ".mlp.fc" in inner:
            inner = inner.translate(str.maketrans("12", "21"))
        _add(writer, _name(names, f"vision_tower.vision_model.{inner}"), value, kind, gguf=gguf)
    for name, value in pieces.projector.items():
        _add(writer, name, value.squeeze(), kind, gguf=gguf, convolution=value.ndim == 4 and value.shape[-1] > 1)
    _finish(writer)


def _name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"layout gguf: llama.cpp has no name for the tensor {name}")
    return str(found)


def _file_type(kind: str) -> str:
    return "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"


def _add(writer: Any, name: str, value: Tensor, kind: str, *, gguf: Any, convolution: bool = False) -> None:
    """Write a tensor: matrices as ``kind``, where their rows can be cut into its blocks; vectors as float32."""
    array = value.detach().to(torch.float32).cpu().numpy()
    types = gguf.GGMLQuantizationType
    chosen = getattr(types, kind)
    if convolution or array.ndim == 4:
        chosen = types.F16
    elif array.ndim < 2 or name == "v.position_embd.weight":
        chosen = types.F32
    elif array.shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0]:
        chosen = types.F16
    if chosen == types.F16 and abs(array).max(initial=0) > 65504:
        raise ModelError(f"layout gguf: {name} holds values beyond float16's 65504; use --dtype bfloat16 or float32")
    if chosen in (types.F32, types.F16):
        writer.add_tensor(name, array.astype("float32" if chosen == types.F32 else "float16"))
    else:
        writer.add_tensor(name, gguf.quants.quantize(array, chosen), raw_dtype=chosen)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer as GGUF holds it: a token, a type and for sentencepiece a score for each row of the embedding."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    cut: str = "default"
    add_blank: bool | None = None

    def add_to(self, writer: Any) -> None:
        """Write it."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.add_blank is not None:
            writer.add_add_space_prefix(self.add_blank)


def _read_vocabulary(tokenizer: Any, *, rows: int, gguf: Any) -> Vocabulary:
    """A tokenizer of the library's fast kind; a ModelError if it is none that llama.cpp has code for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {} if backend is None else json.loads(backend.to_str())
    model = described.get("model") or {}
    if model.get("type") != "BPE":
        raise ModelError(
            f"layout gguf: the tokenizer is a {model.get('type') or type(tokenizer).__name__}; llama.cpp reads byte pair "
            "encodings (BPE), of sentencepiece or of bytes, and no such tokenizer"
        )
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    by_id = {index: token for token, index in model["vocab"].items()} | {i: e["content"] for i, e in added.items()}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    kinds = gguf.TokenType
    types = [
        kinds.UNUSED if index not in by_id
        else (kinds.CONTROL if added[index]["special"] else kinds.USER_DEFINED) if index in added
        else kinds.NORMAL
        for index in range(rows)
    ]  # fmt: skip
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(rows)]
    if not model.get("byte_fallback"):
        return Vocabulary(
            model="gpt2", tokens=tokens, types=types, cut=_cut(described), merges=[" ".join(pair) for pair in pairs]
        )
    for index, token in enumerate(tokens):
        if token == model.get("unk_token"):
            types[index] = kinds.UNKNOWN
        elif index not in added and token.startswith("<0x") and len(token) == 6:
            types[index] = kinds.BYTE
    ranks: dict[str, int] = {}
    for rank, (first, second) in enumerate(pairs):
        ranks.setdefault(first + second, rank)
    # sentencepiece merges what has the highest score first, and characters come after all that are merged.
    scores = [
        float(-ranks.get(token, len(pairs) + index)) if types[index] == kinds.NORMAL else 0.0
        for index, token in enumerate(tokens)
    ]
    return Vocabulary(model="llama", tokens=tokens, types=types, scores=scores, add_blank=_adds_blank(described))


def _steps(part: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    if part is not None and part.get("type") == "Sequence":
        yield from part[inner]
    elif part is not None:
        yield part


def _adds_blank(described: Mapping[str, Any]) -> bool:
    prepends = [s["type"] == "Prepend" for s in _steps(described["normalizer"], "normalizers")]
    metaspace = [
        s.get("prepend_scheme", "always") != "never"
        for s in _steps(described["pre_tokenizer"], "pretokenizers")
        if s["type"] == "Metaspace"
    ]
    return any(prepends) or any(metaspace)


def _cut(described: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts a text into words; a ModelError if it is none of `_CUTS`."""
    found: list[str] = []
    for step in _steps(described["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Split":
            found.append(str(step["pattern"].get("Regex", step["pattern"])))
        elif step["type"] == "ByteLevel" and not step.get("use_regex", True):
            found.append("bytes")
        else:
            found.append(step["type"])
    if tuple(found) not in _CUTS:
        raise ModelError(
            f"layout gguf: the tokenizer cuts words by {found}, which has no name here (known: {', '.join(_CUTS.values())}); "
            "export with --layout llava-hf or published and try llama.cpp's own converter"
        )
    return _CUTS[tuple(found)]
