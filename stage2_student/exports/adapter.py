"""The adapters of a student alone, as peft saves them, for the model that its training started from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import write_json_atomic
from vlm_distill_cache.common.hub import snapshot_name
from vlm_distill_cache.common.models.changed import changes_of
from vlm_distill_cache.common.models.parts import ADAPTER
from vlm_distill_cache.common.models.published import is_published
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.exports.folder import save_processor
from vlm_distill_cache.stage2_student.exports.source import Source, cast, refuse
from vlm_distill_cache.stage2_student.students.build import load_student
from vlm_distill_cache.stage2_student.students.library import LibraryStudent, open_library_student
from vlm_distill_cache.stage2_student.students.packed import pack_layers, unpack_layers
from vlm_distill_cache.stage2_student.students.presets import student_folder

LAYOUT = "adapter"
_SIDES = {"A": 0, "B": 1}  # along which adapters of several phases are joined


def write_adapter(target: Path, source: Source) -> Source:
    """Write what peft adds to the model that training started from: adapters, and the projector as it is now.

    Adapters of several phases add up: they are written as one, of the sum of their ranks.

    Raises:
        ConfigError: If peft is missing.
        ModelError: If the student is not that model with adapters and another projector.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"layout adapter needs peft ({error}); run: pip install 'vlm-distill-cache[lora]'") from error
    if source.quantise is not None:
        raise refuse(source, LAYOUT, "adapters are not quantised; leave --quantise out")
    settings = config_from_dict(TrainConfig, dict(source.provenance["config"]), where=str(source.folder))
    folder = _base_folder(source, settings)
    adapters, phases = _joined(source)
    base = load_student(folder) if is_published(folder) else open_library_student(folder).model.model
    if settings.quantisation != "none":
        if phases > 1:
            raise refuse(
                source,
                LAYOUT,
                f"its layers were packed again between {phases} phases of adapters, so that no sum of adapters is what was trained",
            )
        # What the adapters were trained on, and are compared with: the values that the packed layers stand for.
        layers = base.get_submodule(family_of(base.config.model_type).language_model).layers
        pack_layers(layers, dtype=torch.float32, device=torch.device("cpu"))
        unpack_layers(layers)
    if changes_of(base.config) != changes_of(source.core.config):
        changed = sorted(changes_of(source.core.config).keys() | changes_of(base.config).keys())
        raise refuse(
            source,
            LAYOUT,
            f"its config.json says {', '.join(changed)}, {folder} does not say the same, and adapters are run in that",
        )
    projector = family_of(base.config.model_type).projector
    scale = settings.lora.alpha / settings.lora.rank
    _check_sum(source, base, adapters, scale=scale, projector=projector, folder=folder)
    named = snapshot_name(folder)
    base.requires_grad_(False)
    model = get_peft_model(
        base,
        LoraConfig(
            r=settings.lora.rank * phases,
            lora_alpha=settings.lora.alpha * phases,
            target_modules=sorted(adapters),
            modules_to_save=[projector],
            bias="none",
        ),
    )
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(folder) if named is None else named.repository
    config.revision = None if named is None else named.revision
    inner = model.base_model.model
    with torch.no_grad():
        for name, sides in adapters.items():
            for side, value in sides.items():
                getattr(inner.get_submodule(name), f"lora_{side}")["default"].weight.copy_(value)
    trained = source.core.get_submodule(projector).state_dict()
    inner.get_submodule(projector).modules_to_save["default"].load_state_dict(trained)
    added = {name: value for name, value in model.named_parameters() if ".default." in name}
    for name, value in cast(added, source.dtype, where=str(source.folder)).items():
        model.get_parameter(name).data = value
    model.save_pretrained(target, save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)  # peft's, which says nothing
    said = json.loads((target / ADAPTER).read_text(encoding="utf-8"))
    # The order of a set, and a class that is imported from this project.
    write_json_atomic(
        target / ADAPTER, {**said, "target_modules": sorted(said["target_modules"]), "auto_mapping": None}
    )
    save_processor(
        target,
        model=source.core,
        encoder=source.encoder,
        image_processor=source.image_processor,
        source=source.folder,
    )
    return source


def _base_folder(source: Source, settings: TrainConfig) -> Path:
    try:
        folder = student_folder(settings.student, settings.student_weights)
    except ConfigError as error:
        raise refuse(source, LAYOUT, f"the model that its training started from is not there: {error}") from error
    if folder is None:
        raise refuse(
            source, LAYOUT, f"{settings.student} started from random weights, so there is no model to add them to"
        )
    return folder


def _joined(source: Source) -> tuple[dict[str, dict[str, Tensor]], int]:
    """A and B of each adapted layer by its name in the model, and the number of phases that trained adapters."""
    state = source.trained()
    last = {name: value for name, value in state["values"].items() if ".lora_" in name}
    phases = [*state["merged"], *([last] if last else [])]
    if not phases:
        raise refuse(source, LAYOUT, "no phase of its training had adapters that are left (trainable: lora)")
    prefix = "model." if isinstance(source.model, LibraryStudent) else ""
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for phase in phases:
        for name, value in phase.items():
            module, _, rest = name.removeprefix(prefix).partition(".lora_")
            parts.setdefault(module, {}).setdefault(rest[0], []).append(value)
    return {
        module: {side: torch.cat(values, _SIDES[side]) for side, values in sides.items()}
        for module, sides in parts.items()
    }, len(phases)


def _check_sum(
    source: Source,
    base: Any,
    adapters: Mapping[str, Mapping[str, Tensor]],
    *,
    scale: float,
    projector: str,
    folder: Path,
) -> None:
    """Refuse a student that is not its base with these adapters and another projector."""
    before, wrong = base.state_dict(), []
    for name, value in source.core.state_dict().items():
        if name.startswith(f"{projector}."):
            continue
        expected, sides = before.get(name), adapters.get(name.removesuffix(".weight"))
        if expected is None or expected.shape != value.shape:
            wrong.append(name)
        elif sides is None:
            wrong += [] if torch.equal(expected, value) else [name]
        elif not torch.allclose(expected + scale * sides["B"] @ sides["A"], value, rtol=1e-4, atol=1e-5):
            wrong.append(name)
    if wrong:
        raise ModelError(
            f"{source.folder}: is more than {folder} with adapters and another projector: {len(wrong)} other weights differ, which "
            f"peft cannot add ({', '.join(wrong[:3])}): a phase trained them as such (trainable: all or tower; embeddings beside "
            "the projector), rows were added for the tokenizer's tokens, or that folder has changed since; `--layout auto` "
            "writes the whole student"
        )
