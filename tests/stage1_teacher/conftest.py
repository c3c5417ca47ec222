"""Caches of tiny teachers, one a family, each built once."""

from functools import cache
from pathlib import Path

import pytest
from family_caches import build, write_data
from tiny_families import save_tiny


@pytest.fixture(scope="session")
def family_data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def family_cache(tmp_path_factory, family_data: Path):
    """From a family's name to a cache with every signal that it can give."""

    @cache
    def built(name: str):
        folder = tmp_path_factory.mktemp(name)
        signals = ["logits", "answer_attention", "text_attention", "visual_columns"]
        if name != "gemma3" and not name.startswith("paligemma"):
            signals.append("visual_map")
        return build(
            save_tiny(name, folder / "teacher"), family_data, folder / "cache", signals=tuple(signals)
        )

    return built
