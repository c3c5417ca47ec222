"""Recorded attention of a model whose layers lie on several devices."""

import torch

from vlm_distill_cache.common.attention.capture import AttentionMaps, AttentionRequest


def test_maps_meet_on_the_last_device_so_that_none_waits_for_what_comes_behind_it():
    """A device without values stands for the second one."""
    positions = torch.zeros(1, 2, dtype=torch.int64)
    maps = AttentionMaps({"gaze": AttentionRequest(positions, positions, groups=((0, 1), (0,)))})
    maps.add("gaze", 0, torch.ones(1, 2, 2))
    maps.add("gaze", 1, torch.ones(1, 2, 2, device="meta"))
    assert (maps["gaze"].device.type, maps["gaze"].shape) == ("meta", (1, 2, 2, 2))
