"""From a picture to pixel values, and to the tile that says which part of it each visual token sees.

Model families differ in how they make a rectangle square: squash it (``square``), pad it with the
mean colour (``pad``: LLaVA-1.5, MobileVLM) or scale the short edge and cut the middle out (``crop``:
CLIP). Attention maps of two models can only be compared if each token knows its box on the
*original* picture, so pixels and boxes are computed side by side from the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import PIL.Image
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width

from vlm_distill_cache.common.attention.tiles import Tile, pooled_grid
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.common.pixels.rgb import MAX_PIXELS, paste_on_square
from vlm_distill_cache.data.sample import Frame

Layout = Literal["square", "pad", "crop"]

# What decides the pixels; everything else a processor stores (its class, its version) does not.
PIXEL_KEYS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


# What else decides how many visual tokens there are; for errors.
SIZE_KEYS = (
    "size", "crop_size", "max_image_size", "image_grid_pinpoints", "patch_size", "merge_size", "temporal_patch_size",
    "min_patches", "max_patches", "do_resize", "do_center_crop", "do_pad", "do_rescale", "do_normalize", "image_mean",
    "image_std", "resample",
)  # fmt: skip
PROBES = ((64, 64), (96, 40), (40, 96))
"""Width and height of pictures that every image processor must be able to prepare."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImage:
    """One picture as a model reads it.

    Attributes:
        inputs: Arrays by the model's argument name (``pixel_values`` f4 ``[tiles, 3, H, W]`` or ``[patches, D]``,
            ``image_grid_thw`` i8 ``[1, 3]``, ...); those of a batch's pictures are joined along the first axis.
        tiles: The boxes of the visual tokens, in the order the language model reads them.
        text: What the prompt's image marker is replaced by, the image token written once per visual token; None:
            the image token alone, so often. It holds the tags that the family's library processor adds, not those
            that its chat template writes around the marker (Qwen-VL).
    """

    inputs: Mapping[str, np.ndarray]
    tiles: tuple[Tile, ...]
    text: str | None = None


def prepare_picture(processor: Any, image: PIL.Image.Image, *, among: bool = False, **options: Any) -> Any:
    """Run a model library's image processor on one picture.

    Args:
        among: It is the first of two of one sample; the other is a single pixel.

    Raises:
        SampleError: It refuses the picture, or memory does not suffice for it.
    """
    try:
        return processor([[image, PIL.Image.new("RGB", (1, 1))]] if among else image, **options)
    except MemoryError as error:
        raise SampleError(
            f"a picture of {image.width} x {image.height} pixels needs more memory than there is; scale it down first"
        ) from error
    except Exception as error:  # of any class: it is the library's, and other pictures went through
        raise SampleError(
            f"{type(processor).__name__} refuses a picture of {image.width} x {image.height} pixels: "
            f"{str(error) or type(error).__name__}"
        ) from error


def check_settings(encoder: "AnyImageEncoder") -> None:
    """Prepare some plain pictures: an image processor that refuses those would refuse all.

    Raises:
        ConfigError: Naming its settings.
    """
    if getattr(encoder.processor, "do_pan_and_scan", None):
        raise ConfigError(
            "do_pan_and_scan is on: its crops depend on the picture and overlap it, which is not supported; "
            "set do_pan_and_scan to false in preprocessor_config.json (the library's default)"
        )
    for name in ("size", "crop_size", "pad_size"):
        size = getattr(encoder.processor, name, None)
        height, width = (getattr(size, key, None) for key in ("height", "width"))
        if isinstance(height, int | float) and isinstance(width, int | float) and height * width > MAX_PIXELS:
            raise unusable_settings(encoder.processor, f"{name} is more than the {MAX_PIXELS} pixels allowed")
    for width, height in PROBES:
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        try:
            made = encoder(PIL.Image.fromarray(noise))
        except (SampleError, ConfigError) as error:
            raise unusable_settings(encoder.processor, str(error)) from error
        if not all(np.isfinite(values).all() for values in made.inputs.values()):
            raise unusable_settings(encoder.processor, "pixels become no numbers (is a value of image_std 0?)")


def unusable_settings(processor: Any, why: str) -> ConfigError:
    """The error about an image processor's settings."""
    stored = processor.to_dict()
    shown = ", ".join(f"{name}={stored[name]}" for name in SIZE_KEYS[:9] if stored.get(name) is not None)
    return ConfigError(
        f"preprocessor_config.json (or processor_config.json): {type(processor).__name__} cannot be used with {shown}: "
        f"{why}; correct the setting, or take that file of the same checkpoint"
    )


@runtime_checkable
class VideoEncoder(Protocol):
    """What image encoders of families can do that read a video otherwise than as so many pictures."""

    def video(self, frames: Sequence[Frame]) -> EncodedImage:
        """Turn the frames of one video into model input.

        Returns:
            Tiles whose spans count the frames from 0 (``(0, 2)``: the token shows two), with ``is_frame``.
        """


@runtime_checkable
class CountingEncoder(Protocol):
    """What image encoders can do whose family reads a picture that is its sample's only one otherwise than several."""

    def among(self, pictures: int) -> Callable[[PIL.Image.Image], EncodedImage]:
        """How each picture of a sample with so many is encoded; with one as by the encoder itself."""


class AnyImageEncoder(Protocol):
    """What every family's image encoder can do; its dict names and rebuilds it (``data.families.table``)."""

    @property
    def processor(self) -> Any:
        """The model library's PIL image processor."""

    @property
    def marker(self) -> str | None:
        """What a prompt template writes once for the picture; None: the image token."""

    @property
    def writes_text(self) -> bool:
        """Whether a picture's `EncodedImage.text` is given."""

    @property
    def least_token_count(self) -> int:
        """No picture has fewer visual tokens."""

    @property
    def token_count(self) -> int:
        """Most visual tokens of a picture."""

    def attention_grid(self) -> tuple[int, int]:
        """Rows and columns, at most 12, that attention on the picture is pooled to unless a grid is asked for."""

    def to_dict(self) -> dict[str, Any]:
        """What decides pixels and boxes, as plain JSON for a plan and its fingerprint."""

    def __call__(self, image: PIL.Image.Image) -> EncodedImage:
        """Turn one RGB picture into model input; raises SampleError for one that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """A model library's image processor together with the geometry it implies.

    Attributes:
        processor: A *PIL* image processor (``CLIPImageProcessorPil`` and its like; torchvision is
            not needed). Its own padding is switched off: padding is done here, as LLaVA does it.
        layout: How a rectangle becomes the model's square.
        grid: Rows and columns of visual tokens the language model receives.
        patch_size: Pixels per patch, where patches do not fill the input exactly (SigLIP: 27 x 14
            = 378 of 384 pixels; the rest is seen by no token). None: they fill it.
        drops_first: The language model does not receive the first token (CompoDistill cuts SigLIP's first
            patch off as if it were a class token: 728 of 729).

    Raises:
        ConfigError: The processor cannot give one fixed size in this layout, cuts extra crops out of elongated pictures
            (pan and scan), or the grid is empty.
    """

    processor: Any
    layout: Layout
    grid: tuple[int, int]
    patch_size: int | None = None
    drops_first: bool = False

    marker: ClassVar[str | None] = None
    writes_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or self.token_count < 1:
            raise ConfigError(f"grid must hold at least 1 x 1 visual tokens, got {self.grid}")
        size, crop = self._size, self._crop_size
        crops, resizes = self._crops, bool(self._settings["do_resize"])
        exact = {"height", "width"} <= size.keys()
        known = exact or "shortest_edge" in size or {"max_height", "max_width"} <= size.keys()
        fits = {
            "square": resizes and exact and (not crops or crop == size),
            "pad": crops or resizes,
            "crop": crops,
        }
        if self.layout not in fits:
            raise ConfigError(f"layout must be one of {sorted(fits)}, got {self.layout!r}")
        if not fits[self.layout] or (resizes and not known) or (crops and not {"height", "width"} <= crop.keys()):
            raise ConfigError(
                f"image processor {type(self.processor).__name__} with size={size}, do_resize={resizes}, do_center_crop="
                f"{crops}, crop_size={crop} in preprocessor_config.json does not give a fixed size in layout "
                f"{self.layout!r}; 'square' needs height and width, 'crop' a centre crop, 'pad' either; a size is "
                "height and width, shortest_edge with or without longest_edge, or max_height and max_width"
            )
        padded = plain_size(self.processor, getattr(self.processor, "pad_size", None), "pad_size")
        pads = getattr(self.processor, "do_pad", None) and not hasattr(self.processor, "pad_to_square")
        if pads and padded and padded != (crop if crops else size) and _takes(self.processor, "pad_size"):
            raise unusable_settings(
                self.processor, f"do_pad with pad_size={padded} would put a border around each picture"
            )
        check_settings(self)

    @classmethod
    def from_processor(cls, processor: Any, grid: tuple[int, int], *, patch_size: int | None = None) -> "ImageEncoder":
        """Read the layout off a processor's settings.

        Note that original LLaVA-1.5 and MobileVLM checkpoints store a CLIP processor with a centre
        crop and pad in their own code: pass ``layout="pad"`` yourself for those.
        """
        settings = processor.to_dict()
        layout: Layout = "square"
        # Only LLaVA's processor means "to a square" by do_pad; others pad a batch to one size.
        if settings.get("do_pad") and hasattr(processor, "pad_to_square"):
            layout = "pad"
        elif settings.get("do_center_crop") and _takes(processor, "do_center_crop"):
            size, crop = (plain_size(processor, settings.get(name), name) for name in ("size", "crop_size"))
            layout = "square" if size == crop and settings.get("do_resize") else "crop"
        return cls(processor=processor, layout=layout, grid=grid, patch_size=patch_size)

    def with_grid(self, grid: tuple[int, int]) -> "ImageEncoder":
        """The same pixels seen through another number of visual tokens."""
        return replace(self, grid=grid)

    @property
    def token_count(self) -> int:
        """Visual tokens per image."""
        return self.grid[0] * self.grid[1] - self.drops_first

    @property
    def least_token_count(self) -> int:
        """Visual tokens per image."""
        return self.token_count

    def attention_grid(self) -> tuple[int, int]:
        """What `pooled_grid` makes of the encoder's own grid."""
        return pooled_grid(*self.grid)

    def to_dict(self) -> dict[str, Any]:
        """What decides pixels and boxes, as plain JSON for a fingerprint."""
        return {
            **({"drops_first": True} if self.drops_first else {}),  # absent in plans older than the setting
            "layout": self.layout,
            "grid": list(self.grid),
            "patch_size": self.patch_size,
            "processor": {key: plain_setting(self._settings[key]) for key in PIXEL_KEYS},
        }

    def __call__(self, image: PIL.Image.Image) -> EncodedImage:
        """Turn one RGB picture into model input.

        Returns:
            ``pixel_values`` f4 ``[1, 3, H, W]``, and one tile (without the first token: its first row, the rest).

        Raises:
            SampleError: The sides differ so much that the intermediate picture would not fit in memory.
        """
        (canvas_w, canvas_h), (resized_w, resized_h), (out_w, out_h) = self._sizes(*image.size)
        if max(canvas_w * canvas_h, resized_w * resized_h) > MAX_PIXELS:
            raise SampleError(
                f"an image of {image.size[0]} x {image.size[1]} pixels would become "
                f"{max(canvas_w, resized_w)} x {max(canvas_h, resized_h)} in layout {self.layout!r}, "
                f"more than the {MAX_PIXELS} pixels allowed; crop it first"
            )
        size = image.size
        if (canvas_w, canvas_h) != size:
            image = paste_on_square(image, canvas_w, self._settings["image_mean"])
        values = prepare_picture(self.processor, image, do_pad=False)["pixel_values"][0]
        pixels = np.ascontiguousarray(values, dtype=np.float32)
        if pixels.shape != (3, out_h, out_w):
            raise SampleError(
                f"image processor {type(self.processor).__name__} gave {pixels.shape}, expected "
                f"(3, {out_h}, {out_w}) from its settings; layout {self.layout!r} does not describe it"
            )
        return EncodedImage(inputs={"pixel_values": pixels[None]}, tiles=self._tiles(self._region(size)))

    def _tiles(self, region: tuple[float, float, float, float]) -> tuple[Tile, ...]:
        (rows, cols), (x0, y0, x1, y1) = self.grid, region
        if not self.drops_first:
            return (Tile(rows=rows, cols=cols, region=region),)
        left, top = x0 + (x1 - x0) / cols, y0 + (y1 - y0) / rows
        first = (Tile(rows=1, cols=cols - 1, region=(left, y0, x1, top)),) if cols > 1 else ()
        return (*first, Tile(rows=rows - 1, cols=cols, region=(x0, top, x1, y1))) if rows > 1 else first

    @cached_property
    def _settings(self) -> dict[str, Any]:
        stored = self.processor.to_dict()
        return {key: stored.get(key) for key in PIXEL_KEYS}

    @cached_property
    def _size(self) -> dict[str, int]:
        return plain_size(self.processor, self._settings["size"], "size")

    @cached_property
    def _crop_size(self) -> dict[str, int]:
        return plain_size(self.processor, self._settings["crop_size"], "crop_size")

    @cached_property
    def _crops(self) -> bool:
        return bool(self._settings["do_center_crop"]) and _takes(self.processor, "do_center_crop")

    def _sizes(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(width, height) of the padded picture, after resizing, and after cropping."""
        canvas = (max(width, height),) * 2 if self.layout == "pad" else (width, height)
        resized = self._resized(*canvas) if self._settings["do_resize"] else canvas
        if not self._crops:
            return canvas, resized, resized
        return canvas, resized, (self._crop_size["width"], self._crop_size["height"])

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing, in the order in which the model library looks at the sizes it knows."""
        size = self._size
        if "shortest_edge" in size and "longest_edge" in size:
            found = get_size_with_aspect_ratio((height, width), size["shortest_edge"], size["longest_edge"])
        elif "shortest_edge" in size:
            # Integer arithmetic of the model library: the long edge is truncated, not rounded.
            edge = size["shortest_edge"]
            scaled = int(edge * max(width, height) / min(width, height))
            found = (scaled, edge) if width <= height else (edge, scaled)
        elif "max_height" in size:
            found = get_image_size_for_max_height_width((height, width), size["max_height"], size["max_width"])
        else:
            found = (size["height"], size["width"])
        return int(found[1]), int(found[0])

    def _region(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Part of the original picture that the visual tokens cover, in units of its sides."""
        canvas, resized, out = self._sizes(*size)
        low, high = [], []
        for axis in (0, 1):
            offset = (resized[axis] - out[axis]) // 2  # of the crop; negative where it adds a border
            covered = out[axis] // self.patch_size * self.patch_size if self.patch_size else out[axis]
            scale = canvas[axis] / resized[axis]  # pixels of the padded picture per resized pixel
            padding = (canvas[axis] - size[axis]) // 2
            low.append((offset * scale - padding) / size[axis])
            high.append(((offset + covered) * scale - padding) / size[axis])
        return (low[0], low[1], high[0], high[1])


def _takes(processor: Any, name: str) -> bool:
    """Whether a processor's class looks at a setting; some store those of others and leave them aside (Gemma 3)."""
    return name in signature(processor._preprocess).parameters


def plain_size(processor: Any, size: Any, name: str) -> dict[str, int]:
    """A processor's size as a plain dict without its unset entries.

    Raises:
        ConfigError: If it is none, or an entry is no whole number of at least 1.
    """
    try:
        return {key: whole_number(value) for key, value in dict(size or {}).items() if value is not None}
    except (TypeError, ValueError) as error:
        raise unusable_settings(processor, f"{name} is {size!r}, expected whole numbers of pixels by name") from error


def whole_number(value: Any) -> int:
    """A setting that counts something; `ValueError` if it is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 1:
        raise ValueError(f"expected a whole number of at least 1, got {value!r}")
    return int(value)


def _plain(size: Any) -> dict[str, int]:
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}


def plain_setting(value: Any) -> Any:
    """One setting of a processor as plain JSON."""
    if isinstance(value, tuple | list):
        return [plain_setting(item) if isinstance(item, tuple | list) else float(item) for item in value]
    if isinstance(value, bool | float | str) or value is None:
        return value
    if isinstance(value, int):  # an enum of resampling filters is an int too
        return int(value)
    return _plain(value)
