"""What the model library itself makes of one picture, question and answer: its processor, its eager forward pass."""

import json
import re
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import transformers as hf

from vlm_distill_cache.common.models.original_llava import is_original_llava
from vlm_distill_cache.common.models.published import is_published, load_published
from vlm_distill_cache.data.text.processors import load_image_processor, load_tokenizer

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
)
SPLIT = {"image_seq_len": 9}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("LlavaProcessor", {"patch_size": 8, "vision_feature_select_strategy": "default",
                                 "num_additional_image_tokens": 1}),
    "llava_next": ("LlavaNextProcessor", {"patch_size": 8, "vision_feature_select_strategy": "default",
                                          "num_additional_image_tokens": 1}),
    "llava_onevision": ("LlavaOnevisionProcessor", {
        "num_image_tokens": 9, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"}),
    "qwen2_vl": ("Qwen2VLProcessor", {}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", {}),
    "qwen3_vl": ("Qwen3VLProcessor", {}),
    "idefics3": ("Idefics3Processor", SPLIT),
    "smolvlm": ("Idefics3Processor", SPLIT),  # SmolVLM's own needs the package num2words; for pictures it is the same
    "internvl": ("InternVLProcessor", {"image_seq_length": 9}),
    "paligemma": ("PaliGemmaProcessor", {}),
    "paligemma2": ("PaliGemmaProcessor", {}),
    "gemma3": ("Gemma3Processor", {"image_seq_length": 9}),
}  # fmt: skip


def library_processor(name: str, folder: Path) -> Any:
    """The library's own processor of a family's folder."""
    return processor_of(name, load_tokenizer(folder), load_image_processor(folder))


def processor_of(name: str, tokenizer: Any, images: Any) -> Any:
    """The library's own processor of a family, with PIL pictures."""
    class_name, options = PROCESSORS[name]
    processor_class = getattr(hf, class_name)
    if "video_processor" in processor_class.get_attributes():
        options = options | {"video_processor": None}
    if name.startswith("paligemma"):
        images.image_seq_length = 9
    processor_class = type(class_name, (processor_class,), {"check_argument_for_proper_class": lambda *_: None})
    return processor_class(
        image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template, **options
    )


def reference_inputs(
    name: str, folder: Path, picture: PIL.Image.Image | None, question: str, answer: str
) -> tuple[dict[str, Any], int, int]:
    """The library's inputs for one conversation of batch size 1, and the range of rows that predict the answer."""
    if name not in PROCESSORS:
        return published_inputs(name, folder, picture, question, answer)
    processor = library_processor(name, folder)
    images = {} if picture is None else {"images": [picture]}
    if name.startswith("paligemma"):
        if picture is None:
            ids = processor.tokenizer(f"<s>{question}\n", add_special_tokens=False)["input_ids"]
            tail = processor.tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"]
            kinds = torch.tensor([[0] * len(ids) + [1] * len(tail)])
            return (
                {"input_ids": torch.tensor([ids + tail]), "token_type_ids": kinds},
                len(ids) - 1,
                len(ids) + len(tail) - 1,
            )
        inputs = dict(processor(text=[question], suffix=[answer], return_tensors="pt", **images))
        inputs.pop("labels")
        first = int((inputs["token_type_ids"][0] == 0).sum()) - 1
        return inputs, first, first + int((inputs["token_type_ids"][0] == 1).sum())
    if name == "llava":
        shown = "" if picture is None else "<image>\n"
        prompt = f"{VICUNA}USER: {shown}{question} ASSISTANT:"
        whole, leading = f"{prompt} {answer}</s>", True
    else:
        part = [] if picture is None else [{"type": "image"}]
        asked = [{"role": "user", "content": [*part, {"type": "text", "text": question}]}]
        said = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        prompt = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = processor.apply_chat_template(asked + said, tokenize=False)
        leading = not whole.startswith("<s>")  # as the library's apply_chat_template(tokenize=True) decides
    start, end, inputs = (
        dict(processor(text=[text], return_tensors="pt", add_special_tokens=leading, **images))
        for text in (prompt, whole.rstrip(), whole)
    )
    return inputs, start["input_ids"].shape[1] - 1, end["input_ids"].shape[1] - 1


def published_inputs(
    name: str, folder: Path, picture: PIL.Image.Image | None, question: str, answer: str
) -> tuple[dict[str, Any], int, int]:
    """The same by hand for checkpoints whose own code the library does not have: padded or squashed, Vicuna's words."""
    tokenizer, options = load_tokenizer(folder), {"size": {"height": 24, "width": 24}}
    leading = [1] if name.startswith(("mobilevlm", "llava")) else []
    shown = "" if picture is None else "\n"
    texts = (f"{VICUNA}USER: ", f"{shown}{question} ASSISTANT:", f" {answer}</s>")
    before, middle, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    visual = [] if picture is None else [len(tokenizer)] * (9 if leading else 8)
    ids = leading + before + visual + middle + said
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if picture is not None:
        if leading:  # MobileVLM and LLaVA pad with the mean colour to a square
            side = max(picture.size)
            padded = PIL.Image.new("RGB", (side, side), (122, 116, 104))
            padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture, options = padded, options | {"crop_size": {"height": 24, "width": 24}}
        images = (hf.CLIPImageProcessorPil if leading else hf.SiglipImageProcessorPil)(**options)
        inputs["pixel_values"] = images(picture, return_tensors="pt")["pixel_values"]
    return inputs, len(ids) - len(said) - 1, len(ids) - 1


@torch.no_grad()
def reference_output(
    folder: Path, inputs: dict[str, Any], *, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits ``[T, V]`` and each layer's attention, mean over heads, ``[T, T]``, by eager attention."""
    if "pixel_values" in inputs:
        inputs = inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}
    if is_published(folder):
        model: Any = load_published(folder, dtype=dtype)
        model.language_model.set_attn_implementation("eager")
    elif is_original_llava(folder):
        model = original_llava(folder, dtype)
    else:
        loader = hf.AutoModelForImageTextToText
        model = loader.from_pretrained(folder, attn_implementation="eager", dtype=dtype).eval()
    output = model(**inputs, use_cache=False, output_attentions=True)
    logits = output.logits[0]
    if is_original_llava(folder):
        logits = logits[:, :-1]  # the row that the image token has here
    return logits, tuple(layer[0].mean(dim=0) for layer in output.attentions)


def original_llava(folder: Path, dtype: torch.dtype) -> Any:
    """The library's class with an original checkpoint's weights, and one more row, of zeros, for the image token."""
    stored, vision = (json.loads((path / "config.json").read_text()) for path in (folder, folder / "clip"))
    mm = {name for name in stored if name.startswith("mm_")} | {"model_type", "architectures", "image_aspect_ratio"}
    text = {name: value for name, value in stored.items() if name not in mm}
    vocabulary = text["vocab_size"]
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**text | {"vocab_size": vocabulary + 1}),
        vision_config=hf.CLIPVisionConfig(**vision),
        image_token_index=vocabulary,
    )
    state = {}
    for name, value in torch.load(folder / "pytorch_model.bin").items():
        if value.shape[0] == vocabulary and value.ndim == 2:
            value = torch.cat([value, torch.zeros(1, value.shape[1])])
        name = re.sub(r"^model\.(?!mm_)", "model.language_model.", name)
        name = name.replace("mm_projector.0", "multi_modal_projector.linear_1")
        state[name.replace("mm_projector.2", "multi_modal_projector.linear_2")] = value
    for name, value in torch.load(folder / "clip" / "pytorch_model.bin").items():
        state[name.replace("vision_model.", "model.vision_tower.")] = value
    model = hf.LlavaForConditionalGeneration(config)
    model.load_state_dict(state)
    model.set_attn_implementation("eager")
    return model.to(dtype).eval()
