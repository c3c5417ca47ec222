"""What would divide one model among processes: FSDP, DeepSpeed and their like, found however they are asked for.

`distill train` divides a student by FSDP2, in a way of its own (``sharding=fsdp2``), which `accelerate launch` may ask for,
too. No part of this project clips, saves or resumes a share that anything else makes: it is refused before anything is read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import LaunchError
from vlm_distill_cache.common.printing import one_line

OFF = (
    "",
    "0",
    "1",
    "n",
    "no",
    "off",
    "f",
    "false",
    "none",
    "default",
)  # values of accelerate's options that ask for nothing
_KINDS = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
FSDP2 = "FSDP2"
_OFFLOAD = "FSDP_OFFLOAD_PARAMS"
# Values of accelerate's options that say what FSDP2 does here in any case.
AS_FSDP2_DOES = {
    "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "full_shard", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "transformer_based_wrap", "FSDP_USE_ORIG_PARAMS": "true", "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_STATE_DICT_TYPE": "sharded_state_dict",
}  # fmt: skip
_SIZES = {
    "dp_shard_size": "FSDP",
    "tp_size": "tensor parallelism",
    "pp_size": "pipeline parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
    "ep_size": "expert parallelism",
}
_INSTEAD = {
    "student": "What works is data parallelism, where every process trains the whole student: `distill run --nproc N`, or "
    "`torchrun --nproc-per-node N --no-python distill train ...` with the options as they are; and FSDP2 for a student that "
    "is too large for that: `--set sharding=fsdp2` beside either",
    "teacher": "What works is the whole teacher in every process, each with its share of the data: `teacher-cache build --nproc "
    "N`; or, for a teacher that is larger than a GPU, `--set tensor_parallel=N`, or one process and `--set device_map=auto`",
}  # fmt: skip


def find_sharding(environment: Mapping[str, str]) -> dict[str, str]:
    """What accelerate would be asked for by these variables: the mode's name by ``VARIABLE=value``."""
    found = {}
    second = environment.get("FSDP_VERSION", "").strip() == "2"
    for name, value in environment.items():
        word = value.strip().lower()
        if name.startswith("ACCELERATE_USE_") and (kind := _KINDS.get(name[len("ACCELERATE_USE_") :])):
            kind = FSDP2 if kind == "FSDP" and second else kind
            asked = word == "1" or word not in OFF
        elif name.startswith("PARALLELISM_CONFIG_"):
            kind = _SIZES.get(name[len("PARALLELISM_CONFIG_") :].lower(), "")
            asked = bool(kind) and word not in OFF
        else:
            kind, asked = "fp8", name == "ACCELERATE_MIXED_PRECISION" and word == "fp8"
        if asked:
            found[f"{name}={one_line(value)}"] = kind
    if FSDP2 in found.values() and environment.get(_OFFLOAD, "").strip().lower() not in OFF:
        found[f"{_OFFLOAD}={one_line(environment[_OFFLOAD])}"] = "parameters in main memory"
    return dict(sorted(found.items()))


def _of_this_process() -> dict[str, str]:
    """What an accelerator that somebody else made in this process stands for; all later ones share its state."""
    module = sys.modules.get("accelerate.state")
    state: dict[str, Any] = {} if module is None else module.AcceleratorState._shared_state
    found = {}
    mode = getattr(state.get("distributed_type"), "name", "")
    if mode in _KINDS:
        found[f"distributed_type={mode}"] = _KINDS[mode]
    for name, kind in _SIZES.items():
        size = getattr(state.get("parallelism_config"), name, None)
        if size is not None and size != 1:
            found[f"parallelism_config.{name}={size}"] = kind
    if state.get("_mixed_precision") == "fp8":
        found["mixed_precision=fp8"] = "fp8"
    backend = getattr(getattr(state.get("dynamo_plugin"), "backend", None), "name", "NO")
    if backend != "NO":
        found[f"dynamo_plugin.backend={backend}"] = "torch.compile"
    return found


def refuse_sharding(launched: Mapping[str, str], *, model: str, divides: bool = False) -> bool:
    """Refuse what would divide a model among processes, or compute it in ways that no cache or checkpoint knows.

    Args:
        launched: What was found when this process joined its launch, as from `find_sharding`.
        model: ``student`` or ``teacher``: what is to run.
        divides: Whether it can be divided by FSDP2.

    Returns:
        Whether FSDP2 was asked for, where the model can be divided by it.

    Raises:
        LaunchError: Names what was asked for, where, and what works instead.
    """
    asked_for = dict(launched) | find_sharding(os.environ)
    variables = {where: kind for where, kind in asked_for.items() if not (divides and kind == FSDP2)}
    within = _of_this_process() if model == "student" else {}
    if not variables and not within:
        return bool(asked_for)
    asked = [f"{kind} ({where})" for where, kind in {**variables, **within}.items()]
    remedies = []
    if variables:
        home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")))
        names = " ".join(name.partition("=")[0] for name in variables)
        remedies.append(
            "`accelerate launch` sets these variables, by its flags or its configuration (--config_file, else "
            f"{home / 'accelerate' / 'default_config.yaml'}): leave them out there; or, if nothing was launched, `unset {names}`"
        )
    if within:
        remedies.append("An Accelerator of this Python process asks for it: train in a process of its own")
    if "fp8" in {**variables, **within}.values():
        remedies.append("Instead of fp8, say dtype=bfloat16")
    raise LaunchError(". ".join([f"not supported: {', '.join(asked)}", *remedies, _INSTEAD[model]]))
