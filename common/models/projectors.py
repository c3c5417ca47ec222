"""Projectors: from a vision tower's patch features to the language model's visual tokens.

Four types, chosen by name in the student's configuration:

- ``ldpnet``: MobileVLM V1's own. Quarters the tokens (24x24 -> 12x12).
- ``ldpnetv2``: MobileVLM V2's own. Quarters the tokens (24x24 -> 12x12), 99 % of its weights are the two
  linear layers. Attribute names repeat the published checkpoint's keys (``mlp.mlp.0``, ``peg.peg.0``).
- ``mlp``: two linear layers, as many tokens as patches; for students that keep the teacher's grid.
- ``taf``: the teacher's projector, frozen, then one trainable linear layer (the post-projector).

Dims: M images, N patches, D_v tower width, D language-model width, rows x cols = N.
"""

import math

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vlm_distill_cache.common.errors import ModelError

_SQUEEZE = 4  # channels of the squeeze-excite bottleneck: a quarter, in steps of 8


def half_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid after 2x2 pooling or stride 2, an odd side rounded up: (24, 24) -> (12, 12), (27, 27) -> (14, 14)."""
    return math.ceil(grid[0] / 2), math.ceil(grid[1] / 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image ``[M, D, rows, cols]``."""

    def forward(self, plane: Tensor) -> Tensor:
        """Normalise each position's channels."""
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
        return _as_tokens(self.model.mb_block(_as_plane(self.model.mlp(features), self.in_grid)))


def _as_plane(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Row-major tokens ``[M, rows * cols, D]`` as a picture ``[M, D, rows, cols]``."""
    images, _, width = tokens.shape
    return tokens.transpose(1, 2).reshape(images, width, *grid)


def _as_tokens(plane: Tensor) -> Tensor:
    return plane.flatten(2).transpose(1, 2)


def pool_grid(tokens: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Average-pool tokens ``[M, rows * cols, D]`` of a row-major grid to a smaller one, ``[M, target cells, D]``."""
    return _as_tokens(nn.functional.adaptive_avg_pool2d(_as_plane(tokens, grid), target))


class _PointwiseMlp(nn.Module):
    """Linear, exact GELU, linear, under the published name ``mlp``: ``[M, N, D_v]`` to ``[M, N, D]``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))

    def forward(self, features: Tensor) -> Tensor:
        """Project the features."""
        projected: Tensor = self.mlp(features)
        return projected


class _PositionConv(nn.Module):
    """Residual depthwise 3x3 convolution: the only place where LDPv2 learns positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Add the convolution of float ``[M, rows * cols, D]`` seen as a grid to itself."""
        plane = _as_plane(tokens, grid)
        return _as_tokens(plane + self.peg(plane))


class LDPv2Projector(nn.Module):
    """MobileVLM V2's lightweight downsample projector: mlp, 2x2 average pool, x + depthwise conv(x).

    Source:
        MobileVLM V2 (arXiv:2402.03766), section 3.3. The published code pools to a fixed 12x12; here to
        half of each side, which is the same at 24x24.
    """

    def __init__(self, *, in_features: int, out_features: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.in_grid = grid
        self.out_grid = half_grid(grid)
        self.mlp = _PointwiseMlp(in_features, out_features)
        self.peg = _PositionConv(out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Project float ``[M, N, D_v]`` to ``[M, out rows * out cols, D]``."""
        return self.peg(pool_grid(self.mlp(features), self.in_grid, self.out_grid), self.out_grid)  # type: ignore[no-any-return]


class MlpProjector(nn.Sequential):
    """LLaVA-1.5's projector, keys ``0`` and ``2``: as many tokens as patches."""

    def __init__(self, *, in_features: int, out_features: int, grid: tuple[int, int]) -> None:
        super().__init__(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))
        self.out_grid = grid


class TeacherProjector(nn.Module):
    """The teacher's projector P_t as a LLaVA checkpoint holds it: ``linear_1``, activation, ``linear_2``."""

    def __init__(
        self, *, in_features: int, hidden_features: int, out_features: int, act: str, bias: bool = True
    ) -> None:
        super().__init__()
        if act not in ACT2FN:
            raise ModelError(
                f"teacher projector: unknown activation {act!r}; transformers knows {sorted(ACT2FN)}. "
                "Export the projector again from the teacher's own config (`projector_hidden_act`)."
            )
        self.linear_1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = ACT2FN[act]
        self.linear_2 = nn.Linear(hidden_features, out_features, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Project float ``[M, N, D_v]`` to the teacher's width ``[M, N, D_t]``."""
        projected: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return projected


class TeacherAdapter(nn.Module):
    """TAF: x = P_s(P_t(z)), with the teacher's projector P_t frozen and one linear post-projector P_s.

    P_t runs without a graph: nothing below it is ever trained, so its activations need not be kept.

    Args:
        out_features: Width of the student's language model.
        grid: Rows and columns of patches.
        pool: Average-pool P_t's output 2x2 before P_s, for a student with a quarter of the tokens. The
            trial found it harmful (docs/method.md, section 4), so it is off unless asked for.

    Source:
        CompoDistill (arXiv:2510.12184), section 3.3; the pooling is ours.
    """

    def __init__(self, *, teacher: TeacherProjector, out_features: int, grid: tuple[int, int], pool: bool) -> None:
        super().__init__()
        self.in_grid = grid
        self.out_grid = half_grid(grid) if pool else grid
        self.teacher = teacher
        self.post = nn.Linear(teacher.linear_2.out_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Project float ``[M, N, D_v]`` to ``[M, out rows * out cols, D]``."""
        with torch.no_grad():
            tokens = self.teacher(features)
            if self.out_grid != self.in_grid:
                tokens = pool_grid(tokens, self.in_grid, self.out_grid)
        projected: Tensor = self.post(tokens)
        return projected


Projector = LDPProjector | LDPv2Projector | MlpProjector | TeacherAdapter
PROJECTORS: dict[str, type[LDPProjector | LDPv2Projector | MlpProjector]] = {
    "ldpnet": LDPProjector,
    "ldpnetv2": LDPv2Projector,
    "mlp": MlpProjector,
}
PROJECTOR_TYPES = (*PROJECTORS, "taf")


def build_projector(
    projector_type: str,
    *,
    in_features: int,
    out_features: int,
    grid: tuple[int, int],
    teacher_projector: dict[str, int | str] | None = None,
    pool_teacher_tokens: bool = False,
) -> Projector:
    """Make the projector of a type, one of ``PROJECTOR_TYPES``, with random weights.

    Args:
        projector_type: As named in a student's configuration.
        in_features: Width of the vision tower's features.
        out_features: Width of the language model.
        grid: Rows and columns of patches.
        teacher_projector: For ``taf``: ``{"act", "in", "hidden", "out"}``, and ``"bias"`` if False, of the cache's projector.json.
        pool_teacher_tokens: For ``taf``: pool the teacher's tokens 2x2 first.

    Raises:
        ModelError: If the type is unknown, or ``taf`` lacks a teacher's projector or does not fit the tower.
    """
    if projector_type in PROJECTORS:
        return PROJECTORS[projector_type](in_features=in_features, out_features=out_features, grid=grid)
    if projector_type != "taf":
        raise ModelError(f"projector_type: got {projector_type!r}; choose one of {', '.join(PROJECTOR_TYPES)}")
    if teacher_projector is None:
        raise ModelError(
            "projector_type 'taf' needs the teacher's projector, and the configuration holds none; "
            "use a cache with projector.json and projector.safetensors, or projector_type 'ldpnetv2'"
        )
    if int(teacher_projector["in"]) != in_features:
        raise ModelError(
            f"projector_type 'taf': the teacher's projector reads width {teacher_projector['in']}, "
            f"this vision tower gives {in_features}. TAF needs the teacher's own vision tower: take the "
            "cache's, or use projector_type 'ldpnetv2'."
        )
    teacher = TeacherProjector(
        in_features=in_features,
        hidden_features=int(teacher_projector["hidden"]),
        out_features=int(teacher_projector["out"]),
        act=str(teacher_projector["act"]),
        bias=bool(teacher_projector.get("bias", True)),
    )
    return TeacherAdapter(teacher=teacher, out_features=out_features, grid=grid, pool=pool_teacher_tokens)
