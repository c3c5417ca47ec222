"""A smaller student cut out of its teacher: layers, heads and MLP channels by importance, the rest as it is.

The result is a directory of the teacher's own family with smaller numbers in its configuration, which
`from_pretrained` loads; where layers come out of different sizes the configuration lists them (`layer_sizes` of
`common.models.changed`). Tower, projector, embeddings, norms and the width of the residual stream stay, so that the
student's hidden states lie in the teacher's space. Layers leave first; heads and channels are chosen among those that
stay, by what they mattered in the whole teacher.

Source: Huang et al. 2026, "Structural Pruning of Large Vision Language Models" (arXiv:2604.24380): width or depth, then
fine-tuning with hidden-state distillation on 5 % of the data. Ours ranks heads and channels by activations unless told
otherwise, which needs no backward pass through the teacher.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.attention.hidden import KEPT_LAYERS, kept_layers
from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.errors import ConfigError, ModelError, SampleError
from vlm_distill_cache.common.files.atomic import new_directory
from vlm_distill_cache.common.files.signed import list_files, write_signed
from vlm_distill_cache.common.models.changed import CHANGES, changed_class, changes_of
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.common.terminal.progress import progress
from vlm_distill_cache.data.families.inputs import known_positions, text_config
from vlm_distill_cache.data.families.models import FamilyModel, open_family_model
from vlm_distill_cache.data.families.table import Family, submodule
from vlm_distill_cache.data.sample import Sample
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage2_student.exports.folder import is_ours, save_processor, write_model_code
from vlm_distill_cache.stage2_student.prune.importance import Measured, measure_importance
from vlm_distill_cache.stage2_student.prune.plan import (
    LayerParts,
    Widths,
    all_parts,
    choose_layer_parts,
    choose_layers,
    narrow_widths,
    rank_over_layers,
)
from vlm_distill_cache.stage2_student.pruned_folder import (
    RECORD,
    Kept,
    PruningConfig,
    layers_kept,
    read_settings,
    unused_settings,
)
from vlm_distill_cache.stage2_student.students.encoder import pictures_taken
from vlm_distill_cache.stage2_student.students.prunable import MLP, prunable_layers, refuse_unprunable

_log = logging.getLogger(__name__)
MAX_LENGTH = 2048  # tokens of a sample


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What stays of a teacher.

    Attributes:
        have: Sizes of the teacher's layers.
        depth: Their number.
        layers: Those that stay, ascending.
        parts: What stays of each of them.
        changed: Whether the configuration has to list the sizes of layers one by one.
        rows: Positions that importance is a mean over.
    """

    have: Widths
    depth: int
    layers: tuple[int, ...]
    parts: tuple[LayerParts, ...]
    changed: bool
    rows: int

    @property
    def sizes(self) -> list[Widths]:
        """Of the layers that stay."""
        return [part.sizes for part in self.parts]

    def __str__(self) -> str:
        sizes = self.sizes
        kinds = {
            "heads": [size.heads for size in sizes],
            "of keys and values": [size.key_value_heads for size in sizes],
            "channels": [size.channels for size in sizes],
        }
        heads, served, channels = (
            f"{min(of)}" if min(of) == max(of) else f"{min(of)} to {max(of)}" for of in kinds.values()
        )
        layers = "" if len(sizes) == self.depth else f", {len(sizes)} of {self.depth} layers"
        return f"{heads} heads ({served} of keys and values) and {channels} channels a layer{layers}"


def prune_directory(
    teacher: Path,
    output: Path,
    *,
    kept: Kept,
    how: PruningConfig | None = None,
    samples: Iterable[Sample],
    encoder: SampleEncoder | None = None,
    template: str | None = None,
    described: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> Pruning:
    """Cut a smaller student out of a teacher's directory and write it, whole or not at all.

    Args:
        teacher: Checkpoint directory of any listed family whose layers are built as Llama's.
        output: Folder to write; must not exist.
        kept: Shares of heads and channels, and of layers.
        how: By which importance, and what is spared; None: the defaults.
        samples: What importance is measured on.
        encoder: From a sample to the teacher's sequence; None: the teacher's own, with ``template``.
        template: Name; None: what the teacher's ``training.json`` says, else its family's.
        described: What else the record beside the weights says, JSON.
        device: Where the teacher runs; ``auto`` is CUDA when there is one.

    Raises:
        ConfigError: If the shares or what is spared do not fit the teacher, or the folder exists.
        ModelError: If the teacher cannot be pruned.
    """
    if output.exists():
        raise ConfigError(f"{output} exists; give a new folder for the pruned student")
    refuse_inside(output)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    how = how or PruningConfig()
    opened = open_family_model(teacher, dtype=stored_dtype(teacher))
    refuse_unprunable(teacher, opened)
    opened.model.to(device)
    encoder = encoder or teacher_encoder(teacher, opened, template)
    pruning = plan_pruning(opened, model_batches(opened, encoder, samples, device), kept=kept, how=how)
    weights, config = cut(opened.model.to("cpu"), opened.family, pruning)
    model = opened.model
    model.config = config
    if pruning.changed and not isinstance(model, VisionLanguageModel):
        model_class: Any = type(model)
        model.__class__ = changed_class(model_class)
    named = vars(config).pop("auto_map", None)  # code beside the teacher; what of it is needed is written again
    with new_directory(output) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        if pruning.changed or (named and is_ours(model)):
            write_model_code(temporary, model)
        _save_processor(temporary, opened, encoder, teacher)
        record = {
            **(described or {}),
            "keep": kept.width,
            "rows": pruning.rows,
            "have": vars(pruning.have),
            "want": vars(pruning.sizes[0]),
            "heads": [part.heads.tolist() for part in pruning.parts],
            **_beyond_width(kept, how, pruning),
            "files": list_files(temporary),
        }
        write_signed(temporary / RECORD, record)
    return pruning


def _save_processor(target: Path, opened: FamilyModel, encoder: SampleEncoder, teacher: Path) -> None:
    """Write what a trained student's folder has beside the weights; a chat template of the teacher's own stays."""
    opened.tokenizer.save_pretrained(target)
    template = target / "chat_template.jinja"
    own = template.read_bytes() if template.exists() else None
    save_processor(target, model=opened.model, encoder=encoder, image_processor=opened.processor, source=teacher)
    if own is not None:
        template.write_bytes(own)


def _beyond_width(kept: Kept, how: PruningConfig, pruning: Pruning) -> dict[str, Any]:
    """What the record of a student that is only narrower, and cut by the defaults, does not say."""
    default = vars(PruningConfig())
    settings = {name: value for name, value in vars(how).items() if value != default[name] and name != "samples"}
    return {
        **({"depth": kept.depth, "layers": list(pruning.layers)} if kept.depth != 1 else {}),
        **({"settings": settings} if settings else {}),
        **({"sizes": [vars(size) for size in pruning.sizes]} if pruning.changed else {}),
    }


def plan_pruning(opened: FamilyModel, batches: Iterable[Measured], *, kept: Kept, how: PruningConfig) -> Pruning:
    """Measure importance and choose what stays.

    Raises:
        ConfigError: If more layers are spared than stay, or all are.
    """
    text = text_config(opened.model.config)
    have = Widths(
        heads=text.num_attention_heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        channels=text.intermediate_size,
    )
    language_model = submodule(opened.model, opened.family.language_model)
    count, first, last = layers_kept(len(prunable_layers(language_model)), kept, how)
    for unused in unused_settings(kept, how):
        _log.warning("%s", unused)
    importance = measure_importance(
        opened.model,
        language_model,
        batches,
        heads=have.heads,
        width=how.importance,
        depth=None if kept.depth == 1 else how.depth_importance,
    )
    layers = choose_layers(importance.layers, count, first=first, last=last)
    narrowed = layers[how.spare_first or 0 : len(layers) - (how.spare_last or 0)]
    chosen = dict.fromkeys(layers, all_parts(have))
    changed = kept.width != 1 and (how.ratios == "global" or narrowed != layers)
    if kept.width != 1 and how.ratios == "global":
        chosen |= zip(narrowed, rank_over_layers(importance, narrowed, have=have, keep=kept.width), strict=True)
    elif kept.width != 1:
        want = narrow_widths(have, kept.width)
        width = head_width(opened)
        if not changed and not fits(
            opened.model, opened.family.language_model, narrowed_config(opened.model.config, want, width), width
        ):
            want = narrow_widths(have, kept.width, heads=False)
            _log.warning(
                "%s ties the number of its heads to its width, so all %d stay: only MLP channels are pruned",
                type(opened.model).__name__,
                have.heads,
            )
        for layer in narrowed:
            chosen[layer] = choose_layer_parts(
                importance.heads[layer],
                importance.channels[layer],
                have=have,
                want=want,
                key_value_importance=importance.key_values[layer],
            )
    return Pruning(
        have=have,
        depth=len(importance.layers),
        layers=tuple(layers),
        parts=tuple(chosen[layer] for layer in layers),
        changed=changed,
        rows=importance.rows,
    )


def cut(model: Any, family: Family, pruning: Pruning) -> tuple[dict[str, Tensor], Any]:
    """The weights and the configuration of the smaller model.

    Returns:
        A state dict and a configuration of the teacher's class.

    Raises:
        ModelError: If the model has weights beside those of a Llama that depend on the number of heads or layers.
    """
    language_model = family.language_model
    layers: list[Any] = prunable_layers(submodule(model, language_model))
    width = layers[0].self_attn.o_proj.in_features // pruning.have.heads
    config = shallower_config(model.config, pruning.layers)
    features = _features_of_layers(config, pruning.layers, f"{family.vision_tower}.deepstack_merger_list.")
    _renumber_decoding(config, pruning.layers)
    if pruning.changed:
        setattr(
            config,
            CHANGES,
            {
                **(getattr(config, CHANGES, None) or {}),
                "parts": {
                    "language_model": language_model,
                    "vision_tower": family.vision_tower,
                    "projector": family.projector,
                },
                "layer_sizes": [vars(size) for size in pruning.sizes],
            },
        )
    else:
        config = narrowed_config(config, pruning.sizes[0], width)
    place = {layer: new for new, layer in enumerate(pruning.layers)}
    prefix = f"{language_model}.layers."
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if any(name.startswith(old) for old in features):
            old = next(old for old in features if name.startswith(old))
            if features[old] is not None:
                weights[f"{features[old]}{name.removeprefix(old)}"] = value
            continue
        if not name.startswith(prefix):
            weights[name] = value
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        new = place.get(int(index))
        if new is not None:
            weights[f"{prefix}{new}.{rest}"] = _kept_of(rest, value, pruning.parts[new], width)
    _refuse_other_shapes(model, config, weights)
    return weights, config


def _kept_of(name: str, value: Tensor, part: LayerParts, width: int) -> Tensor:
    """What stays of one tensor of a layer, by its name inside the layer."""
    holder, _, rest = name.partition(".")
    module, _, kind = rest.partition(".")
    if (holder, kind) not in (("self_attn", "weight"), ("self_attn", "bias"), ("mlp", "weight"), ("mlp", "bias")):
        return value
    heads, served = head_rows(part.heads, width), head_rows(part.key_value_heads, width)
    kept = {"q_proj": heads, "k_proj": served, "v_proj": served, "o_proj": heads, **dict.fromkeys(MLP, part.channels)}
    if module not in kept:
        return value
    if module in ("o_proj", "down_proj"):  # columns; a bias of the output is nobody's
        return value[:, kept[module]].contiguous() if kind == "weight" else value
    return value[kept[module]].contiguous()


def _refuse_other_shapes(model: Any, config: Any, weights: Mapping[str, Tensor]) -> None:
    """Build the smaller model without memory and compare."""
    model_class: Any = type(model)
    if changes_of(config) and not isinstance(model, VisionLanguageModel):
        model_class = changed_class(model_class)
    try:
        with torch.device("meta"):
            expected = model_class(copy.deepcopy(config)).state_dict()
    except (ValueError, IndexError, AttributeError) as error:
        raise ModelError(f"{model_class.__name__}: no model can be made of the smaller sizes: {error}") from error
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = (list(of[name].shape) if name in of else None for of in (weights, expected))
        if found != wanted:
            raise ModelError(
                f"{model_class.__name__}: {name} has the shape {found} behind the cut, the smaller model expects {wanted}; it "
                "is no part of a Llama's layer, so that this teacher cannot be pruned: choose another student"
            )


def shallower_config(config: Any, layers: Sequence[int]) -> Any:
    """A copy of a configuration for some of the language model's layers; lists of all its layers are cut alike.

    ``kept_layers`` of the language model's part then says which ones they were, ``{"of": DEPTH, "kept": [...]}``, for
    losses on hidden states; ``before`` there, which ones of the teacher's own teacher. Of all layers the copy is equal.

    Raises:
        ModelError: If the teacher's configuration names layers that cannot be its own.
    """
    shallower = copy.deepcopy(config)
    text = text_config(shallower)
    depth = text.num_hidden_layers
    kept_layers(text, teacher_depth=depth)
    if len(layers) == depth:
        return shallower
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and "layer" in name and len(value) == depth:  # layer_types, no_rope_layers
            setattr(text, name, [value[layer] for layer in layers])
    if isinstance(getattr(text, "max_window_layers", None), int):  # from which one on there are windows
        text.max_window_layers = sum(layer < text.max_window_layers for layer in layers)
    text.num_hidden_layers = len(layers)
    before = getattr(text, KEPT_LAYERS, None)
    earlier = {} if before is None else {"before": _kept_of_kept(before, layers)}
    setattr(text, KEPT_LAYERS, {"of": depth, "kept": list(layers), **earlier})
    return shallower


def _kept_of_kept(told: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """What is left of a teacher that was cut out of a deeper one itself: a cache may be of either."""
    earlier = {"before": _kept_of_kept(told["before"], layers)} if "before" in told else {}
    return {"of": told["of"], "kept": [told["kept"][layer] for layer in layers], **earlier}


def _renumber_decoding(config: Any, layers: Sequence[int]) -> None:
    """Name the layers that choose tokens in decoding as they are counted now, in place; where none stays, the middle ones."""
    changes = getattr(config, CHANGES, None) or {}
    if chosen := (changes.get("decoding_tokens") or {}).get("layers"):
        stay = [layers.index(layer) for layer in chosen if layer in layers]
        setattr(config, CHANGES, {**changes, "decoding_tokens": {**changes["decoding_tokens"], "layers": stay or None}})


def _features_of_layers(config: Any, layers: Sequence[int], prefix: str) -> dict[str, str | None]:
    """Where the parts move that add the tower's own layers to the first ones of the language model (Qwen3-VL).

    What is added behind a layer leaves with it; the configuration is changed in place.

    Returns:
        By the beginning of a weight's name the one that it gets; None: it leaves.
    """
    vision: Any = getattr(config, "vision_config", None)
    indexes = getattr(vision, "deepstack_visual_indexes", None)
    if not indexes:
        return {}
    in_order = sorted(
        range(len(indexes)), key=indexes.__getitem__
    )  # of the list, by which layer of the tower comes first
    stays = [place for layer, place in enumerate(in_order) if layer in layers]
    vision.deepstack_visual_indexes = [indexes[place] for place in sorted(stays)]
    moved = {place: new for new, place in enumerate(sorted(stays))}
    return {
        f"{prefix}{place}.": f"{prefix}{moved[place]}." if place in moved else None for place in range(len(indexes))
    }


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
) -> Iterator[Measured]:
    """Each sample as the teacher's keyword arguments, alone, so that no row is padding; those it cannot read are left out."""
    dtype = next(opened.model.parameters()).dtype
    failed: list[SampleError] = []
    with progress("importance", unit="sample") as bar:
        for sample in samples:
            try:
                encoded = encoder(sample)
            except SampleError as error:  # its picture is missing, it is too long: stage one leaves it out, too
                failed.append(error)
                continue
            batch = collate([encoded], int(opened.tokenizer.pad_token_id or 0)).to(device)
            yield Measured(opened.family.model_inputs(opened.model.config, batch, dtype=dtype), batch.labels)
            bar.update()
    if failed:
        _log.warning(
            "importance is measured without samples that cannot be read, %d; the first: %s", len(failed), failed[0]
        )


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
        **pictures_taken(config, opened.image_encoder),
    )


def stored_dtype(teacher: Path) -> str:
    """The dtype a teacher's weights are stored in, by its configuration; float32 where it says none."""
    config = read_settings(teacher / "config.json")
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return found if found in ("float16", "bfloat16") else "float32"
