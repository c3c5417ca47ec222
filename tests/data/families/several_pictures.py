"""A family's tiny model in memory, our inputs of conversations about several pictures, and the library's own."""

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers as hf
from family_references import PROCESSORS, VICUNA, processor_of
from image_array import ImageArray
from tiny_families import TINY, make_lively, square

from vlm_distill_cache.common.attention.capture import AttentionCapture
from vlm_distill_cache.data.families.table import Family, family_of, submodule
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.templates import get_template

SIZES = ((40, 30), (24, 60), (33, 33), (50, 17), (26, 31))
SHOWN = "<image>"


@cache
def picture(number: int) -> PIL.Image.Image:
    width, height = SIZES[number]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@dataclass(frozen=True)
class Talk:
    """A conversation: pairs of question, its pictures written as ``<image>``, and answer; and which pictures."""

    turns: tuple[tuple[str, str], ...]
    pictures: tuple[int, ...]

    def sample(self, name: str) -> Sample:
        turns = []
        for question, answer in self.turns:
            places, text = [], ""
            for number, part in enumerate(question.split(SHOWN)):
                places += [len(text)] if number else []
                text += part
            turns.append(Turn(question=text, answer=answer, places=tuple(places)))
        images = tuple(ImageArray(np.asarray(picture(n)), f"p{n}") for n in self.pictures)
        return Sample(sample_id=name, images=images, turns=tuple(turns))


@dataclass(frozen=True, eq=False)
class TinyFamily:
    """A family's entry with a model of random weights."""

    name: str
    family: Family
    model: Any
    eager: Any
    encoder: SampleEncoder
    capture: AttentionCapture
    processor: Any

    @property
    def config(self) -> Any:
        return self.model.config

    def text(self, talk: Talk, *, asks: bool = False) -> str:
        """As the library's chat template writes it, or LLaVA's own code; with ``asks`` up to the last answer."""
        turns = talk.turns
        if self.encoder.template.chat_template:
            messages = [message for turn in turns for message in _messages(*turn)]
            return self.processor.apply_chat_template(
                messages[: -1 if asks else None], tokenize=False, add_generation_prompt=asks
            )
        text = VICUNA
        for question, answer in turns:
            front = question.count(SHOWN) if question.startswith(SHOWN) else 0
            lead = f"{SHOWN}\n" * front + question[front * len(SHOWN) :] if front else question
            text += f"USER: {lead} ASSISTANT: {answer}</s>"
        return text[: text.rindex(" ASSISTANT:") + len(" ASSISTANT:")] if asks else text

    def library_inputs(self, talk: Talk, *, asks: bool = False) -> dict[str, Any]:
        """The library's inputs of batch size 1; by hand where it does not have the model."""
        pictures = [picture(number) for number in talk.pictures]
        images = {"images": [pictures]} if pictures else {}
        if self.name.startswith("paligemma"):
            ((question, answer),) = talk.turns
            suffix = {} if asks else {"suffix": [answer]}
            inputs = dict(self.processor(text=[question], return_tensors="pt", **suffix, **images))
            inputs.pop("labels", None)
            return inputs
        text = self.text(talk, asks=asks)
        if self.name in PROCESSORS:
            leading = not text.startswith("<s>")
            return dict(self.processor(text=[text], return_tensors="pt", add_special_tokens=leading, **images))
        return self._by_hand(text, pictures)

    def _by_hand(self, text: str, pictures: list[PIL.Image.Image]) -> dict[str, Any]:
        tokenizer, image = self.encoder.tokenizer, self.config.image_token_id
        pads = self.name.startswith("mobilevlm")
        parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(SHOWN)]
        ids = [1] * pads + parts[0]
        for part in parts[1:]:
            ids += [image] * self.encoder.image_encoder.token_count + part
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if pictures:
            shown = [_padded(one) if pads else one for one in pictures]
            inputs["pixel_values"] = self.encoder.image_encoder.processor(shown, return_tensors="pt")["pixel_values"]
        return inputs

    @torch.no_grad()
    def library_output(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[T, V]``, and attention, mean over heads, ``[layers, T, T]``, by eager attention."""
        output = self.eager(**inputs, use_cache=False, output_attentions=True)
        return output.logits[0], torch.stack([layer[0].mean(dim=0) for layer in output.attentions])


def open_tiny(name: str) -> TinyFamily:
    torch.manual_seed(0)
    model, tokenizer, images = TINY[name](Path())
    make_lively(model)
    model.eval()
    if images is None:
        kind = hf.SiglipImageProcessorPil if name == "compodistill" else hf.CLIPImageProcessorPil
        images = kind(size=square(), **({} if name == "compodistill" else {"crop_size": square()}))
    family = family_of(model.config.model_type)
    eager = copy.deepcopy(model)
    (eager if family.model_class else eager.language_model).set_attn_implementation("eager")
    processor = processor_of(name, tokenizer, images) if name in PROCESSORS else None
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=family.image_encoder(model.config, images, tokenizer),
        template=get_template(family.template, tokenizer),
        image_token_id=family.image_token_id(model.config),
        max_length=1024,
        most_pictures=family.most_pictures,
    )
    capture = AttentionCapture(submodule(model, family.language_model))
    return TinyFamily(name, family, model, eager, encoder, capture, processor)


def _messages(question: str, answer: str) -> list[dict[str, Any]]:
    content: list[dict[str, str]] = []
    for number, part in enumerate(question.split(SHOWN)):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": part}] if part else []
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def _padded(image: PIL.Image.Image) -> PIL.Image.Image:
    """To a square with the mean colour of CLIP, as MobileVLM pads."""
    side = max(image.size)
    canvas = PIL.Image.new("RGB", (side, side), (122, 116, 104))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas
