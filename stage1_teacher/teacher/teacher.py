"""A teacher as stage one uses it: load a checkpoint directory, run a batch, return only what is wanted.

The model's own forward pass runs, with SDPA; attention is recomputed only for the requested layers, rows and
columns, and the output projection runs on supervised rows only, so neither ``[B, H, T, T]`` nor ``[B, T, V]`` ever exists.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.hidden import HiddenCapture
from vlm_distill_cache.common.attention.layers import teacher_groups
from vlm_distill_cache.common.codecs.live import map_tensors
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.models.tokens.tower_attention import by_visual_token, last_layer, observe_tower
from vlm_distill_cache.data.families.inputs import text_config
from vlm_distill_cache.data.families.models import (
    FamilyModel,
    Quantisation,
    describe_family_model,
    find_family_model,
    input_device,
    open_family_model,
    row_logits,
)
from vlm_distill_cache.data.families.shares import refuse_shares
from vlm_distill_cache.data.families.table import Family, submodule
from vlm_distill_cache.data.images.encoder import AnyImageEncoder
from vlm_distill_cache.data.text.collate import Batch
from vlm_distill_cache.data.text.generation import Drawn, Sampling, draw_tokens
from vlm_distill_cache.data.text.processors import module_fingerprint, tokenizer_fingerprint, weights_fingerprint
from vlm_distill_cache.stage1_teacher.teacher.inputs import Request, TeacherInputs, prepare_inputs
from vlm_distill_cache.stage1_teacher.teacher.ranks import Ranks, bound_by_library, following, join

logger = logging.getLogger(__name__)
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How the library spreads a model over devices; a device map may also be a device."""


class Teacher:
    """A loaded teacher with its tokenizer, image encoder and fingerprints."""

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        device_map: str = "",
        quantisation: Quantisation = "none",
        tensor_parallel: int = 1,
        loads: bool = True,
    ) -> None:
        """Load a checkpoint directory of any family.

        Args:
            dtype: ``auto`` is float32 on CPU, bfloat16 on CUDA.
            device: ``auto`` is CUDA when there is one; unused with a device map.
            device_map: How the library spreads the model over devices (``auto``, ``balanced``, ...); empty: it does not.
            tensor_parallel: Processes that hold a part of every layer each; this one leads them, or is one of them (`Ranks`).
            loads: False: only describe it; no value of its weights, which need not be there, is read, and nothing can be run.

        Raises:
            ModelError: If the directory is missing or holds no usable model.
            ConfigError: If what quantisation needs is missing, or the model cannot be divided among so many.
        """
        self.directory = directory
        wanted = find_device(device)
        if dtype == "auto":
            dtype = "float32" if wanted.type == "cpu" else "bfloat16"
        self.dtype = dtype
        if device_map and device_map not in MAPS:
            find_device(device_map, option="device_map", others=MAPS)
        self.device_map = device_map
        self.quantisation: Quantisation = quantisation
        if quantisation != "none" and not device_map:
            device_map = str(wanted)
        self.ranks: Ranks | None = None
        if loads and tensor_parallel > 1:
            opened = self._open_together(tensor_parallel, wanted)
        elif loads:
            opened = open_family_model(directory, dtype=dtype, device_map=device_map, quantisation=quantisation)
        else:
            opened = describe_family_model(directory)
            refuse_shares(directory, opened.model, opened.family, tensor_parallel)
        self.loads = loads
        placed = device_map or quantisation != "none" or not loads or self.ranks is not None
        self.model: Any = (opened.model if placed else opened.model.to(wanted)).requires_grad_(requires_grad=False)
        self.device = input_device(self.model) if loads else wanted
        self.family: Family = opened.family
        self._weight_files = opened.weight_files
        self.tokenizer = opened.tokenizer
        self.config = self.model.config
        self.image_encoder: AnyImageEncoder = opened.image_encoder
        self.image_token_id = self.family.image_token_id(self.config)
        self.pad_token_id = int(self.tokenizer.pad_token_id or 0)
        self.training = _training_notes(directory)
        self.has_read = False  # a sample; before that nobody knows whether its files belong together
        self.depth = int(text_config(self.config).num_hidden_layers)
        self.capture, self.no_attention = self._open_capture()

    def _open_together(self, count: int, device: torch.device) -> FamilyModel:
        """As `open_family_model`, of this process's part; what refuses it does so before there are other ranks, or they load."""
        find = partial(find_family_model, self.directory, dtype=self.dtype, tensor_parallel=count)
        followed = following()
        if followed is None:
            opened, load = find()
            self.ranks = ranks = join(count, device)
            ranks.tell("open", directory=self.directory, dtype=self.dtype, threads=torch.get_num_threads())
            with ranks.together(), bound_by_library(ranks.device):
                model = load()
        else:
            self.ranks = ranks = followed
            with ranks.together(), bound_by_library(ranks.device):
                opened, load = find()
                model = load()
        ranks.holds(model)
        return opened._replace(model=model)

    @cached_property
    def gpus(self) -> tuple[torch.device, ...]:
        """The GPUs that hold a part of this process's model, in order; none on a CPU."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return tuple(sorted({tensor.device for tensor in tensors if tensor.device.type == "cuda"}, key=str))

    @property
    def language_model(self) -> nn.Module:
        """The decoder; of a family that is not listed it is not known where it is."""
        return submodule(self.model, self.family.language_model)

    @property
    def vision_tower(self) -> nn.Module:
        """The vision tower."""
        return submodule(self.model, self.family.vision_tower)

    @property
    def projector(self) -> nn.Module:
        """The projector from vision width to language width."""
        return submodule(self.model, self.family.projector)

    def fingerprints(self) -> dict[str, str]:
        """Hashes of what this teacher is: weights, dtype and placement; tokenizer; vision tower where it is known.

        Of one that was only described, the tokenizer's alone.
        """
        if not self.loads:
            return {"tokenizer": tokenizer_fingerprint(self.tokenizer)}
        hashes = {
            "teacher": weights_fingerprint(
                self.directory,
                self.dtype,
                device_map=self.device_map,
                quantisation=self.quantisation,
                others=self._weight_files,
            ),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }
        if self.family.vision_tower:
            hashes["vision_tower"] = module_fingerprint(self.vision_tower)
        return hashes

    def groups(self, count: int, layers: str) -> tuple[tuple[int, ...], ...]:
        """Language-model layers of each group that a cache keeps."""
        return teacher_groups(self.depth, count, layers)  # type: ignore[arg-type]

    def prepare(self, batch: Batch, requests: Mapping[str, Request]) -> TeacherInputs:
        """Make on the CPU what `run` needs of a batch, in page-locked memory if the teacher is on a GPU.

        Raises:
            ModelError: If a token id has no row in the embedding.
        """
        self.check_ids(batch.input_ids)
        dtype = getattr(torch, self.dtype)
        inputs = prepare_inputs(batch, requests, family=self.family, config=self.config, dtype=dtype)
        return inputs.pinned() if self.device.type == "cuda" else inputs

    @torch.inference_mode()
    def run(self, inputs: TeacherInputs) -> dict[str, Tensor]:
        """Run one batch and keep what was requested; nothing here waits for a GPU, what the library does may.

        Returns:
            By name, logits of the rows of all samples, float32 ``[A, V]``; attention, float32 ``[B, G, R, M]``,
            zero where rows or keys are padding, R being 1 for a sum of rows; hidden states, ``[B, R, S, D]`` in the
            model's dtype, zero where rows are padding; or attention of the tower, float32 ``[N]`` of all samples' visual
            tokens in order.
        """
        if self.ranks is None:
            return self._run(inputs)
        self.ranks.tell("run", inputs=inputs)
        with self.ranks.together():
            return self._run(inputs)

    def _run(self, inputs: TeacherInputs) -> dict[str, Tensor]:
        inputs = inputs.to(self.device)
        hidden: AbstractContextManager[Mapping[str, Tensor]] = nullcontext({})
        if inputs.states:
            hidden = HiddenCapture(self.language_model).record(inputs.states)
        received: AbstractContextManager[list[Tensor]] = nullcontext([])
        if inputs.towers:
            received = observe_tower(self.vision_tower, last_layer(self.config, self.vision_tower))
        with self._record(inputs.attention) as attention, hidden as states, received as seen:
            logits = row_logits(self.model, inputs.model_inputs, inputs.rows)  # [A, V]
        # What was found stays where it was: the first device of several would wait for the last one's, and begin nothing.
        of_rows = {
            name: logits if place is None else logits[place.to(logits.device, non_blocking=True)]
            for name, place in inputs.places.items()
        }
        of_towers = {
            name: by_visual_token(self.model, self.vision_tower, seen, inputs.model_inputs, tokens=sum(request.counts))
            for name, request in inputs.towers.items()
        }
        gaze: Mapping[str, Tensor] = attention
        if self.ranks is not None:  # each rank has as many heads, and the mean over its own
            gaze = {name: self.ranks.mean(own) for name, own in attention.items()}
        return {**of_rows, **gaze, **states, **of_towers}

    @torch.inference_mode()
    def draw(
        self,
        arguments: Mapping[str, Any],
        *,
        max_new_tokens: int,
        sampling: Sampling | None,
        pad_id: int,
        end: Sequence[int],
    ) -> Drawn:
        """Continue prompts token by token, as `draw_tokens`; ``arguments`` are those of the model's ``generate``."""
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "sampling": sampling, "pad_id": pad_id, "end": end,
        }  # fmt: skip
        if self.ranks is None:
            return draw_tokens(self.model, arguments, **settings)
        self.ranks.tell("draw", arguments=map_tensors(arguments, Tensor.cpu), **settings)
        with self.ranks.together():
            return draw_tokens(self.model, map_tensors(arguments, lambda tensor: tensor.to(self.device)), **settings)

    def check_ids(self, input_ids: Tensor) -> None:
        """Refuse token ids that the embedding has no row for: an accelerator would stop without saying why.

        Raises:
            ModelError: Naming both numbers.
        """
        rows = int(self.model.get_input_embeddings().weight.shape[0])
        text = input_ids[input_ids != self.image_token_id]
        if text.numel() and int(text.max()) >= rows:
            raise ModelError(
                f"teacher {self.directory}: the tokenizer gives token id {int(text.max())}, the embedding has {rows} rows; "
                "tokenizer and weights are of different checkpoints"
            )

    def _record(self, requests: Mapping[str, AttentionRequest]) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The attention capture; raises ModelError if there is none and attention is wanted."""
        if self.capture is not None:
            return self.capture.record(requests)
        if requests:
            raise ModelError(
                f"teacher {self.directory}: its attention cannot be captured ({self.no_attention}); cache its logits "
                "only (--signals logits)"
            )
        return nullcontext({})

    def _open_capture(self) -> tuple[AttentionCapture | None, str]:
        """The attention capture, or None and the reason: a teacher that has none can still give its logits."""
        if not self.family.is_listed:
            return None, (
                f"the table of families (data/families/table.py) does not say where a model_type "
                f"{self.config.model_type!r} has its language model"
            )
        try:
            return AttentionCapture(self.language_model), ""
        except ModelError as error:
            logger.warning("teacher %s: %s", self.directory, error)
            return None, str(error)


def find_device(name: str, *, option: str = "device", others: Sequence[str] = ("auto",)) -> torch.device:
    """The device of a name; the option takes ``others``, too.

    Raises:
        ConfigError: If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = f"choose {', '.join(others)}, cpu"
    here = torch.accelerator.current_accelerator()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{option}={name!r} is no device; {named}, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{option}={name!r}: {torch.cuda.device_count()} CUDA devices are here; {named} or one of them"
        )
    if device.type not in ("cpu", "cuda", here and here.type):
        raise ConfigError(f"{option}={name!r}: this machine cannot compute there; {named}, cuda or cuda:N")
    return device


def _training_notes(directory: Path) -> dict[str, Any]:
    """What a built-in teacher says of itself in ``training.json``; nothing for other checkpoints."""
    path = directory / "training.json"
    notes = read_json(path.resolve()) if path.is_file() else {}
    return notes if isinstance(notes, dict) else {}
