"""A model whose layers are divided among processes by the model library (tensor parallelism), each process with some heads.

What the library divides stands in its plan of a model's class: projections of the decoder, the embedding and the output
projection. Vision tower and projector are whole in every process.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.models.changed import changes_of
from vlm_distill_cache.data.families.inputs import text_config
from vlm_distill_cache.data.families.table import Family

_HEADS = ("num_attention_heads", "num_key_value_heads")
_OTHERS = "quantise it (quantisation=4bit), or spread its layers over devices (device_map=auto), with tensor_parallel=1"


def refuse_shares(directory: Path, model: Any, family: Family, count: int) -> None:
    """Refuse a model that cannot be divided among so many processes, before its weights are read.

    Args:
        model: On any device, or on none.
        count: 1: it is not divided.

    Raises:
        ConfigError: With the reason, and what works instead.
    """
    if count == 1:
        return
    asked = f"tensor_parallel={count}: {directory}"
    kind = model.config.model_type
    plan = getattr(model, "tp_plan", None) or {}
    prefix = f"{family.language_model}."
    ours = not family.model_class or changes_of(model.config)
    if ours or not family.is_listed or not any(name.startswith(prefix) for name in plan):
        what = "this layout" if ours else f"model_type {kind!r}"
        raise ConfigError(
            f"{asked}: the installed transformers has no plan to divide the language model of {what}; {_OTHERS}"
        )
    seen = [name for name in plan for part in (family.vision_tower, family.projector) if name.startswith(f"{part}.")]
    if seen:
        raise ConfigError(
            f"{asked}: the installed transformers would divide what students need whole ({', '.join(seen[:3])}); {_OTHERS}"
        )
    text = text_config(model.config)
    heads = {name: getattr(text, name, None) or text.num_attention_heads for name in _HEADS}
    for name, number in heads.items():
        if number % count:
            fit = [str(few) for few in range(2, number + 1) if not any(of % few for of in heads.values())]
            instead = f"set {' or '.join(fit)}, or {_OTHERS}" if fit else _OTHERS
            raise ConfigError(f"{asked} has {number} heads ({name}), which {count} processes cannot share; {instead}")


def gather_columns(own: Tensor, weight: DTensor) -> Tensor:
    """What an output projection gives whose rows are divided among processes, from each process's own part.

    Args:
        own: Float ``[A, V of this process]``.
        weight: The projection's ``[V, D]``; the last process may have fewer rows.

    Returns:
        ``[A, V]``, the same in every process.
    """
    shape = torch.Size((own.shape[0], weight.shape[0]))
    whole = DTensor.from_local(own, weight.device_mesh, [Shard(1)], run_check=False, shape=shape, stride=(shape[1], 1))
    gathered: Tensor = whole.redistribute(placements=[Replicate()]).to_local()
    return gathered
