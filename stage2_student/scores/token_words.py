"""How many of its visual tokens a model feeds and attends to, and how it chooses them, in words. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_distill_cache.stage2_student.pruned_folder import fed_words, read_settings

CHANGES = ("visual_tokens", "decoding_tokens")
_CHOSEN = {
    "attention": "those that its vision tower looks at most",
    "sinks": "those that its vision tower looks at most, less {sink_penalty:g} times how much of a sink their place is",
    "gaze": "those where a regression on its vision tower's features expects the teacher to look",
    "grid": "averages over the cells of a coarser grid",
    "random": "drawn at random, the same ones for the same picture",
}


def token_words(folder: Path) -> dict[str, str]:
    """What a model's ``config.json`` says of its visual tokens: by the change's name; empty where all are used."""
    return words_of(read_settings(folder / "config.json").get("distilled"))


def words_of(changes: object) -> dict[str, str]:
    """The same of what is stored; anybody may have written it, so what is not understood is left out."""
    found: Mapping[str, Any] = changes if isinstance(changes, Mapping) else {}
    said = {}
    fed, decoded = (found.get(name) for name in ("visual_tokens", "decoding_tokens"))
    if isinstance(fed, Mapping) and (count := _count(fed.get("keep"))) and fed.get("by") in _CHOSEN:
        how = _CHOSEN[str(fed["by"])].format(sink_penalty=_number(fed.get("sink_penalty")))
        merge = _number(fed.get("merge_frames"))
        frames = (
            f"; of several pictures, what stays as alike as {merge:g} from one to the next is left out" if merge else ""
        )
        said["visual_tokens"] = f"{count} of a picture's visual tokens are fed into the language model, {how}{frames}"
    if isinstance(decoded, Mapping) and (count := _count(decoded.get("keep"))):
        swaps = (
            f", and others as soon as these hold less than {_number(decoded.get('shift_threshold')):g} of what the best would"
            if decoded.get("by") == "shift"
            else ""
        )
        said["decoding_tokens"] = (
            f"a generated token sees {count} of the visual tokens that were read, those that the prompt's last token looked "
            f"at most{swaps}; generated answers alone change by it: likelihood, captions by likelihood, agreement, KL and "
            "attention decode nothing, so they are those of the same student without it"
        )
    return said


def fed_of(folder: Path, layout: Mapping[str, Any]) -> dict[str, str]:
    """The same of a student's folder, by the name of a fact of its card; empty where it feeds all, or the number varies."""
    changes = read_settings(folder / "config.json").get("distilled")
    fed = changes.get("visual_tokens") if isinstance(changes, Mapping) else None
    if not isinstance(fed, Mapping) or fed.get("by") not in _CHOSEN or (keep := _number(fed.get("keep"))) <= 0:
        return {}
    said = fed_words(keep, str(fed["by"]), layout)
    return {"of a picture": said} if said else {}


def select_command(folder: Path, config: Mapping[str, Any]) -> str:
    """The command that chose tokens of a finished student, if its training, of this configuration, did not; else empty."""
    found = read_settings(folder / "config.json").get("distilled")
    said = words_of(found)
    given = []
    for head, by in (("visual_tokens", "token_selection"), ("decoding_tokens", "decoding_selection")):
        if head in said and config.get(head) is None and isinstance(found, Mapping):
            options = {head: found[head]["keep"], by: found[head]["by"]}
            if found[head]["by"] == "sinks":
                options["sink_penalty"] = _number(found[head].get("sink_penalty"))
            if found[head]["by"] == "shift":
                options["shift_threshold"] = _number(found[head].get("shift_threshold"))
            if found[head]["by"] == "random" and (seed := int(_number(found[head].get("seed")))):
                options["seed"] = seed
            if merge := _number(found[head].get("merge_frames")):
                options["merge_frames"] = merge
            given += [f"--{name.replace('_', '-')} {value}" for name, value in options.items()]
            given += ["--cache CACHE"] if found[head]["by"] in ("sinks", "gaze") else []
    return f"distill select-tokens OUTPUT/final --output SELECTED {' '.join(given)}" if given else ""


def _count(keep: object) -> str:
    """A share or a number of tokens; empty if it is neither."""
    number = _number(keep)
    if number <= 0:
        return ""
    return f"{100 * number:.4g} %" if number < 1 else f"at most {number:.0f}"


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e30 <= value <= 1e30:
        return 0.0
    return float(value)
