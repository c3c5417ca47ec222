"""Gemma 3: one fixed grid of visual tokens with text around it, written where the template has another token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import PIL.Image

from vlm_distill_cache.data.images.encoder import EncodedImage, ImageEncoder


@dataclass(frozen=True, kw_only=True)
class FramedEncoder:
    r"""An `ImageEncoder` whose visual tokens stand between literal texts.

    Attributes:
        fixed: Pixels and boxes.
        image_token: The text of one visual token (Gemma 3: ``<image_soft_token>``).
        before: Text in front of the visual tokens (``\n\n<start_of_image>``).
        after: Text behind them (``<end_of_image>\n\n``).
        marker: What the chat template writes for the picture (``<start_of_image>``); None: the image token.

    """

    fixed: ImageEncoder
    image_token: str
    before: str
    after: str
    marker: str | None = None

    kind: ClassVar[str] = "framed"
    writes_text: ClassVar[bool] = True

    @property
    def processor(self) -> Any:
        """The model library's PIL image processor."""
        return self.fixed.processor

    @property
    def least_token_count(self) -> int:
        """Visual tokens per image."""
        return self.token_count

    @property
    def token_count(self) -> int:
        """Visual tokens per image."""
        return self.fixed.token_count

    def attention_grid(self) -> tuple[int, int]:
        """Rows and columns that stage one pools attention to."""
        return self.fixed.attention_grid()

    def to_dict(self) -> dict[str, Any]:
        """What decides pixels, boxes and the text, as plain JSON."""
        texts = {name: getattr(self, name) for name in ("image_token", "before", "after", "marker")}
        return {"kind": self.kind, **texts, **self.fixed.to_dict()}

    def __call__(self, image: PIL.Image.Image) -> EncodedImage:
        """Turn one RGB picture into model input: ``pixel_values`` f4 ``[1, 3, H, W]``, one tile, and the text."""
        encoded = self.fixed(image)
        text = f"{self.before}{self.image_token * self.token_count}{self.after}"
        return EncodedImage(inputs=encoded.inputs, tiles=encoded.tiles, text=text)
