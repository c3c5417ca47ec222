"""What a video may ask for, whatever it is decoded by."""

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels.rgb import MAX_PIXELS
from vlm_distill_cache.data.sample import Frame

MAX_HELD = 16 * MAX_PIXELS  # of all frames that are read: 4 GiB of RGB


def check_size(width: int, height: int, name: str) -> None:
    """Refuse a frame of too many pixels with a `SampleError`."""
    if width * height > MAX_PIXELS:
        raise SampleError(
            f"video {name} has {width} x {height} pixels, more than the {MAX_PIXELS} allowed; scale it down first"
        )


def check_held(count: int, width: int, height: int, name: str) -> None:
    """Refuse frames that would not fit into memory together with a `SampleError`."""
    if count * width * height > MAX_HELD:
        raise SampleError(
            f"video {name}: {count} frames of {width} x {height} pixels are more than {MAX_HELD} pixels in all; read fewer "
            "of them (frames.most), or scale it down"
        )


def same_size(frames: list[Frame], name: str) -> list[Frame]:
    """Return ``frames`` if they are of one size; `SampleError` if not."""
    sizes = sorted({frame.image.size for frame in frames})
    if len(sizes) > 1:
        raise SampleError(f"video {name} has frames of {len(sizes)} sizes: {sizes[:3]}; scale them to one size first")
    return frames
