"""The processor of our models: chat messages or texts with pictures in; ids, masks and pixels as in training out.

Dims: B texts, T tokens of the longest, M pictures.
"""

import inspect
import logging
import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import transformers
from transformers import AutoTokenizer, BatchFeature, ImageProcessingMixin, ProcessorMixin
from transformers.image_utils import load_image

from vlm_distill_cache.common.pixels.rgb import MAX_PIXELS, paste_on_square, to_rgb

# PIL classes that some versions of the library (5.17) give at their top level only where torchvision is installed, and
# the module that has them anyway.
_BEHIND_TORCHVISION = {"Idefics3ImageProcessor": "idefics3", "SmolVLMImageProcessor": "smolvlm"}

# Options of texts: what each takes, its default first.
_COUNT = (None,)  # or any above 0
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "padding": (True, False, "longest", "max_length", "do_not_pad"),
    "padding_side": (None, "left", "right"),  # None: the tokenizer's, which is saved as "left"
    "max_length": _COUNT,
    "pad_to_multiple_of": _COUNT,
    "truncation": (False, True, "longest_first", "only_first", "do_not_truncate"),
    "add_special_tokens": (True, False),
    "return_tensors": (None, "pt", "np"),
    "return_attention_mask": (True, False),
    "return_offsets_mapping": (False, True),
    "return_mm_token_type_ids": (False, True),
}
# What the library gives along and changes nothing here; and what there is none of here, so that it must be asked for none.
_IGNORED = ("verbose", "return_text_replacement_offsets", "videos_kwargs", "audio_kwargs")
_NONE_OF = (
    "videos", "audio", "stride", "is_split_into_words", "sanitize_control_tokens", "return_token_type_ids",
    "return_overflowing_tokens", "return_special_tokens_mask", "return_length", "split_special_tokens", "processing_kwargs",
)  # fmt: skip
_LONGEST = 1 << 24  # tokens; tokenizers without a limit name a larger one


def pil_class(settings: Mapping[str, Any]) -> Any:
    """The library's PIL class for an image processor's stored settings; None if it has none.

    A class stored with or without ``Fast`` or ``Pil``, or under its name of old, is one and the same.
    """
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
    base = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if not base.endswith("ImageProcessor"):
        return None
    home: Any = transformers
    if base in _BEHIND_TORCHVISION:
        family = _BEHIND_TORCHVISION[base]
        home = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(home, f"{base}Pil", None)


class VisionLanguageProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat template of one of our models.

    A text holds one ``image_token`` where its picture stands, as the chat template writes it; it becomes
    ``visual_tokens`` times ``image_token_id``, which may be no token of the tokenizer's (MobileVLM: 32000).

    Attributes:
        layout: How a picture becomes the tower's: ``pad`` puts it on a square first; ``square`` and ``crop`` leave that
            to the image processor.
        visual_tokens: Of a picture.
        adds_special_tokens: Whether a text gets what the tokenizer puts in front of one; else its template writes that.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        layout: str = "square",
        image_token: str = "<image>",
        image_token_id: int = -1,
        visual_tokens: int = 1,
        adds_special_tokens: bool = True,
    ) -> None:
        self.layout = layout
        self.image_token = image_token
        self.image_token_id = image_token_id
        self.visual_tokens = visual_tokens
        self.adds_special_tokens = adds_special_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _get_arguments_from_pretrained(cls, folder: Any, *_: Any, **options: Any) -> list[Any]:
        """Image processor, always the PIL one, and tokenizer; the library's hook."""
        settings, _ = ImageProcessingMixin.get_image_processor_dict(folder, **options)
        image_class = pil_class(settings)
        if image_class is None:
            raise ValueError(f"{folder}: transformers {transformers.__version__} has no PIL class for {settings}")
        return [image_class.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder, **options)]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        text_kwargs: Mapping[str, Any] | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepare texts, with at most one picture each.

        Args:
            images: Pictures in the order of the texts that hold an image token: PIL, uint8 arrays or tensors ``[H, W]``,
                ``[H, W, C]`` or ``[C, H, W]`` with 1, 3 or 4 channels, a file's bytes, paths or addresses; one, a list, an array
                or tensor of several ``[M, H, W, C]`` or ``[M, C, H, W]``, or a list (or None) for each text.
            text: One or several; None: pictures alone.
            text_kwargs, images_kwargs, common_kwargs: Options, too; those of the image processor are handed to it.
            options: As the library's tokenizers take them: ``padding`` (True or ``longest``, the default; ``max_length``;
                False or ``do_not_pad``), ``padding_side`` (default: the tokenizer's, saved as ``left``, as generation needs it),
                ``pad_to_multiple_of``, ``truncation`` to ``max_length`` (default: the tokenizer's) on its ``truncation_side``,
                ``add_special_tokens``, ``return_tensors``, ``return_attention_mask``, ``return_offsets_mapping`` (of
                pictures their image token's) and ``return_mm_token_type_ids`` (1: picture). Others are refused.

        Returns:
            With texts ``input_ids`` and ``attention_mask``, int64 ``[B, T]``; with pictures ``pixel_values``, float32
            ``[M, 3, height, width]``.

        Raises:
            ValueError: Texts and pictures do not go together, a picture cannot be used, or there is no such option.
        """
        asked = {**(common_kwargs or {}), **(text_kwargs or {}), **options}
        of_pictures = self._of_pictures()
        pixels = {name: asked.pop(name) for name in of_pictures & asked.keys()} | dict(images_kwargs or {})
        pixels.pop("return_tensors", None)
        taken = _options(asked)
        if unknown := sorted(pixels.keys() - of_pictures):
            raise ValueError(
                f"images_kwargs: no option {', '.join(unknown)}; there are {', '.join(sorted(of_pictures))}"
            )
        if text is None and images is not None:
            found = np.stack([self._pixels(_rgb(image), pixels) for image in _flat(images)])
            return BatchFeature({"pixel_values": found}, tensor_type=taken["return_tensors"])
        texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Sequence) else []
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError(
                f"text: expected a text or a list of texts, with {self.image_token} where the picture stands, got "
                f"{type(next(iter(texts), text)).__name__}"
            )
        pictures = [_rgb(image) for image in self._in_order(images, texts)]
        limit, padding = taken["max_length"] or self.tokenizer.model_max_length, taken["padding"]
        side = taken["padding_side"] or self.tokenizer.padding_side
        rows = [self._read(one, taken, limit) for one in texts]
        masks = [[1] * len(row) for row in rows]
        if padding not in (False, "do_not_pad"):
            width = max(map(len, rows))
            if padding == "max_length":
                if limit > _LONGEST:
                    raise ValueError("padding='max_length' needs max_length")
                width = max(width, limit)
            width += -width % (taken["pad_to_multiple_of"] or 1)
            filler = self.tokenizer.pad_token_id
            filler = self.tokenizer.eos_token_id if filler is None else filler
            rows = [_padded(row, width, (filler or 0, (0, 0)), side) for row in rows]
            masks = [_padded(row, width, 0, side) for row in masks]
        data: dict[str, Any] = {"input_ids": [[one for one, _ in row] for row in rows]}
        if taken["return_attention_mask"]:
            data["attention_mask"] = masks
        if taken["return_offsets_mapping"]:
            data["offset_mapping"] = [[span for _, span in row] for row in rows]
        if taken["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = [[int(one == self.image_token_id) for one, _ in row] for row in rows]
        if pictures:
            data["pixel_values"] = np.stack([self._pixels(picture, pixels) for picture in pictures])
        return BatchFeature(data, tensor_type=taken["return_tensors"])

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """As the library's; an option that neither it, the template nor this processor knows changes nothing, with a warning."""
        known = {*_OPTIONS, *_IGNORED, *_NONE_OF, *self._of_pictures()}
        for theirs in (super().apply_chat_template, self.__call__):
            known.update(inspect.signature(theirs).parameters)
        read = f"{chat_template} {self.chat_template}"
        for name in [name for name in options if name not in known and not re.search(rf"\b{re.escape(name)}\b", read)]:
            if options.pop(name) not in (None, False, [], {}):
                logging.getLogger(__name__).warning("the chat template does not read %s: it changes nothing", name)
        given = {} if processor_kwargs is None else {"processor_kwargs": dict(processor_kwargs)}
        return super().apply_chat_template(conversation, chat_template=chat_template, **given, **options)

    def _of_pictures(self) -> set[str]:
        """The image processor's options."""
        return set(self.image_processor.valid_kwargs.__annotations__) - _OPTIONS.keys()

    def _in_order(self, images: Any, texts: Sequence[str]) -> list[Any]:
        """The pictures in the order of the texts, each of which has its own."""
        given = _listed(images)
        counts = [text.count(self.image_token) for text in texts]
        alone = "this model takes one picture a text or conversation, or none"
        if any(one is None or isinstance(one, list | tuple) for one in given):
            lists = [list(one) if isinstance(one, list | tuple) else [] if one is None else [one] for one in given]
            if len(lists) != len(texts):
                raise ValueError(f"{len(lists)} lists of pictures for {len(texts)} texts; give one list for each text")
            for number, (own, count) in enumerate(zip(lists, counts, strict=True), 1):
                if len(own) != count or count > 1:
                    raise ValueError(
                        f"text {number}: {len(own)} pictures, and {count} times {self.image_token}; {alone}"
                    )
            return [image for own in lists for image in own]
        if max(counts) > 1:
            raise ValueError(f"a text holds {max(counts)} times {self.image_token}; {alone}")
        if sum(counts) != len(given):
            raise ValueError(
                f"{len(given)} pictures, but {sum(counts)} of the texts hold {self.image_token}; put it once into each text "
                f"that a picture belongs to, or use apply_chat_template; {alone}"
            )
        return given

    def _read(self, text: str, taken: Mapping[str, Any], limit: int) -> list[tuple[int, tuple[int, int]]]:
        """Ids of a text, its picture opened out, and the characters of each; cut to ``limit`` where that is asked for."""
        tokenizer, bos = self.tokenizer, self.tokenizer.bos_token

        def read(start: int, end: int) -> list[tuple[int, tuple[int, int]]]:
            tells = {"return_offsets_mapping": True} if taken["return_offsets_mapping"] else {}
            found = tokenizer(text[start:end], add_special_tokens=False, verbose=False, **tells)
            spans = found.get("offset_mapping") or [(0, 0)] * len(found["input_ids"])
            return [(one, (start + a, start + b)) for one, (a, b) in zip(found["input_ids"], spans, strict=True)]

        at, named = text.find(self.image_token), tokenizer.added_tokens_decoder.get(self.image_token_id)
        if str(named) == self.image_token:
            found = read(0, len(text))
        else:
            end = at + len(self.image_token)
            before, behind = (read(0, len(text)), []) if at < 0 else (read(0, at), read(end, len(text)))
            if any(one == self.image_token_id for one, _ in (*before, *behind)):
                raise ValueError(
                    f"the token {str(named or tokenizer.convert_ids_to_tokens(self.image_token_id))!r} in the text has the id "
                    f"{self.image_token_id}, which marks pictures here: open the processor again, and add a token that no text "
                    "holds in its place, before it"
                )
            found = [*before, *([] if at < 0 else [(self.image_token_id, (at, end))]), *behind]
        row = [one for one in found for _ in range(self.visual_tokens if one[0] == self.image_token_id else 1)]
        front: list[tuple[int, tuple[int, int]]] = []
        if taken["add_special_tokens"] and self.adds_special_tokens and not (bos and text.startswith(bos)):
            bare, full = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (False, True))
            starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
            front = [(one, (0, 0)) for one in full[: next(starts, 0)]]
        over = len(front) + len(row) - limit
        if over > 0 and taken["truncation"] not in (False, "do_not_truncate"):
            left = tokenizer.truncation_side == "left"
            cut, row = (row[:over], row[over:]) if left else (row[-over:], row[:-over])
            if any(one == self.image_token_id for one, _ in cut):
                raise ValueError(f"max_length={limit} would cut a picture off; raise it, or shorten the text")
        return [*front, *row]

    def _pixels(self, image: PIL.Image.Image, options: Mapping[str, Any]) -> np.ndarray:
        """A picture as float32 ``[3, height, width]``."""
        side = max(image.size)
        if self.layout == "pad" and image.width != image.height:
            if side * side > MAX_PIXELS:
                raise ValueError(
                    f"an image of {image.width} x {image.height} pixels would become {side} x {side}, more than the "
                    f"{MAX_PIXELS} pixels allowed; crop it first"
                )
            image = paste_on_square(image, side, self.image_processor.image_mean)
        values = self.image_processor(image, **{"do_pad": False, **options})["pixel_values"][0]
        return np.asarray(values, dtype=np.float32)


def _options(asked: Mapping[str, Any]) -> dict[str, Any]:
    """All options of texts.

    Raises:
        ValueError: There is no such option, or it takes no such value.
    """
    taken = {name: allowed[0] for name, allowed in _OPTIONS.items()}
    for name, given in asked.items():
        value = getattr(given, "value", given)  # the library has enums for some
        if name in _OPTIONS:
            allowed = _OPTIONS[name]
            is_count = allowed == _COUNT and type(value) is int and value > 0
            if value is not None and not is_count and value not in allowed:
                expected = "a count above 0" if allowed == _COUNT else " or ".join(map(repr, allowed))
                raise ValueError(f"{name}: got {value!r}, expected {expected}")
            taken[name] = allowed[0] if value is None else value
        elif not (value is None or name in _IGNORED or (name in _NONE_OF and value in (False, [], (), {}))):
            raise ValueError(f"no option {name} (got {value!r:.80}) of this processor; there are {', '.join(_OPTIONS)}")
    return taken


def _listed(images: Any) -> list[Any]:
    """One picture, several, or lists of them, as a list."""
    many = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    return [] if images is None else list(images) if many or len(getattr(images, "shape", ())) == 4 else [images]


def _flat(images: Any) -> list[Any]:
    """All pictures, in lists or not."""
    return [
        image
        for one in _listed(images)
        for image in (_listed(one) if isinstance(one, list | tuple) or one is None else [one])
    ]


def _padded(row: list[Any], width: int, filler: Any, side: str) -> list[Any]:
    missing = [filler] * (width - len(row))
    return row + missing if side == "right" else missing + row


def _rgb(image: Any) -> PIL.Image.Image:
    """A picture as the model sees it: upright, alpha over white."""
    if isinstance(image, bytes):
        image = PIL.Image.open(BytesIO(image))
    elif isinstance(image, str | Path):
        image = PIL.Image.open(image) if os.path.isfile(image) else load_image(str(image))  # noqa: PTH113 - any text
    elif not isinstance(image, PIL.Image.Image):
        image = _from_array(image)
    return to_rgb(PIL.ImageOps.exif_transpose(image))


def _from_array(image: Any) -> PIL.Image.Image:
    """A picture of an array or tensor; floats and wider numbers have no one meaning."""
    kind, shape = str(getattr(image, "dtype", type(image).__name__)).removeprefix("torch."), getattr(image, "shape", ())
    first, last = (len(shape) == 3 and shape[at] in (1, 3, 4) for at in (0, -1))
    if kind != "uint8" or 0 in shape or not (len(shape) == 2 or first != last):
        raise ValueError(
            f"a picture of type {kind}{f' and shape {tuple(shape)}' if shape else ''}; expected PIL's, an array or tensor of "
            "uint8 in shape [H, W], or [H, W, C] or [C, H, W] with 1, 3 or 4 channels on one side, a file's bytes, a path or "
            "an address"
        )
    values = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
    values = np.moveaxis(values, 0, -1) if first else values
    return PIL.Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2:] == (1,) else values))
