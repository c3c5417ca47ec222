"""Which losses leave the teacher's sinks out, and where their maps come from."""

from collections.abc import Mapping

from vlm_distill_cache.common.attention.sinks import SinkMap
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.tools.sinks import Part, read_sinks, sinks_of
from vlm_distill_cache.stage2_student.loss_weights import SINK_SUPPRESSED, LossWeights


def needed_sinks(losses: LossWeights) -> tuple[Part, ...]:
    """Of which parts of a teacher the losses must know the sinks: of text for rows of text, of visual rows for columns."""
    of_text = losses.answer_kind == SINK_SUPPRESSED and (losses.answer_attention or losses.text_attention)
    of_columns = losses.visual_columns_kind == SINK_SUPPRESSED and losses.visual_columns
    parts: dict[Part, bool] = {"language_model": bool(of_text), "visual_rows": bool(of_columns)}
    return tuple(part for part, needed in parts.items() if needed)


def sinks_for(cache: TeacherCache, losses: LossWeights, *, where: str) -> dict[str, SinkMap]:
    """The maps that the losses of a phase need of a cache, by part; empty where they need none.

    Args:
        where: The phase, for errors.

    Raises:
        CacheMismatchError: If the cache says nothing of them, with the remedy.
    """
    needed = needed_sinks(losses)
    if not needed:
        return {}
    known = read_sinks(cache)
    found: dict[str, SinkMap] = {}
    for part in needed:
        try:
            found[part] = sinks_of(cache, part, known=known)
        except CacheMismatchError as error:
            option = "answer_kind" if part == "language_model" else "visual_columns_kind"
            raise CacheMismatchError(
                f"{where}: {option}={SINK_SUPPRESSED}: {error}; or choose another {option}"
            ) from error
    return found


NO_SINKS: Mapping[str, SinkMap] = {}
