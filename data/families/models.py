"""A checkpoint directory of any family as a loaded model with tokenizer and processor, for both stages.

Also the one way to get logits of chosen rows from any of them: the model's own forward pass runs, and only the
wanted rows enter the output projection, so soft-capping or scaling of logits is the library's own code.

Dims: B batch, T sequence, A wanted rows, V vocabulary.
"""

import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.models.published import default_image_processor, is_published, load_published
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.families.table import Family, family_of, submodule
from vlm_distill_cache.data.families.unusable import refuse_unusable
from vlm_distill_cache.data.images.encoder import AnyImageEncoder
from vlm_distill_cache.data.images.library import load_processor
from vlm_distill_cache.data.text.processors import load_image_processor, load_tokenizer

logger = logging.getLogger(__name__)
_LAYER = re.compile(r"\.(layers?|blocks?|h)\.\d+\.")  # other left-over weights are the library's to judge

Quantisation = Literal["none", "8bit", "4bit"]


class FamilyModel(NamedTuple):
    """A model in evaluation mode, its entry in the table, the library's fast tokenizer, and the PIL image processor.

    Of a family that is not listed, ``processor`` is the library's whole processor.
    """

    model: Any
    family: Family
    tokenizer: Any
    processor: Any


def open_family_model(
    directory: Path,
    *,
    dtype: str = "float32",
    device_map: str = "",
    quantisation: Quantisation = "none",
) -> FamilyModel:
    """Load a checkpoint directory: a library model of any family, MobileVLM or CompoDistill as published.

    Args:
        directory: Model, tokenizer and image processor files.
        dtype: Computation dtype, a name of torch's.
        device_map: As the library takes it (``auto``, ``balanced``, ``cuda:1``); empty: on the CPU, for the caller to
            move.
        quantisation: Of the language model's weights, by bitsandbytes; tower and projector keep ``dtype``.

    Raises:
        ModelError: If the directory holds no usable model, or only part of its weights.
        ConfigError: If bitsandbytes or accelerate is missing for what is asked.
    """
    published = is_published(directory)
    if not published:
        refuse_unusable(directory)
    _check_placement(directory, device_map=device_map, quantisation=quantisation, published=published)
    try:
        tokenizer = load_tokenizer(directory)  # what is wrong with it is said before gigabytes are read
        if published:
            model: Any = load_published(directory, dtype=getattr(torch, dtype))
            family = family_of(model.config.model_type)
        else:
            family = family_of(str(read_json((directory / "config.json").resolve()).get("model_type")))
            model = _load_library_model(
                directory, family, dtype=dtype, device_map=device_map, quantisation=quantisation
            )
        processor = _load_processor(directory, family, model.config)
    except (ModelError, ConfigError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of any class: a hostile or cut file fails wherever it is first looked at
        if "weights_only" in str(error):  # the library proposes to load it all the same
            raise ModelError(
                f"{directory} cannot be loaded: its pytorch_model.bin is refused, because it is damaged or holds more than "
                "tensors and could run code; download it again from the model's own authors, or use safetensors"
            ) from error
        raise ModelError(
            f"{directory} cannot be loaded: {one_line(error)}; it needs config.json, weights, tokenizer and "
            "preprocessor_config.json of one model"
        ) from error
    if device_map:
        refuse_offloaded(model, family, device_map)
    if not family.is_listed:
        logger.warning(
            "%s: model_type %r is not in the table of families (data/families/table.py), so only its logits can be "
            "cached: attention needs to know where its language model and its visual tokens are, and the teacher "
            "adapter needs its projector",
            directory,
            model.config.model_type,
        )
    return FamilyModel(model.eval(), family, tokenizer, processor)


def open_image_encoder(opened: FamilyModel, directory: Path) -> AnyImageEncoder:
    """How a model's pictures become visual tokens.

    Raises:
        ConfigError: If the settings of its image processor cannot be used.
        ModelError: If its configuration does not say it.
    """
    try:
        return opened.family.image_encoder(opened.model.config, opened.processor, opened.tokenizer)
    except (ConfigError, ModelError) as error:
        raise type(error)(f"{directory}: {error}") from error
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(
            f"{directory}: config.json and preprocessor_config.json do not say how pictures become visual tokens "
            f"({error!r}); use both files of one checkpoint"
        ) from error


def refuse_offloaded(model: Any, family: Family, device_map: str) -> None:
    """Refuse a placement that leaves parts without weights of their own, to be fetched for each forward pass.

    Raises:
        ConfigError: If the embedding, the vision tower or the projector is such a part: they are read by themselves.
    """
    parts = {"embedding": model.get_input_embeddings()}
    parts |= {
        name: submodule(model, path)
        for name, path in (("vision tower", family.vision_tower), ("projector", family.projector))
        if path
    }
    away = [name for name, part in parts.items() if any(p.device.type == "meta" for p in part.parameters())]
    if away:
        raise ConfigError(
            f"device_map={device_map!r} leaves no room on the devices for the {' and the '.join(away)}; use quantisation, "
            "a smaller dtype, or more devices"
        )


def rows_only(model: Any, rows: Tensor) -> AbstractContextManager[Any]:
    """Let only some rows enter the output projection of the one forward pass inside the block.

    The model's ``logits`` are then ``[1, A, V]``, in the order of ``rows``, whatever the model does to them behind
    the projection.

    Args:
        model: Any causal or vision-language model of the library, or one of ours.
        rows: Bool ``[B, T]``, on any device.

    Raises:
        ModelError: If the model has no output projection, or it is not given all rows.
    """
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output projection, so it gives no next-token logits")

    index = rows.flatten().nonzero()[:, 0]  # of rows on the CPU it is known without waiting for a GPU

    def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        if hidden.shape[:2] != rows.shape:
            raise ModelError(
                f"{type(model).__name__}: the output projection was given {list(hidden.shape[:2])} rows, expected "
                f"{list(rows.shape)}; this model cannot be used"
            )
        chosen = hidden.flatten(0, 1)[index.to(hidden.device, non_blocking=True)]  # [A, D]
        return (chosen[None], *inputs[1:])

    return head.register_forward_pre_hook(select)


def rows_instead(model: Any, rows: Tensor, on_rows: Callable[[Tensor, Any], Any], found: list[Any]) -> Any:
    """Hand the rows that would enter the output projection to a function, in the one forward pass inside the block.

    The projection itself then gets no row.

    Args:
        model: As for `rows_only`.
        rows: Bool ``[B, T]``.
        on_rows: Called with hidden states ``[A, D]`` and the projection.
        found: Gets what it returns.
    """
    head: nn.Module = model.get_output_embeddings()

    def hand_over(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(on_rows(inputs[0][rows.to(inputs[0].device)], module))
        return (inputs[0][:, :0], *inputs[1:])

    return head.register_forward_pre_hook(hand_over)


def row_logits(model: Any, inputs: Mapping[str, Any], rows: Tensor) -> Tensor:
    """Logits ``[A, V]`` of chosen rows (bool ``[B, T]``) by the model's own pass; ``[B, T, V]`` never exists."""
    with rows_only(model, rows):
        logits: Tensor = model(**inputs, use_cache=False).logits[0]
    return logits


def input_device(model: Any) -> torch.device:
    """Where a model's inputs must lie: with its embedding, wherever a device map has put the rest."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _load_processor(directory: Path, family: Family, config: Any) -> Any:
    if not family.is_listed:
        return load_processor(directory)
    stored = any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    # MobileVLM's checkpoints name the tower whose processor they use, and hold none.
    return load_image_processor(directory) if stored or family.model_class else default_image_processor(config)


def _load_library_model(
    directory: Path, family: Family, *, dtype: str, device_map: str, quantisation: Quantisation
) -> Any:
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if quantisation != "none":
        # One line for every layer of every pass: that inputs are rounded to float16 is what 8 bits are.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        # A quantised tower could not be compared with a student's, nor could the projector be handed on.
        kept = [part for part in (family.vision_tower, family.projector, "lm_head") if part]
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=quantisation == "8bit",
            load_in_4bit=quantisation == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=kept,
        )
    if device_map or quantisation != "none":
        options["device_map"] = device_map or ("cuda:0" if torch.cuda.is_available() else "cpu")
    model_class = getattr(transformers, family.model_class)
    model, loading = model_class.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
    )
    lost = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if lost:
        raise ModelError(
            f"{directory}: {len(lost)} weights are missing or of another shape ({', '.join(lost[:3])}), and would be "
            f"random; the directory is not a complete checkpoint of its config.json{_tie_hint(lost)}"
        )
    beyond = sorted(key for key in loading["unexpected_keys"] if _LAYER.search(str(key)))
    if beyond:
        raise ModelError(
            f"{directory}: the weights hold layers that config.json does not name ({', '.join(beyond[:3])}), so a part of "
            "the model would be left out; take config.json and weights of one checkpoint"
        )
    return model


def _tie_hint(lost: list[str]) -> str:
    if len(lost) != 1 or not lost[0].endswith("lm_head.weight"):
        return ""
    return "; if its output projection is the embedding, set tie_word_embeddings to true there, at the top"


def _check_placement(directory: Path, *, device_map: str, quantisation: str, published: bool) -> None:
    if published and (device_map or quantisation != "none"):
        raise ConfigError(
            f"{directory} is a checkpoint in its authors' own layout, for which device_map and quantisation are not "
            "available; choose a device instead (device=cuda:0)"
        )
    if quantisation != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantisation={quantisation}: bitsandbytes is not installed; run `pip install "
            "'vlm-distill-cache[quantised]'`, or set quantisation=none"
        )
