"""Where teacher and students of `make experiment-photos` look on held-out pictures, as a page; and the sinks of the teacher."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOSTLY = 0.5  # of the pictures: a place that attracts attention in more of them is a sink, whatever they show


def count_sinks(cache: Path) -> list[dict[str, Any]]:
    """The sinks that a cache shows (docs/method.md, sections 3 and 8).

    Returns:
        Of each part of the teacher that the cache tells of: ``part``, ``pictures``, ``places``, ``sinks`` (places that receive
        more than the mean and one standard deviation in more than `MOSTLY` of the pictures), ``share`` of the attention on
        the picture that these receive, and the ``strongest`` place: ``place``, ``share`` and ``sink_in``.
    """
    from vlm_distill_cache.common.opening import open_cache
    from vlm_distill_cache.common.tools.sinks import read_sinks, sink_values

    counted = []
    for part, of in sink_values(read_sinks(open_cache(cache)))["maps"].items():
        receives = [share for share, often in zip(of["shares"], of["often_share"], strict=True) if often > MOSTLY]
        strongest = {name: of["top"][0][name] for name in ("place", "share", "sink_in")}
        counted.append(
            {
                "part": f"{part} ({of['signal']})", "pictures": of["pictures"], "places": len(of["shares"]),
                "sinks": len(receives), "share": sum(receives), "strongest": strongest,
            }
        )  # fmt: skip
    return counted


def write_gaze(page: Path, *, cache: Path, data: str, students: Mapping[str, Path], shown: int) -> dict[str, float]:
    """Write the page: held-out pictures, and word by word where teacher and students look; the teacher's sinks below.

    Args:
        cache: Of these pictures, with the teacher's answer attention.
        data: What it was made of.
        students: Folders by name.
        shown: Pictures at most.

    Returns:
        How alike each student's gaze is to the teacher's: the cosine, mean over words and pictures.
    """
    from vlm_distill_cache.common.config import config_from_dict
    from vlm_distill_cache.common.opening import open_cache
    from vlm_distill_cache.common.tools.sinks import draw_sinks, read_sinks
    from vlm_distill_cache.stage2_student.config import TrainConfig
    from vlm_distill_cache.stage2_student.scores.page.elements import facts, picture, sections, write_page
    from vlm_distill_cache.stage2_student.scores.page.run_page import taught_cards
    from vlm_distill_cache.stage2_student.trained_student import open_student, show_taught

    opened = open_cache(cache)
    options = {"cache": str(cache), "output": str(page.parent), "data": data, "evaluation": {"overlays": shown}}
    config = config_from_dict(TrainConfig, options, where=str(page))
    models = {name: open_student(folder, device="cpu") for name, folder in students.items()}
    taught = show_taught(models, config, opened)
    alike = {
        name: statistics.mean(
            look.cosine or 0.0 for one in taught for word in one.words if (look := word.looks.get(name)) is not None
        )
        for name in students
    }
    title = "Where teacher and students look on held-out pictures"
    known = {
        "pictures": f"{len(taught)}, which nothing was trained on",
        "likeness to the teacher's gaze": "; ".join(f"{name}: cosine {value:.3f}" for name, value in alike.items()),
    }
    parts = {
        "Word by word": taught_cards(taught),
        "Sinks of the teacher": picture(draw_sinks(opened, read_sinks(opened)), "places that receive more than others"),
    }
    write_page(page, title, [f"<h1>{title}</h1>", facts(known), *sections(parts)])
    return {name: round(value, 4) for name, value in alike.items()}
