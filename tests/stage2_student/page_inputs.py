"""What pages are made of, drawn by lot: suites of published benchmarks, and a run with texts of an attacker's."""

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image

from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.scores.flips import Flip, Flips
from vlm_distill_cache.stage2_student.scores.metrics import Score, bootstrap
from vlm_distill_cache.stage2_student.scores.page.run_page import RunPage
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport
from vlm_distill_cache.stage2_student.scores.taught import Look, Taught, Word
from vlm_distill_cache.stage2_student.suite.measures import Measure, mean_measure, score

HOSTILE = "</style></title><script>top.ran.push(1)</script><img src=x onerror='top.ran.push(2)'>\"><b>\u202eevil"
RECORDS = [
    {
        "step": step,
        "phase": "dpt" if step < 100 else "dft",
        "lm": 2.0 / step,
        "total": 3.0 / step,
        "lr": 1e-3,
        "step_s": 0.1,
    }
    for step in range(1, 300)
]


def without_heads(page: str) -> str:
    """A page whose cells do not repeat the headings above them."""
    return re.sub(r' data-head="[^"]*"', "", page)


def write_suite(folder: Path, *, seed: int, name: str = "", text: str = "", units: int = 60) -> dict[str, Measure]:
    """A folder as `distill suite` leaves it, of a model called as it is; returns the measures of its benchmark, by name."""
    name = name or folder.name
    generator = np.random.default_rng(seed)
    ids = [f"item {place}{text}" for place in range(units)]
    kinds = {kind: ids[place::2] for place, kind in enumerate(("swap", f"add{text}"))}
    parts = [
        mean_measure(f"likelihood/{kind}", of, generator.integers(0, 2, len(of)), heading=kind)
        for kind, of in kinds.items()
    ]
    measures = [
        Measure(name="likelihood", parts=[part.name for part in parts], heading="likelihood"),
        *parts,
        Measure(name="precision", units=ids, hits=[0.0] * units, of=[0.0] * units),
        mean_measure("letter_bias", ids, generator.integers(-1, 2, units), gains=None),
    ]
    by_name = {measure.name: measure for measure in measures}
    counted = []
    for measure in measures:
        found = score(measure, by_name)
        ends = {key: None if found is None else getattr(found, key) for key in ("value", "low", "high")}
        head = {"name": measure.name, "heading": measure.heading or measure.name, "factor": 100, "gains": measure.gains}
        counted.append({**head, **ends, "units": units, "mean_of": len(measure.parts)})
    entry = {
        "layout": "sugarcrepe", "title": f"SugarCrepe{text}", "metric": "captions", "items": units,
        "left_out": {"items": 2, "reasons": [f"no picture{text}"]}, "notes": [f"a note{text}"], "fingerprint": "f",
        "instruction": f"Answer.{text}",
        "seconds": 1.5,
    }  # fmt: skip
    summary = {
        "format": 1, "student": {"name": name, "fingerprint": "abc"}, "prompts": "published", "limit": None,
        "files": {"benchmarks": f"a folder{text}", "images": [f"coco{text}"], "only": []},
        "benchmarks": {"sugarcrepe": {**entry, "measures": counted}}, "unread": {f"stray{text}.json": f"no known layout{text}"},
    }  # fmt: skip
    (folder / "sugarcrepe").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    keys = ("name", "heading", "factor", "gains", "summed", "parts")
    stored = [
        {key: getattr(measure, key) for key in keys}
        | {"units": list(measure.units), "hits": [float(x) for x in measure.hits], "of": [float(x) for x in measure.of]}
        for measure in measures
    ]
    (folder / "sugarcrepe" / "measures.json").write_text(
        json.dumps({**entry, "asked": dict.fromkeys(ids, "d"), "measures": stored})
    )
    lines = [{"of": "identity", "items": units, "seconds": 1.0}]
    lines += [{"item": unit, "results": [f"{name} on {unit}", [[0.0, 1]]]} for unit in ids]
    (folder / "sugarcrepe" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return by_name


def run_page(text: str = "") -> RunPage:
    """A page of a run of everything, ``text`` in all that comes from elsewhere."""
    picture = PIL.Image.effect_noise((90, 60), 80).convert("RGB")
    heat = PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 90))
    values = {f"swap{text}": [0.0, 1.0, 1.0], "add": [1.0, 0.0]}
    scores = {"likelihood": bootstrap([0.0, 1.0, 1.0]), f"likelihood/swap{text}": bootstrap([0.0, 1.0]),
              "questions": bootstrap([1.0, 0.0]), f"questions/yes{text}": bootstrap([1.0]), "letters/mean": bootstrap([1.0]),
              "teacher/kl": Score(value=0.4, low=0.3, high=0.5, items=4)}  # fmt: skip
    report = EvaluationReport(scores=scores, items={"likelihood": values})
    flips = [
        Flip(item_id=f"i{text}", kind=f"swap{text}", outcome=outcome, picture=picture,
             asked={"question": f"q{text}", "expected": text}, said={f"sft{text}": text, "distilled": text}, teacher=f"red{text}")
        for outcome in ("won", "lost")
    ]  # fmt: skip
    words = [
        Word(text=f"{word}{text}", likely=[(f"{word}{text}", 0.5)],
             looks={"teacher": Look(heat=heat, image_mass=0.5), f"sft{text}": Look(heat=heat, image_mass=0.5, cosine=0.25)})
        for word in ("a", "red", "cross")
    ]  # fmt: skip
    taught = [
        Taught(sample_id=f"s{place}{text}", question=f"what{text}", answer=f"a red cross{text}", written=bool(place), teacher=text,
               picture=picture, said={f"sft{text}": text}, words=words, chosen=1)
        for place in range(2)
    ]  # fmt: skip
    cache = {
        "place": f"cache{text}",
        "hash": "h",
        "signals": ["logits"],
        "teacher_name": text,
        "command": f"teacher-cache {text}",
    }
    return RunPage(
        title=f"run{text}",
        facts={"data": f"shapes{text}"},
        cost={"sft": {"parameters": "5"}, "teacher": {"cache": text}},
        curves={f"sft{text}": RECORDS, "distilled": RECORDS},
        on_the_way={
            f"sft{text}": [],
            "distilled": [
                {"step": step, "scores": {"questions": bootstrap([0.0, 1.0]).to_dict()}} for step in (100, 200, 299)
            ],
        },
        evaluations={f"sft{text}": report, "distilled": report},
        compared=(f"sft{text}", "distilled"),
        flips=[Flips(heading="captions", counts={"both": 1, "won": 2, "lost": 3, "neither": 4}, shown=flips)],
        taught=taught,
        provenance={"fingerprint": f"f{text}", "origin": {"caches": [cache], "versions": {"torch": text}},
                    "config": {"phases": ["dft"], "dft": {"losses": dict.fromkeys(LossWeights.names(), 0.0)}, "student": text}},
        notes=[f"a note{text}"],
    )  # fmt: skip
