"""Pictures of a family that is not in the table: the model library's own processor prepares them.

It says how many visual tokens a picture becomes and what is written around them, not where they look. Their boxes
are therefore put outside the picture, which is what this project calls padding: no signal about the image can be
made from them by mistake.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
from transformers import AutoProcessor

from vlm_distill_cache.common.attention.tiles import NOWHERE, Tile
from vlm_distill_cache.common.errors import ModelError, SampleError
from vlm_distill_cache.data.images.encoder import EncodedImage, check_settings

# Made for the text, not for the picture.
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids", "labels")


def load_processor(folder: Path) -> Any:
    """Load the whole processor of a folder, as the library finds it; `ModelError` if there is none."""
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ImportError, ValueError, OSError) as error:
        raise ModelError(
            f"{folder}: no usable processor ({error}); a family that is not in the table of families needs the "
            "model library's own, and what that needs (often torchvision: pip install torchvision)"
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelError(
            f"{folder}: {type(processor).__name__} does not prepare pictures and text together; expected the "
            "processor of a vision-language model"
        )
    return processor


@dataclass(frozen=True, kw_only=True, eq=False)
class LibraryImages:
    """The library's processor, asked for one picture at a time.

    Attributes:
        library: The whole processor, tokenizer included.
        image_token_id: Id at visual positions.
    """

    library: Any
    image_token_id: int

    writes_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def processor(self) -> Any:
        """Its image processor."""
        return self.library.image_processor

    @property
    def marker(self) -> str | None:
        """What a template writes for the picture: the processor's own word for it."""
        return getattr(self.library, "boi_token", None)

    @property
    def least_token_count(self) -> int:
        """As `token_count`: how many others have is not known before they are prepared."""
        return self.token_count

    def attention_grid(self) -> tuple[int, int]:
        """Where tokens look is unknown: no attention is kept."""
        return 1, 1

    @property
    def token_count(self) -> int:
        """Visual tokens of a small square picture; others may have more."""
        return sum(tile.token_count for tile in self(PIL.Image.new("RGB", (64, 64))).tiles)

    def to_dict(self) -> dict[str, Any]:
        """What decides the pixels, as plain JSON; the library's version is part of it, since its code is."""
        settings = {
            key: value
            for key, value in sorted(self.processor.to_dict().items())
            if isinstance(value, str | int | float | bool | list | dict | None) and not key.endswith("_type")
        }
        return {"kind": "library", "class": type(self.library).__name__, "processor": settings}

    def __call__(self, image: PIL.Image.Image) -> EncodedImage:
        """Turn one RGB picture into the model's inputs, and its text with every visual token written out."""
        tokenizer = self.library.tokenizer
        token = str(tokenizer.convert_ids_to_tokens(self.image_token_id))
        placeholder = self.marker or token
        try:
            made = self.library(images=[image], text=[placeholder], return_tensors="np")
        except Exception as error:  # of any class: it is the library's
            raise SampleError(
                f"{type(self.library).__name__} refuses the picture: {str(error) or type(error).__name__}"
            ) from error
        ids = np.asarray(made["input_ids"])[0]
        places = np.flatnonzero(ids == self.image_token_id)
        if not len(places):
            raise SampleError(
                f"{type(self.library).__name__} wrote no image token (id {self.image_token_id}) for the picture"
            )
        added = tokenizer("")["input_ids"]  # the start token, of some the end token: not the picture's
        start = 1 if added[:1] == ids[:1].tolist() and places[0] > 0 else 0
        end = len(ids) - (1 if len(added) > start and added[-1] == ids[-1] and places[-1] < len(ids) - 1 else 0)
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        inputs = {
            name: np.asarray(value)
            for name, value in made.items()
            if name not in _TEXT_INPUTS and np.asarray(value).dtype != object
        }
        return EncodedImage(inputs=inputs, tiles=(Tile(rows=1, cols=len(places), region=NOWHERE),), text=text)
