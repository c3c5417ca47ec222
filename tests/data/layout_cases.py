"""One small image encoder per layout, and what each visual token's own pixels look like: read off the arrays.

`token_colours` goes the model library's way from pixels to tokens: patches in the order of the tower, merged as the
projector merges them, joined and cut by the model's own `pack_image_features`.
"""

from types import SimpleNamespace

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.images.layouts.any_resolution import AnyResolutionEncoder
from vlm_distill_cache.data.images.layouts.dynamic import DynamicEncoder
from vlm_distill_cache.data.images.layouts.framed import FramedEncoder
from vlm_distill_cache.data.images.layouts.split import SplitEncoder
from vlm_distill_cache.data.images.layouts.thumbnail import ThumbnailEncoder

ROW_COL = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
NEXT_PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]


def square(side):
    return {"height": side, "width": side}


def one_vision(side, most):
    processor = transformers.LlavaOnevisionImageProcessorPil(
        size=square(side),
        image_grid_pinpoints=[[side * i, side * j] for i in range(1, 5) for j in range(1, 5)],
    )
    return AnyResolutionEncoder(processor=processor, patch_size=4, most_tiles=most)


def framed():
    processor = transformers.Gemma3ImageProcessorPil(size=square(32))
    return FramedEncoder(
        fixed=ImageEncoder.from_processor(processor, (4, 4)),
        image_token="<image_soft_token>",
        before="\n\n<start_of_image>",
        after="<end_of_image>\n\n",
        marker="<start_of_image>",
    )


def _cases():
    clip = transformers.CLIPImageProcessorPil(size=square(32), crop_size=square(32), do_center_crop=False)
    crop = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square(32))
    siglip = transformers.SiglipImageProcessorPil(size=square(34))
    tiles = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
    qwen = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 16 * 64, "longest_edge": 64 * 64}, patch_size=4)
    qwen3 = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 8 * 64, "longest_edge": 128 * 64},
        patch_size=4,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    near = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_size=square(24), image_grid_pinpoints=NEXT_PINPOINTS
    )
    return {
        "square": ImageEncoder.from_processor(clip, (8, 8)),
        "pad": ImageEncoder(processor=clip, layout="pad", grid=(8, 8)),
        "crop": ImageEncoder.from_processor(crop, (8, 8)),
        "uneven": ImageEncoder.from_processor(siglip, (8, 8), patch_size=4),
        "first dropped": ImageEncoder(processor=siglip, layout="square", grid=(8, 8), patch_size=4, drops_first=True),
        "framed": framed(),
        "llava-next": AnyResolutionEncoder(processor=near, patch_size=4),
        "onevision": one_vision(24, 9),
        "onevision, shrunk": one_vision(24, 3),
        "onevision, uneven": one_vision(26, 4),
        "idefics3": SplitEncoder(processor=Idefics3ImageProcessorPil(**tiles), grid=(4, 4), patch_size=4),
        "smolvlm": SplitEncoder(processor=SmolVLMImageProcessorPil(**tiles), grid=(2, 2), patch_size=4),
        "unsplit": SplitEncoder(
            processor=SmolVLMImageProcessorPil(**tiles, do_image_splitting=False),
            grid=(4, 4),
            patch_size=4,
        ),
        "internvl": ThumbnailEncoder(
            processor=transformers.GotOcr2ImageProcessorPil(size=square(32), max_patches=6), grid=(4, 4)
        ),
        "qwen": DynamicEncoder(processor=qwen),
        "qwen3": DynamicEncoder(processor=qwen3),
    }


CASES = _cases()


def pack(encoder, features, size):
    """The model's own packing of tile features ``[tiles, patches, D]``: ``[N, D]``; newlines are NaN."""
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=encoder.side, patch_size=encoder.patch_size),
        image_grid_pinpoints=[list(pair) for pair in encoder.processor.image_grid_pinpoints],
    )
    newline = torch.full(features.shape[-1:], torch.nan)
    if encoder.most_tiles is None:
        packed, _ = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=config), [features], torch.tensor([size]), "default", image_newline=newline
        )
    else:
        packed, _ = LlavaOnevisionModel.pack_image_features(
            SimpleNamespace(config=config),
            [features],
            torch.tensor([size]),
            image_newline=newline,
            vision_aspect_ratio=f"anyres_max_{encoder.most_tiles}",
        )
    return packed[0]


def token_colours(encoder, encoded):
    """Mean colour of each visual token's own pixels, float ``[N, 3]`` in 0..1; NaN for newline tokens."""
    pixels = torch.from_numpy(encoded.inputs["pixel_values"])
    if isinstance(encoder, DynamicEncoder):
        merged = encoder.processor.merge_size**2
        means = pixels.view(len(pixels) // merged, merged, 3, -1).mean(dim=(1, 3))
    elif isinstance(encoder, AnyResolutionEncoder):
        (size,) = encoded.inputs["image_sizes"].tolist()
        means = pack(encoder, _patch_means(pixels, encoder.base_grid, encoder.patch_size), size)
    else:
        fixed = getattr(encoder, "fixed", encoder)
        covered = pixels.shape[-1] if not getattr(fixed, "patch_size", None) else None
        edge = covered // fixed.grid[0] if covered else _edge(fixed, pixels.shape[-1])
        means = _patch_means(pixels, fixed.grid, edge).flatten(0, 1)[int(getattr(fixed, "drops_first", 0)) :]
    processor = encoder.processor
    return (means * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)).numpy()


def _edge(encoder, side):
    """Pixels per visual token where patches may not fill a tile."""
    return side // encoder.patch_size * encoder.patch_size // encoder.grid[0]


def _patch_means(pixels, grid, edge):
    """Mean of each token's square of pixels ``[tiles, rows * cols, 3]``."""
    rows, cols = grid
    inside = pixels[:, :, : rows * edge, : cols * edge]
    return inside.reshape(len(pixels), 3, rows, edge, cols, edge).mean(dim=(3, 5)).flatten(2).transpose(1, 2)


def byte_tokenizer(specials, **special_roles):
    """One token a byte, and the given special tokens."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_roles)


def gradient(width, height):
    """Red grows from left to right, green from top to bottom: a colour says where it comes from."""
    import PIL.Image

    red = np.round((np.arange(width) + 0.5) / width * 255)
    green = np.round((np.arange(height) + 0.5) / height * 255)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = red[None, :], green[:, None]
    return PIL.Image.fromarray(pixels)
