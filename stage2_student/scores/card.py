"""The README.md of a student: what it was taught by and on, what it scores, and how to load and to make it.

It is a function of what lies in the folder (`PROVENANCE`, `SCORES` and what libraries read there) and holds no date, so that
a repeated run writes the same bytes. Its last line is a digest of what stands above: by it a card that somebody has
edited is known, and is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_distill_cache.common.cache.document_rules import EVALUATION
from vlm_distill_cache.common.config import config_from_dict, config_to_dict
from vlm_distill_cache.common.errors import CacheFormatError, ModelError
from vlm_distill_cache.common.files.atomic import read_bounded, write_bytes_atomic
from vlm_distill_cache.common.files.rules import check, items, record, text
from vlm_distill_cache.common.files.signed import read_signed, write_signed
from vlm_distill_cache.common.hub import CARD, HubName, hub_name, on_hub
from vlm_distill_cache.common.printing import hide_secrets, markdown, markdown_code, one_line, printable
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.final_folder import FOR_OTHERS, PROVENANCE, own_file, read_provenance
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.pruned_folder import cut_words, read_settings
from vlm_distill_cache.stage2_student.scores.again import recipe_of, reproduce, shown_model, student_name
from vlm_distill_cache.stage2_student.scores.origin import UNKNOWN
from vlm_distill_cache.stage2_student.scores.results import (
    HEADLINE,
    SCORES_MEMORISED,
    EvaluationReport,
    format_score,
    table_rows,
)
from vlm_distill_cache.stage2_student.scores.token_words import fed_of, select_command, token_words

SCORES = "scores.json"
PLACE = "PATH_OR_NAME"  # of the student, in the lines that load it
GAIN = "distilled minus sft"  # a column of differences
_MOST_BYTES = 4 << 20
_SEAL = "<!-- written by vlm-distill-cache; sha256 of the lines above: {} -->\n"
_SEALED = re.compile(
    r"(.*\n)<!-- written by vlm-distill-cache; sha256 of the lines above: ([0-9a-f]{64}) -->\n", re.DOTALL
)
_RULE = record(
    {
        "data": text(1 << 16),
        "models": items(record({"name": text(1000), "report": EVALUATION}), least=1, most=100),
    },
    {"notes": items(text(1 << 16), most=1000), "compared": text(1 << 16)},
)
_AGREEMENT = ("teacher/", "attention/")  # of the names of scores that compare with the teacher, on samples of a cache
# What the Hub knows by an identifier; other licences are "other" to it, and named.
_LICENCES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
    cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma
    gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown
    unlicense wtfpl zlib
"""
_log = logging.getLogger(__name__)


class CardScores(NamedTuple):
    """What a card says of scores.

    Attributes:
        reports: By the name of a column; the first one is this student, `GAIN` a difference.
        data: What was scored on, in words.
        notes: What the scores do not tell, as sentences.
        compared: On which samples student and teacher were compared, in words.
    """

    reports: Mapping[str, EvaluationReport]
    data: str
    notes: Sequence[str] = ()
    compared: str = "samples of its cache"

    @property
    def of_training(self) -> bool:
        """Whether items scored on are of its training, all or some."""
        return any(SCORES_MEMORISED in note for note in self.notes)

    def part(self, *, agreement: bool) -> dict[str, EvaluationReport]:
        """The reports with the scores of items, or with the agreement with the teacher; those without any left out."""
        parts = {
            name: {key: score for key, score in report.scores.items() if key.startswith(_AGREEMENT) is agreement}
            for name, report in self.reports.items()
        }
        return {name: EvaluationReport(scores=scores) for name, scores in parts.items() if scores}


def write_card(
    folder: Path, provenance: Mapping[str, Any], *, scores: CardScores | None = None, replaced: Path | None = None
) -> None:
    """Write a student's card, unless somebody has edited the one that is there.

    Args:
        folder: With all that libraries read, and nothing else that the card depends on.
        provenance: What `PROVENANCE` says of the student, also where that is not written yet.
        scores: Kept in the folder, too; None: those that are there.
        replaced: A folder whose place this one takes; an edited card there is taken over, and its scores where all files
            are the same.
    """
    if replaced is not None:
        _take_over(replaced, folder, provenance)
    for name in (SCORES, CARD):
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            _log.warning("%s is no file, so no card is written; move it away", folder / name)
            return
    if scores is not None:
        models = [
            {"name": name, "report": EvaluationReport(scores=report.scores).to_dict()}
            for name, report in scores.reports.items()
        ]
        said = {"data": scores.data, "notes": list(scores.notes), "compared": scores.compared}
        write_signed(folder / SCORES, {**said, "models": models})
    path = folder / CARD
    try:
        written = read_card(path)
    except ModelError as error:
        _log.warning("%s; no card is written", error)
        return
    if written is not None and not is_unedited(written):
        _log.warning("%s was edited and stays as it is; delete it for a new one", path)
        return
    write_bytes_atomic(path, card_text(folder, provenance).encode())


def card_text(folder: Path, provenance: Mapping[str, Any], *, place: HubName | None = None) -> str:
    """The card of the student in a folder; ``place``: where it is loaded from, for the lines that do."""
    body = _body(folder, provenance, read_scores(folder), place or HubName(PLACE))
    return body + _SEAL.format(_digest(body))


def is_unedited(card: str) -> bool:
    """Whether a card is one that was written here, as it was written."""
    found = _SEALED.fullmatch(card)
    return found is not None and found[2] == _digest(found[1])


def has_edited_card(folder: Path) -> bool:
    """Whether a folder has a card that somebody has edited, or that is too large to be one of ours."""
    try:
        card = read_card(folder / CARD)
    except ModelError:
        return True
    return card is not None and not is_unedited(card)


def read_scores(folder: Path) -> CardScores | None:
    """The scores that lie beside a student; None if there are none, or they are damaged, which is said."""
    try:
        return stored_scores(folder)
    except (CacheFormatError, ModelError) as error:
        _log.warning("the card has no scores: %s", str(error).partition(";")[0])
        return None


def stored_scores(folder: Path) -> CardScores | None:
    """The scores that lie beside a student; None if there are none.

    Raises:
        CacheFormatError: If they are damaged.
        ModelError: If they are a link that is not followed.
    """
    path = folder / SCORES
    try:
        found = check(read_signed(own_file(path)), _RULE, str(path))
    except FileNotFoundError:
        return None
    reports = {model["name"]: EvaluationReport.from_dict(model["report"]) for model in found["models"]}
    told = {key: found[key] for key in ("notes", "compared") if key in found}
    return CardScores(reports, found["data"], **told)


def _take_over(old: Path, new: Path, provenance: Mapping[str, Any]) -> None:
    """Bring what was made by hand or is still true from a folder that is replaced; what cannot be read is lost with it."""
    with contextlib.suppress(ModelError):
        card = read_card(old / CARD)
        if card is not None and not is_unedited(card):
            write_bytes_atomic(new / CARD, card.encode(errors="surrogateescape"))
    with contextlib.suppress(FileNotFoundError, CacheFormatError):  # a link is not followed
        if read_provenance(old).get("files") == provenance.get("files"):
            write_bytes_atomic(new / SCORES, read_bounded(old / SCORES, max_bytes=_MOST_BYTES))


def read_card(path: Path) -> str | None:
    """A card, bytes that are not UTF-8 as lone surrogates; None if there is none.

    Raises:
        ModelError: If it is a link that is not followed, is no file or cannot be read, or is too large for a card.
    """
    try:
        return read_bounded(own_file(path), max_bytes=_MOST_BYTES).decode(errors="surrogateescape")
    except FileNotFoundError:
        return None
    except CacheFormatError as error:
        large = path.is_file() and path.stat().st_size > _MOST_BYTES
        why = (
            f"larger than {_MOST_BYTES:,} bytes, too large for a card; shorten it"
            if large
            else "cannot be read; move it away"
        )
        raise ModelError(f"{path}: {why}, or delete it for a new card") from error


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode(errors="surrogateescape")).hexdigest()


def _known(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What of given options there is an option for."""
    found = {name: (value, defaults[name]) for name, value in given.items() if name in defaults}
    return {
        name: _known(value, default) if isinstance(value, dict) and isinstance(default, dict) else value
        for name, (value, default) in found.items()
    }


def _body(folder: Path, provenance: Mapping[str, Any], scores: CardScores | None, place: HubName) -> str:
    # Checked: a stranger may have written it, or another version, whose further options are left out.
    known = _known(provenance["config"], config_to_dict(TrainConfig(cache=PROVENANCE, output=PROVENANCE)))
    config = config_to_dict(config_from_dict(TrainConfig, known, where=str(folder / PROVENANCE)))
    origin = provenance.get("origin", {})
    caches = origin.get("caches", [])
    student = student_name(config, origin)
    teachers = list(dict.fromkeys(one_line(cache.get("teacher_name") or "an unnamed teacher") for cache in caches))
    taught = _is_taught(config)
    name = (
        f"{student}, distilled from {' and '.join(teachers) or 'a teacher cache'}"
        if taught
        else f"{student}, fine-tuned"
    )
    export = provenance.get("export", {})
    facts = [
        ("student", markdown(student)),
        *(
            [("cut out of", markdown(shown_model(config.get("teacher"))))]
            if origin.get("cut") and config.get("teacher")
            else []
        ),
        *([("recipe", f"options of training as of {markdown_code(recipe)}")] if (recipe := recipe_of(config)) else []),
        ("run", markdown_code(provenance["fingerprint"])),
        *_kept(provenance.get("best", {})),
        *((of, markdown(said)) for of, said in cut_words(folder).items()),
        *((of.replace("_", " "), markdown(said)) for of, said in token_words(folder).items()),
        *((of, markdown(said)) for of, said in fed_of(folder, provenance["encoder"].get("geometry") or {}).items()),
        *((f"export: {key}", markdown_code(export[key])) for key in ("layout", "dtype", "quantise") if export.get(key)),
        *(fact for number, cache in enumerate(caches, 1) for fact in _facts(cache, number if len(caches) > 1 else 0)),
        *(
            ("cache", f"{_place(place)}, manifest {markdown_code(found)}")
            for place, found in provenance["caches"].items()
        ),
    ]
    versions = [f"{markdown(key)} {markdown(value)}" for key, value in sorted(origin.get("versions", {}).items())]
    how = (
        "Trained on the signals of a vision-language teacher that a cache holds; the teacher itself was not loaded."
        if taught
        else "The baseline of a distillation: trained on the same data and as long, on the answers alone, without a teacher."
    )
    prefix = provenance["encoder"]["template"].get("bos_after_image")
    needs = " The library's processor of it takes no question without a picture." if prefix else ""
    return f"""---
{_metadata(config, origin, scores, name, export.get("layout"))}
---
# {markdown(name)}

{how}

## Load it

{_fenced(loading(folder, place, export.get("dtype")), "python")}

## Where it comes from

{_table(("of", "what"), facts)}
{_failures(caches)}
## Licences

{_table(("of", "licence"), _licences(origin, caches))}

What is derived is under the licences of what it was derived from: teacher, data and base models, each by its own terms.

## Training

{_table(("phase", "steps", "samples a step", "peak learning rates", "losses at the end"), _phases(origin))}

## Scores

{_scores(scores, export)}

## Make it again

{_commands(config, origin, "run" if taught and scores and GAIN in scores.reports else "train", select_command(folder, config))}

Versions: {", ".join(versions) or "not stated"}.

## Limits

- It knows what its data and its teacher taught it, with their faults and their bias, and was tried on no more than what stands
  under "Scores". Look at its answers on your own pictures before others rely on them.
- Its prompt format is {markdown_code(provenance["encoder"]["template"].get("name"))}, which the chat template writes; it was
  trained on at most {provenance["encoder"]["max_length"]} tokens.{needs}
{_changed(folder)}- Names and licences above are what the makers of cache and data state.
"""


def _changed(folder: Path) -> str:
    """A line about code that the library runs only where it may, of a student that has some in its class's place."""
    if not token_words(folder):
        return ""
    return (
        "- Elsewhere it needs `trust_remote_code=True`: the library's own class, without the code beside the weights, would feed "
        "and look at all visual tokens.\n"
    )


def _kept(best: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a student that was kept while a run trained: when and why."""
    if not best:
        return []
    why = f"the best by {markdown_code(best['by'])} ({best['value']:.4g}) of those scored on the way"
    return [("kept", f"after step {best['step']} of run {markdown_code(best['run'])}, {why}")]


def _is_taught(config: Mapping[str, Any]) -> bool:
    """Whether any phase has a loss that reads a cache."""
    used = [config[phase]["losses"] for phase in config["phases"]]
    return any(losses[name] for losses in used for name in LossWeights.names() if name != "lm")


def _metadata(
    config: Mapping[str, Any], origin: Mapping[str, Any], scores: CardScores | None, name: str, layout: Any
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    begun_from = [str(config.get(key) or "") for key in ("student", "student_weights", "language_model", "teacher")]
    bases = dict.fromkeys(found.repository for given in begun_from if (found := on_hub(given)))
    data = dict.fromkeys(str(found) for cache in origin.get("caches", []) if (found := cache.get("data_repository")))
    licence = one_line(origin.get("license") or "unknown").strip()
    known = licence.lower() in _LICENCES.split()
    results = []
    if scores is not None:
        own, items_of = next(iter(scores.reports)), "training-data" if scores.of_training else "held-out"
        for agreement, kind, where in ((False, items_of, scores.data), (True, "teacher-cache", scores.compared)):
            report = scores.part(agreement=agreement).get(own)
            results += [
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=kind,
                    dataset_name=one_line(where),
                    metric_type="accuracy",
                    metric_name=row.heading,
                    metric_value=round(row.factor * row.scores[0].value, 1),
                )
                for row in (table_rows({own: report})[0] if report else ())
                if row.scores[0] is not None
            ]
    card = ModelCardData(
        base_model=list(bases) or None,
        datasets=[found for found in data if hub_name(found)] or None,
        library_name="peft" if layout == "adapter" else "transformers",
        license=licence.lower() if known else "other",
        license_name=None if known else re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-.")[:90] or "see-below",
        license_link=None if known else "LICENSE",
        pipeline_tag="image-text-to-text",
        tags=["knowledge-distillation", "vision-language", "vlm-distill-cache"],
        model_name=one_line(name) if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml())


def _facts(cache: Mapping[str, Any], number: int) -> list[tuple[str, str]]:
    of = f" {number}" if number else ""
    teacher = [markdown(cache.get("teacher_name") or "not stated")]
    teacher += [f"revision {markdown_code(cache['teacher_revision'])}"] if cache.get("teacher_revision") else []
    teacher += [f"fingerprint {markdown_code(cache.get('teacher_fingerprint') or 'not stated')}"]
    data = [markdown(cache.get("data_name") or "not stated")]
    data += [f"revision {markdown_code(cache['data_revision'])}"] if cache.get("data_revision") else []
    data += [
        f"fingerprint {markdown_code(cache.get('data_fingerprint') or 'not stated')}",
        f"{cache.get('samples')} samples with {cache.get('rows')} taught tokens; {cache.get('failed')} could not be used",
    ]
    signals = ", ".join(map(markdown_code, cache.get("signals") or []))
    return [(f"teacher{of}", ", ".join(teacher)), (f"data{of}", ", ".join(data)), (f"signals{of}", signals)]


def _place(place: str) -> str:
    """A cache's place: an address, or the folder's name without those around it."""
    return markdown_code(place if "://" in place else Path(place).name)


def _failures(caches: Iterable[Mapping[str, Any]]) -> str:
    lines = [f"- {markdown(line)}" for cache in caches for line in cache.get("failures") or []]
    return "\n".join(["", "Samples that could not be used:", "", *lines, ""]) if lines else ""


def _licences(origin: Mapping[str, Any], caches: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = [("this student", markdown(origin.get("license") or UNKNOWN))]
    for cache in caches:
        source = f" ({markdown(cache['data_source'])})" if cache.get("data_source") else ""
        for of, name, licence in (
            ("teacher", cache.get("teacher_name"), cache.get("teacher_license")),
            ("data", cache.get("data_name"), cache.get("data_license")),
            ("cache", cache.get("place"), cache.get("cache_license")),
        ):
            shown = _place(str(name)) if of == "cache" else markdown(name or "not stated")
            rows.append((f"{of}: {shown}", markdown(licence) if licence else UNKNOWN + source))
    for name, licence in origin.get("bases", {}).items():
        rows.append((f"base: {markdown(shown_model(name))}", markdown(licence) if licence else UNKNOWN))
    return list(dict.fromkeys(rows))


def _phases(origin: Mapping[str, Any]) -> list[tuple[str, ...]]:
    def listed(numbers: Any) -> str:
        shown = (f"{markdown(name)} {value:.4g}" for name, value in sorted((numbers or {}).items()))
        return ", ".join(shown) or "not stated"

    rows = [
        (markdown(phase.get("name")), *(markdown(phase.get(key)) for key in ("steps", "batch_size")),
         listed(phase.get("rates")), listed(phase.get("losses")))
        for phase in origin.get("phases", [])
    ]  # fmt: skip
    return rows or [("not stated",) * 5]


def _scores(scores: CardScores | None, export: Any) -> str:
    if scores is None and export and export.get("layout") in FOR_OTHERS:
        return "Not scored: `distill evaluate` scores the student that this export was made of."
    if scores is None:
        return "Not scored yet: `distill evaluate FOLDER --card` does it, and writes the scores here."
    own = next(iter(scores.reports))
    where = "Items of the training data" if scores.of_training else "Held-out items"
    how = "value and 95 % bootstrap interval over"
    parts = [
        (scores.part(agreement=False), f"{where}, {markdown(scores.data)}; {how} items."),
        (scores.part(agreement=True), f"Agreement with the teacher, on {markdown(scores.compared)}; {how} samples."),
    ]
    told = [f"{line}\n\n{_score_table(part, own)}" for part, line in parts if part]
    before = ["These are the scores of the student before it was exported."] if export else []
    notes = "\n".join(f"- {markdown(note, limit=2000)}" for note in scores.notes)
    return "\n\n".join(filter(None, [*before, *told, notes]))


def _score_table(reports: Mapping[str, EvaluationReport], own: str) -> str:
    """Scores, a column a model, with ``own`` in bold; `GAIN` last."""
    headlines, details = table_rows({name: report for name, report in reports.items() if name != GAIN})
    gains = reports.get(GAIN)
    names = {heading: name for name, heading, _ in HEADLINE}
    rows = []
    for row in [*headlines, *details]:
        cells = [" ".join(format_score(score, row.factor)).strip() for score in row.scores]
        if gains is not None:
            gain = gains.scores.get(names.get(row.heading, ""))
            cells.append("" if gain is None else " ".join(format_score(gain, row.factor, sign="+")))
        indent = "&nbsp;" * 4 if row.heading.startswith(" ") else ""
        rows.append((indent + markdown(row.heading.strip()), *cells, *[""] * (len(reports) - len(cells))))
    return _table(["score", *(f"**{markdown(name)}**" if name == own else markdown(name) for name in reports)], rows)


def loading(folder: Path, place: HubName, dtype: Any) -> str:
    """Lines of Python that load what lies in a folder, in a precision if an adapter, and ask it about a picture."""
    shown = json.dumps(place.repository) + (f", revision={json.dumps(place.revision)}" if place.revision else "")
    settings = read_settings(folder / "config.json")
    code = any("auto_map" in read_settings(folder / name) for name in ("config.json", "processor_config.json"))
    trusted = ", trust_remote_code=True" if code else ""
    if found := sorted(path.name for path in folder.glob("*.gguf")):
        model = next((name for name in found if not name.startswith("mmproj")), found[0])
        projector = next((f" --mmproj {name}" for name in found if name.startswith("mmproj")), "")
        return f"# llama.cpp: llama-mtmd-cli -m {model}{projector} --image picture.jpg -p 'What is in this picture?'"
    names, base, extra = "AutoModelForImageTextToText, AutoProcessor", f"{shown}{trusted}", ""
    head, loaded, ends = "", "AutoModelForImageTextToText.from_pretrained({})", ""
    if trusted and place.repository != PLACE and not place.revision:
        head = "# trust_remote_code runs the code beside the weights; revision=COMMIT keeps it to what you have read.\n"
    if not settings and (adapter := read_settings(folder / "adapter_config.json")):
        given = str(adapter.get("base_model_name_or_path") or "BASE")
        base = json.dumps(given if hub_name(given) and not Path(given).is_dir() else f"PATH_TO/{Path(given).name}")
        head = f"# {base} is the model that the adapter belongs to.\n"
        if "PATH_TO" in base:
            head += "# adapter_config.json names it by its folder on the machine of the training.\n"
        base += f", revision={json.dumps(adapter['revision'])}" if adapter.get("revision") else ""
        base += f", dtype={json.dumps(str(dtype or 'float32'))}{trusted}"
        names, extra = f"{names}, GenerationConfig", "from peft import PeftModel\n"
        loaded = f"PeftModel.from_pretrained({loaded}, {shown})"
        ends = f"model.generation_config = GenerationConfig.from_pretrained({shown})\n"
    return f"""{extra}from PIL import Image
from transformers import {names}

{head}processor = AutoProcessor.from_pretrained({shown}{trusted})
model = {loaded.format(base)}
{ends}asked = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in this picture?"}}]}}]
prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
inputs = processor(text=prompt, images=Image.open("picture.jpg").convert("RGB"), return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))"""


def _commands(config: Mapping[str, Any], origin: Mapping[str, Any], verb: str, after: str) -> str:
    """The commands of both stages, and the configuration that they take; a run's scores tell that it was one."""
    lines, settings = reproduce(config, origin.get("caches", []), verb, origin.get("cut"))
    lines = "\n".join(filter(None, [lines, after]))
    return (
        "The cache, from the teacher and the data; then the student, from the data and the cache. Words in capitals, and "
        f"`PATH_TO`, stand for places of your own.\n\n{_fenced(lines, 'sh')}\n\n<details>\n"
        f"<summary>config.yaml</summary>\n\n{_fenced(settings, 'yaml')}\n\n</details>"
    )


def _fenced(code: str, language: str) -> str:
    """Code of unknown origin, between fences that it cannot close."""
    code = printable(hide_secrets(code)).rstrip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
