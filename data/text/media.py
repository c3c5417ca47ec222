"""A sample's pictures and videos: encoded one by one, put into its text, joined to one model input.

Dims: P pictures of a sample, frames of videos among them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import PIL.Image

from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels import image_hash
from vlm_distill_cache.data.images.byte_pixels import Held, ImageInputs, as_bytes, held_of, joined_as_held
from vlm_distill_cache.data.images.encoder import AnyImageEncoder, CountingEncoder, EncodedImage, VideoEncoder
from vlm_distill_cache.data.sample import Frame, FrameSampling, ImageSource, Medium, Sample, Turn, VideoSource
from vlm_distill_cache.data.text.chat import Marker, Rendered

PicturesBeyond = Literal["refuse", "drop"]


@dataclass(frozen=True)
class EncodedMedium:
    """A picture or a video, encoded.

    Attributes:
        markers: What stands for it in the text, one for each of `encoded`.
        encoded: The picture; or the video; or the pictures that its frames are.
        hashes: Of its pictures.
        times: Of a video, number and seconds of each frame.
    """

    markers: tuple[Marker, ...]
    encoded: tuple[EncodedImage, ...]
    hashes: tuple[bytes, ...]
    times: tuple[tuple[int, float], ...] = ()


class MediaSettings(Protocol):
    """What `SampleEncoder` says of pictures and videos."""

    @property
    def image_encoder(self) -> AnyImageEncoder:
        """Pixels and boxes."""

    @property
    def pixel_tables(self) -> Sequence[np.ndarray]:
        """What numbers the encoder makes of bytes (`byte_pixels.pixel_tables`)."""

    @property
    def image_token(self) -> str:
        """What a template writes for a picture."""

    @property
    def video_token(self) -> str:
        """What it writes for a video; empty: frames are pictures."""

    @property
    def sampling(self) -> FrameSampling | None:
        """Which frames of a video are read; None: videos are refused."""

    @property
    def most_pictures(self) -> int | None:
        """Pictures that a sample may have; None: any number."""

    @property
    def pictures_beyond(self) -> PicturesBeyond:
        """What becomes of more."""

    @property
    def visual_token_budget(self) -> int | None:
        """Visual tokens that a sample with videos is thinned to; None: it is not."""


def within_limits(settings: MediaSettings, sample: Sample) -> Sample:
    """The sample with as many of its pictures and videos as are taken, the first ones.

    Raises:
        SampleError: It has more, and they are not to be dropped; or a video would have to be one picture.
    """
    most, found = settings.most_pictures, len(sample.images)
    if most is None or (found <= most and not (sample.videos and most == 1 and _frames_are_pictures(settings))):
        return sample
    if settings.pictures_beyond == "refuse":
        if found <= most:
            raise SampleError(
                f"video {sample.images[0].name}: one picture a sample is taken, and its frames are pictures; leave the sample "
                "out, or choose a model that takes several (pictures_beyond=drop of stage two reads one frame)"
            )
        raise SampleError(
            f"{found} pictures, but at most {most} a sample {'is' if most == 1 else 'are'} taken (most_pictures, or what the "
            "model can take); leave the sample out, or choose a model that takes more (a student reads the first ones with "
            "pictures_beyond=drop)"
        )
    left, turns = most, []
    for turn in sample.placed():
        turns.append(replace(turn, places=turn.places[: max(0, left)]))
        left -= len(turn.places)
    if not any(turn.places for turn in sample.turns):
        turns = list(sample.turns)
    return replace(sample, images=sample.images[:most], turns=tuple(turns))


def _frames_are_pictures(settings: MediaSettings) -> bool:
    return not (settings.video_token and isinstance(settings.image_encoder, VideoEncoder))


def encode_media(settings: MediaSettings, media: Sequence[Medium]) -> list[EncodedMedium]:
    """Encode a sample's pictures and videos, these with as many frames as pictures and visual tokens are left.

    Raises:
        SampleError: Names the one that cannot be decoded, that the encoder refuses, or that is a video and those are not read;
            or more than ``visual_token_budget`` is left with one frame of each video.
    """
    frames = {n: _read_frames(settings, medium) for n, medium in enumerate(media) if isinstance(medium, VideoSource)}
    counted = _frames_are_pictures(settings)
    if frames and counted and settings.most_pictures is not None:
        each = max(1, (settings.most_pictures - len(media) + len(frames)) // len(frames))
        frames = {n: uniform_frames(found, each) for n, found in frames.items()}
    budget, share = settings.visual_token_budget, 1.0
    while True:
        kept = {n: uniform_frames(found, max(1, int(len(found) * share))) for n, found in frames.items()}
        pictures = len(media) - len(kept) + (sum(map(len, kept.values())) if counted else 0)
        encoded = [
            _encode_video(settings, medium, kept[n], n, pictures)
            if isinstance(medium, VideoSource)
            else _encode_picture(settings, medium, pictures)
            for n, medium in enumerate(media)
        ]
        total = visual_tokens(encoded)
        if budget is None or total <= budget or all(len(found) == 1 for found in kept.values()):
            return [_as_bytes(medium, settings.pixel_tables) for medium in _within_budget(settings, encoded)]
        # Frames have about as many tokens each; where that leaves all of them, one frame less.
        of_stills = visual_tokens([found for n, found in enumerate(encoded) if n not in kept])
        fits = (budget - of_stills) / max(1, total - of_stills)
        share *= max(0.0, min(fits, 1 - 1 / max(map(len, kept.values()))))


def _as_bytes(medium: EncodedMedium, tables: Sequence[np.ndarray]) -> EncodedMedium:
    """A picture or video whose pixels are held as bytes, where they can be."""

    def held(image: EncodedImage) -> ImageInputs:
        tried = {name: as_bytes(array, tables) for name, array in image.inputs.items()}
        return ImageInputs({name: image.inputs[name] if found is None else found for name, found in tried.items()})

    return replace(medium, encoded=tuple(replace(image, inputs=held(image)) for image in medium.encoded))


def _within_budget(settings: MediaSettings, media: list[EncodedMedium]) -> list[EncodedMedium]:
    budget, total = settings.visual_token_budget, visual_tokens(media)
    if budget is not None and total > budget:
        raise SampleError(
            f"{total} visual tokens exceed visual_token_budget={budget}, one frame of each video being kept; raise it, or leave "
            "the sample out"
        )
    return media


def visual_tokens(media: Sequence[EncodedMedium]) -> int:
    """Of pictures and videos together."""
    return sum(token_count(image) for medium in media for image in medium.encoded)


def uniform_frames(frames: Sequence[Frame], most: int) -> Sequence[Frame]:
    """So many of a video's frames, the middles of equal parts of them; all where there are no more."""
    if len(frames) <= most:
        return frames
    return [frames[int((place + 0.5) * len(frames) / most)] for place in range(most)]


def _encoder_among(encoder: AnyImageEncoder, pictures: int) -> Callable[[PIL.Image.Image], EncodedImage]:
    return encoder.among(pictures) if isinstance(encoder, CountingEncoder) else encoder


def _encode_picture(settings: MediaSettings, medium: ImageSource, pictures: int) -> EncodedMedium:
    picture = medium.load()
    try:
        encoded = _encoder_among(settings.image_encoder, pictures)(picture)
    except SampleError as error:
        raise SampleError(f"image {medium.name}: {error}") from error
    return EncodedMedium((Marker(settings.image_token),), (encoded,), (image_hash(picture),))


def _read_frames(settings: MediaSettings, video: VideoSource) -> Sequence[Frame]:
    if settings.sampling is None:
        raise SampleError(
            f"video {video.name}: videos are not read; set frames.fps and frames.most of stage one, or leave the sample out"
        )
    return video.frames(settings.sampling)


def _encode_video(
    settings: MediaSettings, video: VideoSource, frames: Sequence[Frame], number: int, pictures: int
) -> EncodedMedium:
    encoder = settings.image_encoder
    try:
        if settings.video_token and isinstance(encoder, VideoEncoder):
            encoded: tuple[EncodedImage, ...] = (encoder.video(frames),)
            markers: tuple[Marker, ...] = (Marker(settings.video_token, "video"),)
        else:
            encode = _encoder_among(encoder, pictures)
            encoded = tuple(
                replace(one, tiles=tuple(replace(tile, is_frame=True) for tile in one.tiles))
                for one in (encode(frame.image) for frame in frames)
            )
            markers = (Marker(settings.image_token),) * len(frames)
    except SampleError as error:
        raise SampleError(f"video {video.name}: {error}") from error
    hashes = tuple(image_hash(frame.image) for frame in frames)
    return EncodedMedium(markers, encoded, hashes, tuple((number, frame.time) for frame in frames))


def open_out(rendered: Rendered, markers: Sequence[Marker], written: Sequence[EncodedImage]) -> Rendered:
    """Replace markers by what the image encoder writes; answers move with the text in front of them."""
    moves: list[tuple[int, int]] = []  # where a marker ended, and by how much the text grew there
    text, past = "", 0
    for marker, image in zip(markers, written, strict=True):
        at = rendered.text.index(marker.text, past)
        text += rendered.text[past:at] + (marker.text if image.text is None else image.text)
        past = at + len(marker.text)
        moves.append((past, len(text) - past))
    if not moves:
        return rendered

    def moved(place: int) -> int:
        return place + next((by for end, by in reversed(moves) if end <= place), 0)

    return Rendered(
        text=text + rendered.text[past:],
        answer_spans=tuple((moved(start), moved(end)) for start, end in rendered.answer_spans),
    )


def join_pieces(
    parts: Sequence[str], pieces: Iterator[tuple[np.ndarray, np.ndarray]], marker: str, token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and offsets of a text from those of its parts, a marker's token between them.

    Args:
        parts: The text, split at the marker.
        pieces: Yields ids i8 ``[n]`` and offsets i8 ``[n, 2]`` of each part.
    """
    ids, offsets, at = [], [], 0
    for number, part in enumerate(parts):
        if number:
            ids.append(np.array([token_id]))
            offsets.append(np.array([[at, at + len(marker)]]))
            at += len(marker)
        found = next(pieces)
        ids.append(found[0])
        offsets.append(found[1] + at)
        at += len(part)
    return np.concatenate(ids), np.concatenate(offsets)


def token_count(image: EncodedImage) -> int:
    """Visual tokens of a picture or video."""
    return sum(tile.token_count for tile in image.tiles)


def with_frames(turns: tuple[Turn, ...], media: Sequence[EncodedMedium]) -> tuple[Turn, ...]:
    """Turns whose places name each medium as often as it has markers."""
    if all(len(medium.markers) == 1 for medium in media):
        return turns
    left = iter(media)
    return tuple(
        replace(turn, places=tuple(place for place in turn.places for _ in next(left).markers)) for turn in turns
    )


def first_media(settings: MediaSettings, media: Sequence[EncodedMedium], count: int) -> Sequence[EncodedMedium]:
    """What is left of a sample's pictures and videos where its sequence is cut behind so many of them.

    Raises:
        SampleError: That is one picture, which the encoder reads otherwise alone than among others.
    """
    before, left = (sum(len(medium.encoded) for medium in some) for some in (media, media[:count]))
    encoder = settings.image_encoder
    if left == 1 < before and isinstance(encoder, CountingEncoder) and encoder.among(2) != encoder.among(1):
        raise SampleError(
            f"it is cut behind the first of its {before} pictures, which this model reads otherwise alone than among others; "
            "raise max_length, or leave the sample out"
        )
    return media[:count]


def joined_media(media: Sequence[EncodedMedium]) -> dict[str, Any]:
    """The fields of an `EncodedSample` that say what its pictures are."""
    hashes = tuple(digest for medium in media for digest in medium.hashes)
    times = [time for medium in media for time in medium.times or [(-1, float("nan"))] * len(medium.hashes)]
    inputs: dict[str, list[Held]] = {}
    tiles: list[Tile] = []
    for image in (image for medium in media for image in medium.encoded):
        behind = max((tile.span[1] for tile in tiles), default=0.0)
        tiles += [replace(tile, span=(tile.span[0] + behind, tile.span[1] + behind)) for tile in image.tiles]
        for name, array in held_of(image.inputs).items():
            inputs.setdefault(name, []).append(array)
    for name, arrays in inputs.items():
        if len({array.shape[1:] for array in arrays}) > 1:
            raise SampleError(
                f"its pictures differ in size ({name}: {[array.shape[1:] for array in arrays[:4]]}), which this model cannot "
                "take in one sample; leave the sample out"
            )
    return {
        "image_inputs": ImageInputs({name: joined_as_held(arrays) for name, arrays in inputs.items()}),
        "tiles": tuple(tiles),
        "image_hashes": hashes,
        "frame_times": tuple(times) if any(medium.times for medium in media) else (),
    }
