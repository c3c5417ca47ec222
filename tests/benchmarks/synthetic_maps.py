"""Visual maps shaped like a large model's, for sizes that no model on two cores reaches.

Each of nine layers has 16 heads; a head's scores add what real heads are seen to add: content (queries and keys are
linear in features that vary smoothly over the picture), nearness (per head, from sharp to none), a few keys that
attract every query (shared by all heads of a layer, and in part by neighbouring layers), noise, and a token in front
of the picture that takes about half of the mass. Softmax over the causal past, mean over heads and over a sliding
window of three layers: seven groups, as published.
"""

import torch
from torch import Tensor

LAYERS, HEADS, WINDOW, FEATURES = 9, 16, 3, 12


def synthetic_map(side: int, *, seed: int, model_seed: int = 12345) -> Tensor:
    """One picture's maps.

    Args:
        side: Tokens a side; 24 gives N = 576, 27 gives 729.
        seed: Of the picture.
        model_seed: Of the model: what its heads look for.

    Returns:
        float32 `[7, N, N]`, causal.
    """
    tokens = side * side
    picture = torch.Generator().manual_seed(seed)
    model = torch.Generator().manual_seed(model_seed)
    features = _smooth_features(side, picture)  # [N, F]
    where = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1)
    where = where.reshape(-1, 2).float()
    distance = torch.cdist(where, where)  # [N, N], tokens
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    lasting = _sinks(tokens, picture)
    layers = []
    for _ in range(LAYERS):
        sinks = 0.7 * lasting + 0.3 * _sinks(tokens, picture)
        total = torch.zeros(tokens, tokens)
        for _ in range(HEADS):
            query, key = (torch.randn(FEATURES, 24, generator=model) for _ in range(2))
            content = (features @ query) @ (features @ key).T / (24**0.5 * FEATURES) * 2.0
            reach = float(torch.empty(1).exponential_(0.1, generator=model)) + 3.0
            noise = 0.3 * torch.randn(tokens, tokens, generator=picture)
            scores = content + sinks - distance / reach + noise
            scores.masked_fill_(future, -torch.inf)
            before = scores.logsumexp(-1, keepdim=True).mean() + torch.randn(1, 1, generator=picture)
            total += torch.cat([before.expand(tokens, 1), scores], dim=1).softmax(-1)[:, 1:]
        layers.append(total / HEADS)
    return torch.stack([torch.stack(layers[i : i + WINDOW]).mean(0) for i in range(LAYERS - WINDOW + 1)])


def _smooth_features(side: int, generator: torch.Generator) -> Tensor:
    """Unit-variance features `[N, F]` that vary over a few tokens, with two dozen edges like objects have."""
    coarse = torch.randn(1, FEATURES, side // 4 + 2, side // 4 + 2, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    fine = 0.4 * torch.randn(1, FEATURES, side, side, generator=generator)
    features = (smooth + fine)[0].flatten(1).T
    return (features - features.mean(0)) / features.std(0)


def _sinks(tokens: int, generator: torch.Generator) -> Tensor:
    """Score of each key whatever the query `[N]`: mostly even, a few per cent far above."""
    chosen = torch.rand(tokens, generator=generator) < 0.02
    return 0.25 * torch.randn(tokens, generator=generator) + chosen * (
        1.0 + 2.0 * torch.rand(tokens, generator=generator)
    )
