"""MobileVLM's first projector (LDP): the mlp, then two inverted-residual blocks, the second of stride 2.

Attribute names repeat the published checkpoint's keys (``model.mlp.1``, ``model.mb_block.1.block.0.0``). The
published blocks are torchvision's MobileNetV3 blocks with timm's channel LayerNorm; both libraries are no
dependency, so the few layers stand here.

Dims: M images, N patches, D_v tower width, D language-model width, rows x cols = N.
"""

import math

from torch import Tensor, nn

_SQUEEZE = 4  # channels of the squeeze-excite bottleneck: a quarter, in steps of 8


def half_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid after 2x2 pooling or stride 2, an odd side rounded up: (24, 24) -> (12, 12), (27, 27) -> (14, 14)."""
    return math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image ``[M, D, rows, cols]``."""

    def forward(self, plane: Tensor) -> Tensor:
        """Normalise each position's channels, float ``[M, D, rows, cols]``."""
        return super().forward(plane.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Scale each channel by hard-sigmoid(W2 relu(W1 mean)), the mean taken over the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow = squeeze_width(width)
        self.fc1 = nn.Conv2d(width, narrow, kernel_size=1)
        self.fc2 = nn.Conv2d(narrow, width, kernel_size=1)

    def forward(self, plane: Tensor) -> Tensor:
        """Rescale the channels of float ``[M, D, rows, cols]``."""
        mean = plane.mean((2, 3), keepdim=True)  # [M, D, 1, 1]
        scale: Tensor = nn.functional.hardsigmoid(self.fc2(nn.functional.relu(self.fc1(mean))))
        return plane * scale


def squeeze_width(width: int) -> int:
    """A quarter of the channels, rounded to a multiple of 8 that is at most 10 % smaller."""
    wanted = width // _SQUEEZE
    rounded = max(8, (wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class InvertedResidual(nn.Module):
    """Depthwise 3x3 convolution, squeeze-excite, 1x1 convolution; with a residual where the stride is 1."""

    def __init__(self, width: int, *, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
        pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, ChannelNorm(width), nn.Hardswish()),
            SqueezeExcite(width),
            nn.Sequential(pointwise, ChannelNorm(width)),
        )
        self.adds_input = stride == 1

    def forward(self, plane: Tensor) -> Tensor:
        """Mix float ``[M, D, rows, cols]``; rows and cols are halved, rounded up, at stride 2."""
        mixed: Tensor = self.block(plane)
        return plane + mixed if self.adds_input else mixed


class _LDPBlock(nn.Module):
    """The layers under their published names; index 0 of both lists is an identity there."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Identity(),
            nn.Linear(in_features, out_features),
            nn.GELU(),
            nn.Linear(out_features, out_features),
        )
        self.mb_block = nn.Sequential(
            nn.Identity(),
            InvertedResidual(out_features, stride=1),
            InvertedResidual(out_features, stride=2),
        )


class LDPProjector(nn.Module):
    """MobileVLM V1's lightweight downsample projector, which quarters the tokens.

    Args:
        in_features: Width of the vision tower's features.
        out_features: Width of the language model.
        grid: Rows and columns of patches.

    Source:
        MobileVLM (arXiv:2312.16886), section 3.4 and figure 2.
    """

    def __init__(self, *, in_features: int, out_features: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.in_grid = grid
        self.out_grid = half_grid(grid)
        self.model = _LDPBlock(in_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Project float ``[M, N, D_v]`` to ``[M, out rows * out cols, D]``."""
        tokens = self.model.mlp(features)  # [M, N, D]
        images, _, width = tokens.shape
        plane = tokens.transpose(1, 2).reshape(images, width, *self.in_grid)  # [M, D, rows, cols]
        mixed: Tensor = self.model.mb_block(plane)
        return mixed.flatten(2).transpose(1, 2)
