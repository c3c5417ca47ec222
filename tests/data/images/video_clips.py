"""Tiny clips whose frames say which they are: the frame's number painted as bits, white and black blocks."""

import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, BLOCK = 64, 32, 16  # eight blocks: numbers up to 255


def painted(number: int) -> np.ndarray:
    """RGB picture u1 ``[32, 64, 3]`` of a number below 256."""
    bits = np.array([(number >> place) & 1 for place in range(8)], np.uint8).reshape(2, 4) * 255
    return np.repeat(bits.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)[..., None], 3, axis=2)


def number_in(image) -> int:
    """The number that a picture of any size shows."""
    grey = np.asarray(image.convert("L").resize((4, 2), 4)) > 127  # 4: box filter
    return int(sum(int(bit) << place for place, bit in enumerate(grey.ravel())))


def make_clip(
    form: str = "mp4",
    codec: str = "libx264",
    *,
    count: int = 12,
    rate: Fraction | int = 10,
    stamps: list[int] | None = None,
    pixel_format: str = "yuv420p",
    gop: int = 4,
    b_frames: int = 2,
    picture=painted,
    sample_shape: Fraction | None = None,
    sound: bool = False,
    container_options: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """Encode frames 0 to ``count - 1`` at ``rate`` a second, or at ``stamps`` in units of ``1 / rate``."""
    with (
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name, "w", format=form, options=container_options or {}) as container,
    ):
        stream = container.add_stream(codec, rate=rate, options=options or {})
        first = picture(0)
        stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], pixel_format
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        stream.codec_context.thread_count = 1
        if sample_shape is not None:
            stream.codec_context.sample_aspect_ratio = sample_shape
        stream.codec_context.time_base = 1 / Fraction(rate)
        noise = container.add_stream("aac" if form != "webm" else "libopus", rate=48000) if sound else None
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = stamps[number] if stamps else number, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if noise is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
            silence.rate = 48000
            container.mux(noise.encode(silence))
            container.mux(noise.encode())
        container.close()
        return Path(file.name).read_bytes()
