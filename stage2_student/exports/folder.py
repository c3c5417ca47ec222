"""A student's folder as the model library opens it, where this project is not installed, too.

A student of the library's keeps all files of its processor, tokenizer and generation. One of our own classes gets their
code beside its weights: the modules that trained it, with imports of one another in place of imports of this project;
``config.json`` names them (``auto_map``), so that the library runs them where ``trust_remote_code`` allows it. We never
do. The chat template writes what the student was trained on, or a line says that it does not.
"""

import inspect
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from transformers import AutoProcessor, GenerationConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import parse_json, read_bounded
from vlm_distill_cache.common.files.rules import OBJECT, check, maybe, record, whole
from vlm_distill_cache.common.models import changes as all_changes
from vlm_distill_cache.common.models.changed import CHANGES, Changed, changed_class
from vlm_distill_cache.common.models.llava import LlavaOfAnyDepth
from vlm_distill_cache.common.models.processing import VisionLanguageProcessor
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.generation import pad_token_id
from vlm_distill_cache.data.text.jinja_template import chat_template_of
from vlm_distill_cache.data.text.template_process import render_template
from vlm_distill_cache.stage2_student.students.model import StudentModel

# Of a checkpoint's files those that saving model, tokenizer and image processor may not write again, and how many bytes
# each may have. The library's code takes settings of all JSON here; a repository's own code is never named.
_KEPT = {
    **dict.fromkeys(("processor_config.json", "video_preprocessor_config.json"), 1 << 20),
    **dict.fromkeys(("generation_config.json", "special_tokens_map.json", "added_tokens.json"), 1 << 24),
    **dict.fromkeys(("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"), 1 << 26),
}
_COUNTED = ("patch_size", "num_additional_image_tokens", "num_image_tokens", "image_seq_len", "image_seq_length")
_PROCESSOR = record({}, dict.fromkeys(_COUNTED, maybe(whole(0, 1 << 13))), free=True)  # so often a word is written
_OURS = re.compile(r"^from vlm_distill_cache\.((?:\w+\.)*(\w+)) import", re.MULTILINE)
_AUTO_MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
_QUESTION = " What is it?  Na\u00efve \u732b, 1234! \n"  # brings out blanks, accents, digits
_log = logging.getLogger(__name__)


def save_student_folder(
    target: Path, *, model: StudentModel, encoder: SampleEncoder, image_processor: Any, source: Path | None
) -> None:
    """Write all that the library's ``from_pretrained`` of model, processor and tokenizer needs, and pipelines.

    Args:
        target: A folder that is there; files of the same names are replaced.
        encoder: How the student was trained: with which tokenizer and prompts.
        image_processor: As the student was opened with; of a family that is not listed the whole processor.
        source: The student's own folder as it was before, whose files are kept; None: it had none.
    """
    inner: Any = model if isinstance(model, VisionLanguageModel) else getattr(model, "model", model)
    inner.generation_config = _saveable(inner.generation_config)
    model.save_pretrained(target)
    save_processor(target, model=inner, encoder=encoder, image_processor=image_processor, source=source)


def save_processor(
    target: Path, *, model: Any, encoder: SampleEncoder, image_processor: Any, source: Path | None
) -> None:
    """Write what the library's processor and ``generate`` need beside a model; arguments as of `save_student_folder`.

    ``model`` is ours or the library's; its ``config.json`` names our code, if that is there. Batches are padded in front:
    behind a padded prompt no answer begins.
    """
    encoder.tokenizer.save_pretrained(target)
    image_processor.save_pretrained(target)
    _mend_tokenizer(target, encoder)
    ours = _our_classes(model, encoder)
    if ours:
        _write_own(target, ours, encoder)
    else:
        if source is not None:
            keep_files(source, target)
        _write_library(target, model.config, encoder)
        if isinstance(model, Changed) and (target / "config.json").exists():
            write_model_code(target, model)
    for name in ("tokenizer_config.json", "processor_config.json"):
        path = target / name
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            path.write_bytes(_json(_padded_left(stored, at_top=name.startswith("tokenizer"))))
    _end_as_trained(target, encoder)
    _compare_prompts(target, encoder, own=bool(ours))


def keep_files(source: Path, target: Path) -> None:
    """Copy what a checkpoint has of processor, tokenizer and generation, unless it is there already.

    Regular files of known names and of a bounded size only, through the links of the hub's cache; what is damaged or
    larger is left behind, with a warning.
    """
    if not source.is_dir():
        _log.warning("%s is gone: what it held of processor and generation is not kept", source)
    for name, most in _KEPT.items():
        path, copy = source / name, target / name
        if copy.exists() or not path.exists():
            continue
        try:
            data = read_bounded(Path(os.path.realpath(path)), max_bytes=most)
            if name.endswith(".json"):
                rule = _PROCESSOR if name == "processor_config.json" else OBJECT
                stored = check(parse_json(data, str(path)), rule, str(path), remedy="download it again")
                if stored.pop("auto_map", None) is not None:
                    data = _json(stored)
        except CacheFormatError as error:
            _log.warning("%s; it is left out of %s", error, target.name)
            continue
        copy.write_bytes(data)


def _our_classes(model: Any, encoder: SampleEncoder) -> dict[str, type[Any]]:
    """What of a model the library does not have, by the name of its class that is to find it."""
    if isinstance(model, VisionLanguageModel):
        return {"AutoConfig": type(model.config), **dict.fromkeys(_AUTO_MODELS, type(model))}
    has_token = encoder.image_token_id in encoder.tokenizer.added_tokens_decoder
    if model.config.model_type == "llava" and (isinstance(model, LlavaOfAnyDepth) or not has_token):
        return dict.fromkeys(
            _AUTO_MODELS, changed_class(LlavaOfAnyDepth) if isinstance(model, Changed) else LlavaOfAnyDepth
        )
    return {}


def _write_own(target: Path, ours: Mapping[str, type[Any]], encoder: SampleEncoder) -> None:
    """Code, of the model where that lies there, and who reads pictures and texts with it."""
    has_model = (target / "config.json").exists()
    ours = {**(ours if has_model else {}), "AutoProcessor": VisionLanguageProcessor}
    auto_map = _write_code(target, ours)
    (target / "processor_config.json").write_bytes(
        _json(
            {
                "auto_map": {"AutoProcessor": auto_map["AutoProcessor"]},
                "processor_class": VisionLanguageProcessor.__name__,
                "layout": encoder.image_encoder.to_dict()["layout"],
                "image_token": encoder.image_token,
                "image_token_id": encoder.image_token_id,
                "visual_tokens": encoder.image_encoder.token_count,
                "adds_special_tokens": not encoder.template.bos_after_image,
            }
        )
    )
    template = chat_template_of(encoder.template, encoder.tokenizer, encoder.image_token)
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def is_ours(model: Any) -> bool:
    """Whether a model needs code that the library does not have: ours, changed, or a LLaVA whose image token is none."""
    return isinstance(model, Changed | VisionLanguageModel | LlavaOfAnyDepth) or _lacks_image_token(model)


def write_model_code(target: Path, model: Any) -> None:
    """Write the code of such a model's class beside its weights, and name it in ``config.json``."""
    ours = {"AutoConfig": type(model.config)} if isinstance(model, VisionLanguageModel) else {}
    model_class: Any = type(model)
    if _lacks_image_token(model) and not isinstance(model, LlavaOfAnyDepth):
        model_class = changed_class(LlavaOfAnyDepth) if isinstance(model, Changed) else LlavaOfAnyDepth
    _write_code(target, {**ours, **dict.fromkeys(_AUTO_MODELS, model_class)})


def _lacks_image_token(model: Any) -> bool:
    """Whether the image token of a LLaVA is beyond its vocabulary, as in the original layout."""
    if model.config.model_type != "llava":
        return False
    return bool(model.config.image_token_id >= model.get_input_embeddings().weight.shape[0])


def _write_code(target: Path, classes: Mapping[str, type[Any]]) -> dict[str, str]:
    """Write the code of classes, name them in ``config.json`` if there is one, and return how they are named."""
    config = target / "config.json"
    changes = (json.loads(config.read_text(encoding="utf-8")).get(CHANGES) or {}) if config.exists() else {}
    for name, source in code_of({one.__module__ for one in classes.values()}, changes=changes).items():
        (target / f"{name}.py").write_text(source, encoding="utf-8")
    auto_map = {auto: f"{one.__module__.rpartition('.')[2]}.{one.__name__}" for auto, one in classes.items()}
    if config.exists():
        _update(config, auto_map=auto_map)
    return auto_map


def code_of(modules: Iterable[str], *, changes: Collection[str] = ()) -> dict[str, str]:
    """Source of modules and of all of ours that they import, by the last part of their names.

    Each imports the others from beside it. Of what can be changed in a student only ``changes`` are there.
    """
    found: dict[str, str] = {}
    wanted = sorted(modules)
    while wanted:
        name = wanted.pop()
        module = import_module(name)
        source = _source_of_changes(changes) if module is all_changes else inspect.getsource(module)
        found[name.rpartition(".")[2]] = _OURS.sub(r"from .\2 import", source)
        theirs = {f"vlm_distill_cache.{path}" for path, _ in _OURS.findall(source)}
        wanted += sorted(one for one in theirs if one.rpartition(".")[2] not in found)
    return dict(sorted(found.items()))


def _source_of_changes(names: Collection[str]) -> str:
    """The module of all changes with these alone."""
    applied = {name: apply for name, apply in all_changes.APPLIED.items() if name in names}
    lines = [f"from {apply.__module__} import {apply.__name__}" for apply in applied.values()]
    table = ", ".join(f'"{name}": {apply.__name__}' for name, apply in applied.items())
    return "\n".join(['"""The changes that this student has."""', "", *lines, "", f"APPLIED = {{{table}}}", ""])


def _write_library(target: Path, config: Any, encoder: SampleEncoder) -> None:
    """The processor's settings, where its checkpoint had none, and the chat template, where another was trained."""
    family = str(config.model_type)
    if class_name := PROCESSOR_MAPPING_NAMES.get(family):
        path = target / "processor_config.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known = {"processor_class": class_name, **_processor_settings(config)}
        if missing := {name: value for name, value in known.items() if stored.get(name) is None}:
            path.write_bytes(_json({**stored, **missing}))
    adds_rest = family == "paligemma"
    template = chat_template_of(encoder.template, encoder.tokenizer, encoder.image_token, adds_rest=adds_rest)
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def _processor_settings(config: Any) -> dict[str, Any]:
    """What the library's processor of a family must know of its model to count visual tokens."""
    family, vision = str(config.model_type), getattr(config, "vision_config", config)
    if family in ("llava", "llava_next"):
        return {
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": int(vision.model_type == "clip_vision_model"),
        }
    if family == "llava_onevision":
        return {
            "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "vision_aspect_ratio": config.vision_aspect_ratio,
        }
    if family in ("idefics3", "smolvlm"):
        return {"image_seq_len": (vision.image_size // vision.patch_size // config.scale_factor) ** 2}
    if family == "internvl":
        return {"image_seq_length": config.image_seq_length}
    return {"image_seq_length": config.mm_tokens_per_image} if family == "gemma3" else {}


def _saveable(found: GenerationConfig) -> GenerationConfig:
    """Generation settings that the library saves: some checkpoints name a temperature and leave sampling off."""
    try:
        found.validate(strict=True)
    except ValueError:
        return GenerationConfig.from_dict({**found.to_dict(), "do_sample": True})
    return found


def _mend_tokenizer(target: Path, encoder: SampleEncoder) -> None:
    """Store special tokens as the encoder reads them, which mends what some checkpoints say of theirs."""
    path = target / "tokenizer.json"
    if encoder.reader is encoder.tokenizer or not path.exists():
        return
    read = json.loads(encoder.reader.backend_tokenizer.to_str())["added_tokens"]
    flags = {token["content"]: {name: token[name] for name in ("normalized", "single_word")} for token in read}
    stored = json.loads(path.read_text(encoding="utf-8"))
    for token in stored["added_tokens"]:
        token.update(flags.get(token["content"], {}))
    path.write_text(json.dumps(stored, ensure_ascii=False, indent=2), encoding="utf-8")
    settings = target / "tokenizer_config.json"
    decoder = json.loads(settings.read_text(encoding="utf-8")).get("added_tokens_decoder")
    if decoder:
        mended = {number: {**token, **flags.get(token["content"], {})} for number, token in decoder.items()}
        _update(settings, added_tokens_decoder=mended)


def _end_as_trained(target: Path, encoder: SampleEncoder) -> None:
    """Generation ends where trained answers end, too."""
    path = target / "generation_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stored.pop("_from_model_config", None)  # some versions would then take the model's alone
    found = stored.get("eos_token_id")
    ids = sorted({*(found if isinstance(found, list) else [] if found is None else [found]), *encoder.end_token_ids})
    stored["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    if stored.get("pad_token_id") is None:
        stored["pad_token_id"] = pad_token_id(encoder)
    path.write_bytes(_json(stored))


def _compare_prompts(target: Path, encoder: SampleEncoder, *, own: bool) -> None:
    """Say so if the folder's processor reads a question otherwise than the student was trained to."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}]
    try:
        if own:
            processor = VisionLanguageProcessor.from_pretrained(target, local_files_only=True)
        else:
            processor = AutoProcessor.from_pretrained(target, local_files_only=True, trust_remote_code=False)
        picture = _Picture()
        asked = build_prompt(encoder, picture, _QUESTION).input_ids.tolist()
        # In a process of its own: a checkpoint's template may be anybody's.
        variables = json.dumps(processor.tokenizer.special_tokens_map, default=str)
        text = next(
            render_template((target / "chat_template.jinja").read_text("utf-8"), variables, messages, [(1, True)])
        )
        bos = processor.tokenizer.bos_token
        adds = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        read = np.asarray(processor(images=[picture.load()], text=[text], **adds)["input_ids"]).ravel().tolist()
    except Exception as error:  # noqa: BLE001 - the library's own, of any class, on somebody's files
        if "torchvision" in str(error).lower():
            _log.info("the library's processor of this student needs torchvision, so it was not tried here")
        else:
            _log.warning(
                "the library's processor does not read this student's prompt (%s): elsewhere it cannot be asked through it",
                one_line(error, limit=200),
            )
    else:
        if read != asked:
            _log.warning(
                "the library's processor reads a question otherwise than this student was trained to (%d tokens, in training "
                "%d): asked through it, its answers will be worse",
                len(read),
                len(asked),
            )


class _Picture:
    """A grey picture to try a prompt with."""

    name = "picture"

    def load(self) -> PIL.Image.Image:
        """Its pixels."""
        return PIL.Image.new("RGB", (64, 48), (128, 128, 128))


def _padded_left(stored: Any, *, at_top: bool = False) -> Any:
    """Settings in which every side that batches are padded on is the left one; ``at_top``: also where none is named."""
    if not isinstance(stored, dict):
        return stored
    left = {"padding_side": "left"} if at_top or "padding_side" in stored else {}
    return {name: _padded_left(value) for name, value in stored.items()} | left


def _update(path: Path, **changes: Any) -> None:
    path.write_bytes(_json({**json.loads(path.read_text(encoding="utf-8")), **changes}))


def _json(value: Mapping[str, Any]) -> bytes:
    """As the library writes its settings."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
