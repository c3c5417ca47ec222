"""What a teacher's family cannot give, said before anything is run."""

from collections.abc import Sequence

from vlm_distill_cache.common.errors import ModelError, SampleError
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

ATTENTION_SIGNALS = ("answer_attention", "text_attention", "visual_columns", "visual_map")


def refuse_signals(signals: Sequence[str], teacher: Teacher) -> None:
    """Refuse signals that the teacher's family cannot give.

    Args:
        signals: Names of the wanted ones.
        teacher: A loaded teacher.

    Raises:
        ModelError: Naming the signals, the reason and what to ask for instead.
    """
    family, kind = teacher.family, teacher.config.model_type
    others = [name for name in signals if name != "logits"]
    if others and not family.is_listed:
        raise ModelError(
            f"teacher {teacher.directory}: model_type {kind!r} is not in the table of families (data/families.py), "
            f"which says where language model, visual tokens and projector are; so {', '.join(others)} cannot be had: "
            "cache its logits only (--signals logits), or add an entry to the table"
        )
    attention = [name for name in signals if name in ATTENTION_SIGNALS]
    if attention and teacher.capture is None:
        raise ModelError(
            f"teacher {teacher.directory}: {', '.join(attention)} cannot be had: {teacher.no_attention}; cache its "
            "logits only (--signals logits)"
        )
    if "visual_map" in signals and family.visual_rows != "causal":
        sees = {"image": "their whole image", "prefix": "the whole prompt"}[family.visual_rows]
        raise ModelError(
            f"teacher {teacher.directory}: in model_type {kind!r} visual tokens see {sees}, and the codec of "
            "visual_map keeps the lower triangle only; leave visual_map out (answer_attention, text_attention and "
            "visual_columns are available)"
        )


def refuse_packing(dataset: Dataset, teacher: Teacher) -> None:
    """Refuse data that pack independent conversations where an image is seen differently in each.

    Only the first sample is looked at; `data.families.inputs` refuses later ones.

    Raises:
        ModelError: If they do.
    """
    packs = teacher.family.is_listed and teacher.family.visual_rows != "prefix"
    if packs or not len(dataset):
        return
    try:
        sample = dataset[0]
    except SampleError:
        return
    if sample.independent_turns and len(sample.turns) > 1:
        why = "visual tokens see the question" if teacher.family.is_listed else "masks are not known"
        raise ModelError(
            f"teacher {teacher.directory}: in model_type {teacher.config.model_type!r} {why}, and data "
            f"{dataset.name!r} hold {len(sample.turns)} independent questions about one picture in one sample; "
            "give data with one question a sample (a LLaVA .json or messages .jsonl)"
        )


def missing_projector(teacher: Teacher) -> str | None:
    """Why the teacher's projector is not handed on for the teacher adapter (TAF); None: it is."""
    if not teacher.family.is_listed:
        return f"model_type {teacher.config.model_type!r} is not in the table of families: its projector is not known"
    if teacher.family.projector_config(teacher.config) is None:
        return f"the projector of model_type {teacher.config.model_type!r} is no two-layer MLP on a tower's patch tokens"
    return None
