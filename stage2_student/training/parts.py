"""Which parts of a student a phase trains, and what of it a checkpoint must hold to bring them back.

A checkpoint holds the parameters that any phase so far has trained, and a hash of all others: those come again
from where the student came from. With adapters that is the adapters and the projector instead of the model.
Every phase of adapters begins with new ones and ends by merging them, as the released CompoDistill code loads
its phases; the merged ones stay in the checkpoint, and are merged again, in order, when the run resumes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.hashing import checksum, fingerprint
from vlm_distill_cache.stage2_student.lora import (
    adapter_parameters,
    add_adapters,
    has_adapters,
    load_adapters,
    merge_adapters,
    plain_name,
)

Trainable = Literal["projector", "all", "lora"]
Part = Literal["projector", "embeddings", "lm_head"]
_ADAPTER_SUFFIXES = (".lora_A.default.weight", ".lora_B.default.weight")


class TrainedParts:
    """The parts of one student over the phases of one run.

    Args:
        student: As it was built or loaded, on the device that it is trained on.
        rank: Of adapters.
        alpha: Scale of adapters.
        dropout: On the input of adapters.
    """

    def __init__(self, student: Any, *, rank: int, alpha: float, dropout: float) -> None:
        self._student = student
        self._rank, self._alpha, self._dropout = rank, alpha, dropout
        self._changed: set[str] = set()
        self._merged: list[dict[str, Tensor]] = []
        # Taken before anything is trained: what a resumed run must find again.
        self._hashes = {name: hash_tensor(value) for name, value in student.named_parameters()}

    def begin(
        self, *, trainable: Trainable, freeze: Sequence[Part] = (), seed: int = 0
    ) -> list[nn.Parameter]:
        """Mark what a phase trains, freeze the rest, and return what is trained.

        Args:
            trainable: The projector side; all but the vision tower; or the projector side and new adapters.
            freeze: Parts that are left out of it.
            seed: Of new adapters.

        Raises:
            ConfigError: If nothing is left to train.
        """
        student = self._student
        # Of a family that nobody described the projector's place is unknown, and only the whole can be trained.
        projector = student.trainable_parameters("dpt") if trainable != "all" or "projector" in freeze else []
        if trainable == "all":
            student.trainable_parameters("dft")
        elif trainable == "lora":
            self._add_adapters(seed)
        parts = {
            "projector": lambda: projector,
            "embeddings": lambda: student.get_input_embeddings().parameters(),
            "lm_head": lambda: student.get_output_embeddings().parameters(),
        }
        for part in freeze:
            for parameter in parts[part]():
                parameter.requires_grad_(False)
        trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
        if not trained:
            raise ConfigError(
                f"trainable: {trainable} without {', '.join(freeze)} leaves nothing to train; shorten `freeze`"
            )
        self._changed |= {plain_name(name) for name in trained if not name.endswith(_ADAPTER_SUFFIXES)}
        return list(trained.values())

    def finish(self) -> None:
        """End a phase: merge its adapters, if it had any, into the layers they belong to."""
        if has_adapters(self._student):
            adapters = adapter_parameters(self._student)
            self._merged.append({name: value.detach().cpu().clone() for name, value in adapters.items()})
            merge_adapters(self._student)

    def state(self) -> dict[str, Any]:
        """What brings this student back: tensors and plain values."""
        values = {
            name: value.detach()
            for name, value in self._student.named_parameters()
            if plain_name(name) in self._changed or name.endswith(_ADAPTER_SUFFIXES)
        }
        merged = [adapters for adapters in self._merged if not adapted_names(adapters) <= self._changed]
        return {"values": values, "merged": merged, "frozen": self._frozen()}

    def replay(self, state: Mapping[str, Any]) -> None:
        """Bring back what ended before the phase in which a state was saved; call before `begin`.

        Args:
            state: From :meth:`state`.

        Raises:
            ConfigError: If the parts that were never trained are others than those the state was saved with.
        """
        adapters = {name for name in state["values"] if name.endswith(_ADAPTER_SUFFIXES)}
        self._changed = {plain_name(name) for name in state["values"].keys() - adapters}
        if self._frozen() != state["frozen"]:
            raise ConfigError(
                "the student's weights before training are not those that this run began with: its directory, the "
                "cache's vision tower or a library changed; restore them, use another --output, or delete the "
                "folder to begin again"
            )
        for adapters_of_a_phase in state["merged"]:
            self._add_adapters(0)
            load_adapters(self._student, adapters_of_a_phase)
            self.finish()

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Copy a state's values into the student; call after `begin` of the phase in which it was saved.

        Raises:
            ConfigError: If they are those of other parts.
        """
        own = dict(self._student.named_parameters())
        values = state["values"]
        here = self.state()["values"].keys()
        if here != values.keys():
            raise ConfigError(
                f"the checkpoint holds other parts than this phase trains: {sorted(here ^ values.keys())[:5]}; use "
                "another --output, or delete the folder to begin again"
            )
        for name, value in values.items():
            own[name].copy_(value)

    def _add_adapters(self, seed: int) -> None:
        add_adapters(self._student, rank=self._rank, alpha=self._alpha, dropout=self._dropout, seed=seed)

    def _frozen(self) -> str:
        """Hash of all parameters that no phase so far has trained."""
        frozen = {name: value for name, value in self._hashes.items() if name not in self._changed}
        return fingerprint(frozen)


def adapted_names(adapters: Mapping[str, Tensor]) -> set[str]:
    """The weights that merging these adapters changes, by their name in the student."""
    return {name.partition(".lora_")[0] + ".weight" for name in adapters}


def hash_tensor(value: Tensor) -> str:
    """xxh3_128 of a tensor's bytes."""
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return checksum(content.numpy().data)
