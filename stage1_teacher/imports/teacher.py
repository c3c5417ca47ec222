"""A teacher that ran elsewhere: what its folder tells without weights."""

from pathlib import Path
from typing import Any

from vlm_distill_cache.common.attention.layers import teacher_groups
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.models.parts import read_config
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.families.inputs import text_config
from vlm_distill_cache.data.families.models import open_family_settings
from vlm_distill_cache.data.text.processors import tokenizer_fingerprint

_SAID_OTHERWISE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


class ServedTeacher:
    """What planning reads of a `Teacher`, from ``config.json``, tokenizer and image processor alone."""

    dtype = "served"
    device_map = ""
    quantisation = "none"

    def __init__(self, directory: Path, *, name: str = "") -> None:
        """Read a folder.

        Args:
            name: What the server called the model; empty: the folder's name.

        Raises:
            ModelError: The folder lacks one of the three, or they cannot be used.
        """
        self.directory, self.name = directory, name or directory.resolve().name
        try:
            settings = open_family_settings(directory)
        except (ModelError, ConfigError):
            raise
        except Exception as error:  # of any class: the library checks each setting in its own way
            raise ModelError(
                f"{directory} cannot be read: {one_line(error)}; it needs config.json, tokenizer and preprocessor_config.json "
                "of the model that was served (no weights)"
            ) from error
        self.config, self.family, self.tokenizer, _, self.image_encoder = settings
        self.image_token_id = self.family.image_token_id(self.config)
        self.pad_token_id = int(self.tokenizer.pad_token_id or 0)
        written = directory / "training.json"  # a built-in teacher's: its prompt
        self.training: dict[str, Any] = {}
        if written.is_file() and (template := read_json(written).get("template")):
            self.training["template"] = template
        text = text_config(self.config)
        self.depth, self.vocabulary = int(text.num_hidden_layers), int(text.vocab_size)

    def fingerprints(self) -> dict[str, str]:
        """Of what is known: the name under which it was served, its configuration, its tokenizer."""
        config = {key: value for key, value in read_config(self.directory).items() if key not in _SAID_OTHERWISE}
        return {
            "teacher": fingerprint({"served": self.name, "config": config}),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }

    def groups(self, count: int, layers: str) -> tuple[tuple[int, ...], ...]:
        """As `Teacher.groups`."""
        return teacher_groups(self.depth, count, layers)  # type: ignore[arg-type]
