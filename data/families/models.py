"""A checkpoint directory of any family as a loaded model with tokenizer and processor, for both stages.

Also the one way to get logits of chosen rows from any of them: the model's own forward pass runs, and only the
wanted rows enter the output projection, so soft-capping or scaling of logits is the library's own code.

Dims: B batch, T sequence, A wanted rows, V vocabulary.
"""

import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.hub import is_without_weights
from vlm_distill_cache.common.models.changed import CHANGES, changed_class
from vlm_distill_cache.common.models.checkpoint import Checkpoint
from vlm_distill_cache.common.models.explained import explained_errors
from vlm_distill_cache.common.models.llava import llava_class, take_image_tokens
from vlm_distill_cache.common.models.original_llava import (
    is_original_llava,
    open_original_llava,
    original_config,
    original_image_processor,
)
from vlm_distill_cache.common.models.parts import read_config
from vlm_distill_cache.common.models.published import (
    default_image_processor,
    is_published,
    open_published,
    published_config,
)
from vlm_distill_cache.common.models.vision_language import rows_of
from vlm_distill_cache.data.families.shares import gather_columns, refuse_shares
from vlm_distill_cache.data.families.table import Family, family_of, submodule
from vlm_distill_cache.data.families.unusable import refuse_unusable
from vlm_distill_cache.data.families.videos import with_videos
from vlm_distill_cache.data.images.encoder import AnyImageEncoder
from vlm_distill_cache.data.images.library import load_processor
from vlm_distill_cache.data.text.processors import load_image_processor, load_tokenizer

logger = logging.getLogger(__name__)
_LAYER = re.compile(r"\.(layers?|blocks?|h)\.\d+\.")  # other left-over weights are the library's to judge
_CAST_ELEMENTS = 2**24  # of a weight, cast to float32 at once: 64 MiB

Quantisation = Literal["none", "8bit", "4bit"]


class FamilyModel(NamedTuple):
    """A model in evaluation mode, and what it reads with.

    Attributes:
        family: Its entry in the table.
        tokenizer: The library's fast one.
        processor: The PIL image processor; of a family that is not listed, the library's whole processor.
        image_encoder: How its pictures become visual tokens.
        weight_files: By name, where weights lie that a directory does not hold as a saved model does.
    """

    model: Any
    family: Family
    tokenizer: Any
    processor: Any
    image_encoder: AnyImageEncoder
    weight_files: Mapping[str, Path] = MappingProxyType({})


def open_family_model(
    directory: Path, *, dtype: str = "float32", device_map: str = "", quantisation: Quantisation = "none"
) -> FamilyModel:
    """Load a checkpoint directory; arguments and errors are those of `find_family_model`."""
    opened, load = find_family_model(directory, dtype=dtype, device_map=device_map, quantisation=quantisation)
    return opened._replace(model=load())


def find_family_model(
    directory: Path,
    *,
    dtype: str = "float32",
    device_map: str = "",
    quantisation: Quantisation = "none",
    tensor_parallel: int = 1,
    vision_tower: Path | None = None,
) -> tuple[FamilyModel, Callable[[], Any]]:
    """Look through a checkpoint directory: a library model of any family; MobileVLM, CompoDistill or LLaVA as published.

    No value of the weights is read: configuration, names and shapes of all tensors, tokenizer and image processor are.

    Args:
        directory: Model, tokenizer and image processor files.
        dtype: Computation dtype, a name of torch's.
        device_map: As the library takes it (``auto``, ``balanced``, ``cuda:1``); empty: on the CPU, for the caller to
            move.
        quantisation: Of the language model's weights, by bitsandbytes; tower and projector keep ``dtype``.
        tensor_parallel: Processes among which the library divides it, this one a part; their group must be there when it loads.
        vision_tower: Directory of the CLIP tower, for a published MobileVLM or LLaVA; it replaces one that is there.

    Returns:
        What is there, its model on no device (meta: names, shapes and kinds), and what loads the model.

    Raises:
        ModelError: If the directory holds no usable model, or only part of its weights; some of it when it is loaded.
        ConfigError: If bitsandbytes or accelerate is missing for what is asked, settings of its image processor cannot be
            used, or the model cannot be divided.
    """
    if is_without_weights(directory):
        return describe_family_model(directory), lambda: None
    with explained_errors(directory):
        found = _look_through(directory, vision_tower)
        if found.is_published and (device_map or quantisation != "none"):
            raise ConfigError(
                f"{directory} is a checkpoint in its authors' own layout, for which device_map and quantisation are not "
                "available; choose a device instead (device=cuda:0)"
            )
        refuse_shares(directory, found.shell, found.family, tensor_parallel)
        settings = _read_settings(
            directory,
            found.family,
            found.shell.config,
            tokenizer_folder=found.tokenizer_folder,
            processor_folders=found.published.processor_folders if found.original and found.published else [directory],
            names_processor=found.published is not None,
            original=found.original,
        )
        on_cpu = device_map == "cpu" or not (device_map or torch.cuda.is_available())
        odd = odd_columns(found.shell, found.family) if quantisation == "4bit" and on_cpu else []
        if odd:
            logger.warning(
                "%s: %d layers stay in %s, because their columns are no multiple of %d: %s",
                directory, len(odd), dtype, BLOCK, odd[:3],
            )  # fmt: skip
        options = placement(found.family, dtype=dtype, device_map=device_map, quantisation=quantisation, kept=odd)
        if tensor_parallel > 1:
            options["distributed_config"] = DistributedConfig(tp_size=tensor_parallel)
    _, family, tokenizer, processor, image_encoder = settings

    def load() -> Any:
        with explained_errors(directory):
            model = found.load(dtype=getattr(torch, dtype), **options)
            if model.config.model_type == "llava":
                take_image_tokens(model)
            if "quantization_config" in read_config(directory):
                unify_dtype(model, getattr(torch, dtype))
        if quantisation == "4bit":
            keep_odd_rows_unpacked(model)
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
        return model.eval()

    return FamilyModel(found.shell, family, tokenizer, processor, image_encoder, found.weight_files), load


def describe_family_model(directory: Path) -> FamilyModel:
    """What `find_family_model` finds, of a directory whose weights need not be there; its model is on no device (meta).

    Raises:
        ModelError: As of `find_family_model`; also if only the weights would say what there is (MobileVLM's own layout).
    """
    if not is_without_weights(directory):
        return find_family_model(directory)[0]
    settings = open_family_settings(directory)
    config, family, tokenizer, processor, image_encoder = settings
    if not family.model_class:
        raise ModelError(f"{directory}: what it holds is known once its weights are here; `hf download` brings them")
    with explained_errors(directory), torch.device("meta"):
        shell = _class_of(family, config.to_dict())._from_config(config)
    return FamilyModel(shell, family, tokenizer, processor, image_encoder)


class FamilySettings(NamedTuple):
    """What a checkpoint directory says without its weights; as of `FamilyModel`."""

    config: Any
    family: Family
    tokenizer: Any
    processor: Any
    image_encoder: AnyImageEncoder


def open_family_settings(directory: Path) -> FamilySettings:
    """Read all of a checkpoint directory but its weights, which need not be there.

    Raises:
        ModelError: If configuration, tokenizer or image processor cannot be used.
        ConfigError: As of `open_family_model`.
    """
    original = is_original_llava(directory)
    names_processor = original or is_published(directory)
    if names_processor:
        config = original_config(directory) if original else published_config(directory)
    else:
        with explained_errors(directory):
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return _read_settings(
        directory,
        family_of(str(config.model_type)),
        config,
        tokenizer_folder=directory,
        processor_folders=[directory],
        names_processor=names_processor,
        original=original,
    )


def _read_settings(
    directory: Path,
    family: Family,
    config: Any,
    *,
    tokenizer_folder: Path,
    processor_folders: Sequence[Path],
    names_processor: bool,
    original: bool,
) -> FamilySettings:
    """Tokenizer and image processor.

    Args:
        names_processor: Whether the checkpoint may name the tower whose processor it uses, and hold none (MobileVLM, LLaVA).
        original: Whether it is LLaVA's own layout.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    if original and config.image_token_index < len(tokenizer):
        config.image_token_index = len(tokenizer)  # a place holder, which no token of a text may have
    folder: Path | None = None
    if not family.is_listed:
        processor = load_processor(directory)
    else:
        names = ("preprocessor_config.json", "processor_config.json")
        folder = next((one for one in processor_folders if any((one / name).is_file() for name in names)), None)
        if folder is None and names_processor:
            processor = default_image_processor(config)
        else:
            processor = load_image_processor(folder or directory)
        if original:
            processor = original_image_processor(read_config(directory), processor)
    image_encoder = _open_image_encoder(family, config, processor, tokenizer, directory)
    if family.frames is not None:
        image_encoder = with_videos(image_encoder, config, tokenizer, folder or directory, family.frames)
    return FamilySettings(config, family, tokenizer, processor, image_encoder)


class _Found(NamedTuple):
    """A directory that was looked through; ``shell`` is its model on no device, and ``load`` reads its weights."""

    family: Family
    shell: Any
    load: Callable[..., Any]
    tokenizer_folder: Path
    published: Checkpoint | None = None
    original: bool = False

    @property
    def is_published(self) -> bool:
        """Whether one of our own classes is the model's, which places no weights."""
        return self.published is not None and not self.original

    @property
    def weight_files(self) -> Mapping[str, Path]:
        return self.published.files if self.published is not None else {}


def _look_through(directory: Path, vision_tower: Path | None) -> _Found:
    """What a directory holds, and whether it is all there."""
    original = is_original_llava(directory)
    if original or is_published(directory):
        opening = open_original_llava if original else open_published
        checkpoint = opening(directory, vision_tower=vision_tower)
        family, folder = family_of(checkpoint.config.model_type), checkpoint.tokenizer_folder
        return _Found(family, checkpoint.shell, checkpoint.load, folder, checkpoint, original)
    if vision_tower is not None:
        raise ConfigError(
            f"vision_tower={vision_tower}: {directory} holds its own vision tower; leave vision_tower out, it is for "
            "published MobileVLM and LLaVA checkpoints and for students that are built"
        )
    refuse_unusable(directory)
    stored = read_config(directory)
    family = family_of(str(stored.get("model_type")))
    model_class = _class_of(family, stored)
    # On no device: names, shapes and kinds are compared, no memory is taken.
    if "quantization_config" in stored:  # of packed weights that can only be done when they are loaded
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            shell = model_class._from_config(config)
    else:
        shell = _load_library_model(directory, model_class, device_map="meta")
    load = partial(_load_library_model, directory, model_class)
    return _Found(family, shell, load, directory)


def _class_of(family: Family, stored: Mapping[str, Any]) -> Any:
    """The library's class of a configuration, with what it says is changed."""
    depth = stored.get("projector_depth")
    model_class: Any = getattr(transformers, family.model_class) if depth is None else llava_class(depth)
    return model_class if stored.get(CHANGES) is None else changed_class(model_class)


def _open_image_encoder(
    family: Family, config: Any, processor: Any, tokenizer: Any, directory: Path
) -> AnyImageEncoder:
    try:
        return family.image_encoder(config, processor, tokenizer)
    except (ConfigError, ModelError) as error:
        raise type(error)(f"{directory}: {error}") from error
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(
            f"{directory}: config.json and preprocessor_config.json do not say how pictures become visual tokens "
            f"({error!r}); use both files of one checkpoint"
        ) from error


def unify_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring all that is not quantised to one precision: of quantised checkpoints the library leaves some as they are stored."""
    for value in (*model.parameters(), *model.buffers()):
        if value.dtype in (torch.float16, torch.bfloat16, torch.float32):
            value.data = value.data.to(dtype)


BLOCK, PACKED_ROWS = 64, 32  # of bitsandbytes' 4-bit weights, and of what it packs for AVX-512 BF16


def odd_columns(shell: Any, family: Family) -> list[str]:
    """Layers of the language model whose columns are no multiple of the 4-bit block: bitsandbytes computes them wrongly on a CPU.

    In 0.50 a row of 32 or 48 weights comes back with an error of 37 % instead of 9 %.
    """
    inside = submodule(shell, family.language_model) if family.language_model else shell
    prefix = f"{family.language_model}." if family.language_model else ""
    return [
        f"{prefix}{name}" for name, part in inside.named_modules() if isinstance(part, nn.Linear) and part.in_features % BLOCK
    ]  # fmt: skip


def keep_odd_rows_unpacked(model: Any) -> None:
    """Let 4-bit layers of any number of rows run on any processor.

    Where a CPU has AVX-512 BF16, bitsandbytes packs weights for a kernel of its own in the first pass, and an assertion
    fails where rows are no multiple of 32. Such layers are left to the kernels that other processors use.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = module.out_features % PACKED_ROWS == 0


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

    def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rows_of(inputs[0], rows)[None], *inputs[1:])

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
        found.append(on_rows(rows_of(inputs[0], rows), module))
        return (inputs[0][:, :0], *inputs[1:])

    return head.register_forward_pre_hook(hand_over)


def row_logits(model: Any, inputs: Mapping[str, Any], rows: Tensor) -> Tensor:
    """Logits of chosen rows (bool ``[B, T]``) by the model's own pass, float32 ``[A, V]``; ``[B, T, V]`` never exists.

    In half precision the projection alone would round each logit to 8 or 11 bits: at bfloat16 that moves the gradient of
    a student by 1 to 3 %, several times what the codec does, and no comparison with the same teacher shows it.
    """
    with rows_only(model, rows), _float32_projection(model.get_output_embeddings()):
        logits: Tensor = model(**inputs, use_cache=False).logits[0]
    return logits


@contextmanager
def _float32_projection(head: Any) -> Iterator[None]:
    """In the block an output projection in half precision computes in float32; the model goes on with what it gives."""
    if type(head) is not nn.Linear or head.weight.dtype.itemsize >= torch.float32.itemsize:
        yield
        return
    if isinstance(head.weight, DTensor):  # in its own pass each process would wait for the others' parts of no row
        module: Any = head
        divided = module.forward
        module.forward = partial(_project_shares, module)
        try:
            yield
        finally:
            module.forward = divided
        return
    found: list[Tensor] = []

    def project(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(_project(inputs[0], module.weight, module.bias))
        return (inputs[0][:, :0], *inputs[1:])

    def instead(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return found.pop()

    with head.register_forward_pre_hook(project), head.register_forward_hook(instead):
        yield


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 ``[1, A, V]`` of hidden states ``[1, A, D]``; the weight is cast once, a block of the vocabulary at a time."""
    rows = hidden[0].to(weight.device, torch.float32)  # [A, D]
    logits = rows.new_empty(len(rows), len(weight))
    step = max(1, _CAST_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        block = slice(start, start + step)
        logits[:, block] = rows @ weight[block].float().t()
    return (logits if bias is None else logits.add_(bias.float()))[None]


def _project_shares(head: Any, hidden: Tensor) -> Tensor:
    """`_project`, by a projection whose rows are divided among processes."""
    own = _project(hidden, head.weight.to_local(), None if head.bias is None else head.bias.to_local())[0]
    return gather_columns(own, head.weight)[None]


def input_device(model: Any) -> torch.device:
    """Where a model's inputs must lie: with its embedding, wherever a device map has put the rest."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def placement(
    family: Family, *, dtype: str, device_map: str, quantisation: Quantisation, kept: Sequence[str] = ()
) -> dict[str, Any]:
    """The library's options for weights that are placed or quantised as they are read; ``kept`` layers are not quantised.

    Raises:
        ConfigError: If bitsandbytes is missing.
    """
    options: dict[str, Any] = {}
    if quantisation != "none":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"quantisation={quantisation}: bitsandbytes is not installed; run `pip install "
                "'vlm-distill-cache[quantised]'`, or set quantisation=none (of an export: leave --quantise out)"
            )
        # One line for every layer of every pass: that inputs are rounded to float16 is what 8 bits are. And one about faster
        # code for processors, which somebody else's server would give.
        for name in ("autograd._functions", "backends.cpu.ops"):
            logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)
        # A quantised tower could not be compared with a student's, nor could the projector be handed on.
        plain = [part for part in (family.vision_tower, family.projector, "lm_head") if part]
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=quantisation == "8bit",
            load_in_4bit=quantisation == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=[*plain, *kept],
        )
    if device_map or quantisation != "none":
        options["device_map"] = device_map or ("cuda:0" if torch.cuda.is_available() else "cpu")
    return options


def _load_library_model(directory: Path, model_class: Any, **options: Any) -> Any:
    model, loading = model_class.from_pretrained(
        directory,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused here, by their names
        **options,
    )
    lost = sorted(loading["missing_keys"]) + [
        f"{name} {list(found)} instead of {list(own)}" for name, found, own in sorted(loading["mismatched_keys"])
    ]
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
    left = sorted(str(key) for key in loading["unexpected_keys"])
    if left and options.get("device_map") == "meta":  # said once
        logger.info("%s: %d weights are of no part of this model and stay unused: %s", directory, len(left), left[:3])
    return model


def _tie_hint(lost: list[str]) -> str:
    if len(lost) != 1 or not lost[0].endswith("lm_head.weight"):
        return ""
    return "; if its output projection is the embedding, set tie_word_embeddings to true there, at the top"
