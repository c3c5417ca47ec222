"""Models by their names on the hub: a folder, a name in the hub's cache, or a download."""

from pathlib import Path
from typing import NamedTuple

from vlm_distill_cache.common.errors import ModelError


class HubFolder(NamedTuple):
    """Where a model lies, and what it is called."""

    path: Path
    name: str
    revision: str | None


def model_folder(given: str, *, what: str) -> HubFolder:
    """Find a folder, or a name ``org/name[@revision]`` in the hub's cache or, unless offline, on the hub.

    Raises:
        ModelError: If it cannot be had; ``what`` it is for comes first.
    """
    if Path(given).is_dir():
        return HubFolder(Path(given), given, None)
    from huggingface_hub import snapshot_download

    name, _, revision = given.partition("@")
    try:
        path = snapshot_download(
            name, revision=revision or None, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model"]
        )
    except Exception as error:
        raise ModelError(
            f"{what}: {given!r} is no folder, is not in the hub's cache and cannot be downloaded; download it "
            f"(`hf download {name} --local-dir FOLDER`) and give the folder"
        ) from error
    return HubFolder(Path(path), name, Path(path).name)
