"""A narrower student cut out of its teacher: heads and MLP channels by importance, the rest as it is.

The result is a directory of the teacher's own family with smaller numbers in its configuration, which
`from_pretrained` loads; tower, projector, embeddings, norms and the width of the residual stream stay, so that
the student's hidden states lie in the teacher's space.

Source: Huang et al. 2026, "Structural Pruning of Large Vision Language Models" (arXiv:2604.24380): width-wise
pruning, then fine-tuning with hidden-state distillation on 5 % of the data. Theirs ranks by gradients (LLM-Pruner)
and spares the first and last layers; ours ranks by activations, which needs no backward pass through the teacher,
and cuts all layers alike, because a library configuration has one number of heads.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import new_directory
from vlm_distill_cache.common.files.signed import list_files, write_signed
from vlm_distill_cache.common.terminal.progress import progress
from vlm_distill_cache.data.families.inputs import known_positions, text_config
from vlm_distill_cache.data.families.models import FamilyModel, open_family_model
from vlm_distill_cache.data.families.table import submodule
from vlm_distill_cache.data.sample import Sample
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage2_student.exports.folder import keep_files
from vlm_distill_cache.stage2_student.prune.importance import ATTENTION, MLP, measure_importance, prunable_layers
from vlm_distill_cache.stage2_student.prune.plan import LayerParts, Widths, choose_layer_parts, narrow_widths
from vlm_distill_cache.stage2_student.pruned_folder import RECORD, read_settings

_log = logging.getLogger(__name__)
MAX_LENGTH = 2048  # tokens of a sample


def prune_directory(
    teacher: Path,
    output: Path,
    *,
    keep: float,
    samples: Iterable[Sample],
    encoder: SampleEncoder | None = None,
    template: str | None = None,
    described: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> Widths:
    """Cut a narrower student out of a teacher's directory and write it, whole or not at all.

    Args:
        teacher: Checkpoint directory of any listed family whose layers are built as Llama's.
        output: Folder to write; must not exist.
        keep: Share of heads and channels to keep, in (0, 1].
        samples: What importance is measured on.
        encoder: From a sample to the teacher's sequence; None: the teacher's own, with ``template``.
        template: Name; None: what the teacher's ``training.json`` says, else its family's.
        described: What else the record beside the weights says, JSON.
        device: Where the teacher runs; ``auto`` is CUDA when there is one.

    Raises:
        ConfigError: If the share is none, or the folder exists.
        ModelError: If the teacher cannot be pruned.
    """
    if output.exists():
        raise ConfigError(f"{output} exists; give a new folder for the pruned student")
    refuse_inside(output)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    opened = open_family_model(teacher, dtype=stored_dtype(teacher))
    if not opened.family.is_listed:
        raise ModelError(
            f"{teacher}: model_type {opened.model.config.model_type!r} is not listed in data/families/table.py"
        )
    opened.model.to(device)
    encoder = encoder or teacher_encoder(teacher, opened, template)
    have, want, parts, rows = plan_pruning(opened, model_batches(opened, encoder, samples, device), keep=keep)
    weights, config = cut(opened.model.to("cpu"), opened.family.language_model, parts, want)
    opened.model.config = config
    with new_directory(output) as temporary:
        opened.model.save_pretrained(temporary, state_dict=weights)
        opened.tokenizer.save_pretrained(temporary)
        opened.processor.save_pretrained(temporary)
        keep_files(teacher, temporary)
        record = {
            **(described or {}),
            "keep": keep,
            "rows": rows,
            "have": vars(have),
            "want": vars(want),
            "heads": [part.heads.tolist() for part in parts],
            "files": list_files(temporary),
        }
        write_signed(temporary / RECORD, record)
    return want


def plan_pruning(
    opened: FamilyModel, batches: Iterable[Mapping[str, Any]], *, keep: float
) -> tuple[Widths, Widths, list[LayerParts], int]:
    """Measure importance and choose what stays of every layer.

    Returns:
        The teacher's sizes, the student's, what stays of each layer, and the rows that importance is a mean over.
    """
    text = text_config(opened.model.config)
    have = Widths(
        heads=text.num_attention_heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        channels=text.intermediate_size,
    )
    want = narrow_widths(have, keep)
    width = head_width(opened)
    narrowed = narrowed_config(opened.model.config, want, width)
    if not fits(opened.model, opened.family.language_model, narrowed, width):
        want = narrow_widths(have, keep, heads=False)
        _log.warning(
            "%s ties the number of its heads to its width, so all %d stay: only MLP channels are pruned",
            type(opened.model).__name__,
            have.heads,
        )
    language_model = submodule(opened.model, opened.family.language_model)
    importance = measure_importance(opened.model, language_model, batches, heads=have.heads)
    parts = [
        choose_layer_parts(heads, channels, have=have, want=want)
        for heads, channels in zip(importance.heads, importance.channels, strict=True)
    ]
    return have, want, parts, importance.rows


def cut(model: Any, language_model: str, parts: Sequence[LayerParts], want: Widths) -> tuple[dict[str, Tensor], Any]:
    """The weights and the configuration of the narrower model.

    Returns:
        A state dict and a configuration of the teacher's class.
    """
    weights = dict(model.state_dict())
    layers = prunable_layers(submodule(model, language_model))
    text = text_config(model.config)
    width = layers[0].self_attn.o_proj.in_features // text.num_attention_heads  # type: ignore[union-attr]
    for index, part in enumerate(parts):
        heads, served = head_rows(part.heads, width), head_rows(part.key_value_heads, width)
        kept = {"q_proj": heads, "k_proj": served, "v_proj": served, "o_proj": heads}
        kept |= dict.fromkeys(MLP, part.channels)
        for name in (*ATTENTION, *MLP):
            holder = "self_attn" if name in ATTENTION else "mlp"
            key = f"{language_model}.layers.{index}.{holder}.{name}."
            if name in ("o_proj", "down_proj"):  # columns; a bias of the output is nobody's
                weights[f"{key}weight"] = weights[f"{key}weight"][:, kept[name]].contiguous()
                continue
            for tensor in ("weight", "bias"):
                if f"{key}{tensor}" in weights:
                    weights[f"{key}{tensor}"] = weights[f"{key}{tensor}"][kept[name]].contiguous()
    return weights, narrowed_config(model.config, want, width)


def narrowed_config(config: Any, want: Widths, width: int) -> Any:
    """A copy of a configuration with other sizes of the language model; a head is as wide as before."""
    narrowed = copy.deepcopy(config)
    text = text_config(narrowed)
    text.num_attention_heads = want.heads
    text.num_key_value_heads = want.key_value_heads
    text.intermediate_size = want.channels
    if want.heads != text_config(config).num_attention_heads:
        text.head_dim = width  # else it would be the width of the model over the number of heads
    return narrowed


def fits(model: Any, language_model: str, config: Any, width: int) -> bool:
    """Whether a model's class gives heads their width of old where there are fewer; builds it without memory."""
    try:
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(config))
    except ValueError:  # heads that must fill the model's width
        return False
    attention: Any = prunable_layers(submodule(built, language_model))[0].self_attn
    return bool(attention.o_proj.in_features == text_config(config).num_attention_heads * width)


def head_width(opened: FamilyModel) -> int:
    """Width of a head of the language model."""
    layer = prunable_layers(submodule(opened.model, opened.family.language_model))[0]
    heads = text_config(opened.model.config).num_attention_heads
    return int(layer.self_attn.o_proj.in_features) // int(heads)  # type: ignore[union-attr, arg-type]


def head_rows(heads: Tensor, width: int) -> Tensor:
    """Rows of a projection that belong to some heads: int64 ``[H']`` to int64 ``[H' * width]``."""
    return (heads[:, None] * width + torch.arange(width)).reshape(-1)


def model_batches(
    opened: FamilyModel, encoder: SampleEncoder, samples: Iterable[Sample], device: str
) -> Iterator[Mapping[str, Any]]:
    """Each sample as the teacher's keyword arguments, alone, so that no row is padding."""
    dtype = next(opened.model.parameters()).dtype
    with progress("importance", unit="sample") as bar:
        for sample in samples:
            batch = collate([encoder(sample)], int(opened.tokenizer.pad_token_id or 0)).to(device)
            yield opened.family.model_inputs(opened.model.config, batch, dtype=dtype)
            bar.update()


def teacher_encoder(teacher: Path, opened: FamilyModel, template: str | None) -> SampleEncoder:
    """The encoder that stage one would build for a teacher."""
    trained = read_settings(teacher / "training.json").get("template")
    config = opened.model.config
    return SampleEncoder(
        tokenizer=opened.tokenizer,
        image_encoder=opened.image_encoder,
        template=get_template(template or trained or opened.family.template, opened.tokenizer),
        image_token_id=opened.family.image_token_id(config),
        max_length=MAX_LENGTH,
        positions=known_positions(config),
    )


def stored_dtype(teacher: Path) -> str:
    """The dtype a teacher's weights are stored in, by its configuration; float32 where it says none."""
    config = read_settings(teacher / "config.json")
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return found if found in ("float16", "bfloat16") else "float32"
