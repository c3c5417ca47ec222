"""The processor of our models: chat messages or texts with pictures in; ids, masks and pixels as in training out.

Dims: B texts, T tokens of the longest, M pictures.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
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
        padding: bool | str = True,
        padding_side: str = "left",
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Prepare texts, with at most one picture each.

        Args:
            images: Pictures in the order of the texts that hold an image token: PIL, uint8 arrays ``[H, W, 3]``, paths or
                addresses; one, a list, or a list for each text.
            text: One or several.
            padding: False: none; ``max_length``: to that; else to the longest.
            padding_side: ``left``, as generation needs it, or ``right``.
            max_length: Tokens of a text, at most, with ``truncation``.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 ``[B, T]``; with pictures ``pixel_values``, float32
            ``[M, 3, height, width]``.

        Raises:
            ValueError: Texts and pictures do not go together, or a picture cannot be used.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts:
            raise ValueError(f"no text; give one, with {self.image_token} where the picture stands")
        pictures = [_rgb(image) for image in _flat(images)]
        counts = [one.count(self.image_token) for one in texts]
        if max(counts) > 1:
            raise ValueError(
                f"a text holds {max(counts)} times {self.image_token}; this model takes one picture a text"
            )
        if sum(counts) != len(pictures):
            raise ValueError(
                f"{len(pictures)} pictures, but {sum(counts)} of the texts hold {self.image_token}; put it once into each text "
                "that a picture belongs to, or use apply_chat_template"
            )
        rows = [self._ids(one, add_special_tokens=add_special_tokens) for one in texts]
        if truncation and max_length is not None:
            if any(self.image_token_id in row[max_length:] for row in rows):
                raise ValueError(f"max_length={max_length} would cut a picture off; raise it, or shorten the text")
            rows = [row[:max_length] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding:
            longest = max(map(len, rows))
            width = max(longest, max_length or 0) if padding == "max_length" else longest
            filler = self.tokenizer.pad_token_id
            filler = self.tokenizer.eos_token_id if filler is None else filler
            rows = [_padded(row, width, filler or 0, padding_side) for row in rows]
            masks = [_padded(row, width, 0, padding_side) for row in masks]
        data: dict[str, Any] = {"input_ids": rows, "attention_mask": masks}
        if pictures:
            data["pixel_values"] = np.stack([self._pixels(picture) for picture in pictures])
        return BatchFeature(data, tensor_type=return_tensors)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text, its picture opened out."""
        tokenizer, bos = self.tokenizer, self.tokenizer.bos_token

        def read(part: str) -> list[int]:
            return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

        if self.image_token_id in tokenizer.added_tokens_decoder:
            found = read(text)
        else:
            before, marker, after = text.partition(self.image_token)
            found = read(before) + ([self.image_token_id, *read(after)] if marker else [])
        ids = [one for one in found for _ in range(self.visual_tokens if one == self.image_token_id else 1)]
        if not (add_special_tokens and self.adds_special_tokens) or (bos and text.startswith(bos)):
            return ids
        bare, full = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (False, True))
        starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
        return [*full[: next(starts, 0)], *ids]

    def _pixels(self, image: PIL.Image.Image) -> np.ndarray:
        """A picture as float32 ``[3, height, width]``."""
        side = max(image.size)
        if self.layout == "pad" and image.width != image.height:
            if side * side > MAX_PIXELS:
                raise ValueError(
                    f"an image of {image.width} x {image.height} pixels would become {side} x {side}, more than the "
                    f"{MAX_PIXELS} pixels allowed; crop it first"
                )
            image = paste_on_square(image, side, self.image_processor.image_mean)
        values = self.image_processor(image, do_pad=False)["pixel_values"][0]
        return np.asarray(values, dtype=np.float32)


def _padded(row: list[int], width: int, filler: int, side: str) -> list[int]:
    missing = [filler] * (width - len(row))
    return row + missing if side == "right" else missing + row


def _flat(images: Any) -> list[Any]:
    """All pictures of a nested list, in order."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for part in images for image in _flat(part)]


def _rgb(image: Any) -> PIL.Image.Image:
    """A picture as the model sees it: upright, alpha over white."""
    if isinstance(image, str):
        image = PIL.Image.open(image) if Path(image).is_file() else load_image(image)
    elif not isinstance(image, PIL.Image.Image):
        image = PIL.Image.fromarray(np.asarray(image))
    return to_rgb(PIL.ImageOps.exif_transpose(image))
