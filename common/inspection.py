"""What ``cachectl inspect`` says: a cache on one screen, a record with its answer's tokens as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.manifest import (
    BASE,
    MANIFEST,
    Manifest,
    Plan,
    ShardSidecar,
    missing_shards,
    read_manifest,
    read_plan,
    read_sidecar,
)
from common.schema import BASE_FIELDS, Field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from common.cache import TeacherCache
    from common.schema import Record

_MAX_FAILED = 5  # shown
_MAX_ROWS = 40
_TOP = 4


def describe_cache(cache_dir: Path) -> str:
    """Describe a cache, sealed or not, on one screen.

    Raises:
        CacheFormatError: If it is no cache, or one of its descriptions is damaged.
    """
    plan = read_plan(cache_dir)
    sealed = (cache_dir / MANIFEST).exists()
    manifest = read_manifest(cache_dir) if sealed else None
    missing = missing_shards(cache_dir, plan)
    sidecars = [read_sidecar(cache_dir, i) for i in range(plan.shard_count) if i not in set(missing)]
    samples = sum(len(sidecar.sample_ids) for sidecar in sidecars)
    failed = [failure for sidecar in sidecars for failure in sidecar.failed]
    rows = sum(sidecar.rows for sidecar in sidecars)
    prints = [f"{name} {value[:12]}" for name, value in sorted(plan.fingerprints.items())] or ["none"]
    state = "sealed" if sealed else f"not sealed, {len(missing)} of {plan.shard_count} shards missing"
    lines = [
        f"teacher cache   {cache_dir}: {plan.store}, format version {plan.format_version}, {state}",
        f"teacher         {_words(plan.teacher, ('name', 'family', 'dtype', 'layers', 'vocabulary'))}",
        f"data            {_words(plan.data, ('name', 'spec', 'split', 'limit'))}",
        f"samples         {samples:,} of {plan.sample_count:,} in {len(sidecars)} shards of "
        f"{plan.shard_size:,}; {len(failed)} failed",
        f"rows            {rows:,} supervised, {rows / max(1, samples):.1f} a sample",
        "",
        *_size_lines(plan, sidecars, samples, rows),
        "",
        *_wrapped("fingerprints", prints),
    ]
    lines += [f"failed          {name}: {reason}" for name, reason in failed[:_MAX_FAILED]]
    if len(failed) > _MAX_FAILED:
        lines.append(f"failed          ... and {len(failed) - _MAX_FAILED} more")
    lines += _wrapped("fidelity", _fidelity_words(manifest))
    lines += ["", f"next            {_next_command(cache_dir, sealed=sealed, missing=bool(missing))}"]
    return "\n".join(lines)


def _size_lines(plan: Plan, sidecars: Iterable[ShardSidecar], samples: int, rows: int) -> list[str]:
    """Bytes by signal: as decoded, and for zarr, where each field has files of its own, as stored."""
    decoded: dict[str, int] = {}
    stored: dict[str, int] = {}
    total = 0
    for sidecar in sidecars:
        total += sidecar.stored_bytes
        for name, size in sidecar.field_bytes.items():
            decoded[name] = decoded.get(name, 0) + size
        for path, entry in sidecar.files.items():
            name = path.split("/")[2].removesuffix("_offsets") if path.count("/") > 2 else ""
            stored[name] = stored.get(name, 0) + entry.size
    groups: dict[str, tuple[Field, ...]] = {BASE: BASE_FIELDS, **dict(sorted(plan.fields.items()))}
    lines = [f"{'signal':<18}{'B/row':>10}{'B/sample':>12}{'stored B/row':>16}{'stored B/sample':>18}"]
    for signal, fields in groups.items():
        size = sum(decoded.get(f.name, 0) for f in fields)
        kept = sum(stored.get(f.name, 0) for f in fields) if plan.store == "zarr" else None
        lines.append(_size_line(signal, size, kept, samples, rows))
    lines.append(_size_line("total", sum(decoded.values()), total, samples, rows))
    lines.append(f"{'':<18}{_human(total)} stored, ids and descriptions of the shards included")
    return lines


def _size_line(name: str, decoded: int, stored: int | None, samples: int, rows: int) -> str:
    cells = [f"{decoded / max(1, rows):,.1f}", f"{decoded / max(1, samples):,.1f}"]
    kept = ["-", "-"] if stored is None else [f"{stored / max(1, n):,.1f}" for n in (rows, samples)]
    return f"{name:<18}{cells[0]:>10}{cells[1]:>12}{kept[0]:>16}{kept[1]:>18}"


def describe_record(cache: TeacherCache, sample_id: str) -> str:
    """Describe one record: its fields, and its answer's tokens beside what the teacher thought likely.

    Raises:
        CacheMismatchError: If the cache does not hold the sample.
        CacheFormatError: If its shard is damaged.
    """
    record = cache.read(sample_id)
    owner = {f.name: signal for signal, group in cache.plan.fields.items() for f in group}
    lines = [f"sample {sample_id} of {cache.path}, shard {cache.shard_of(sample_id)}", ""]
    lines.append(f"{'field':<22}{'of':<18}{'dtype':<7}{'axis':<8}shape")
    for field in cache.fields:
        shape = " x ".join(map(str, record[field.name].shape))
        lines.append(
            f"{field.name:<22}{owner.get(field.name, BASE):<18}{field.dtype:<7}{field.axis:<8}{shape}"
        )
    lines += ["", *_answer_lines(record, _token_text(cache))]
    return "\n".join(lines)


def _answer_lines(record: Record, text: Callable[[int], str]) -> list[str]:
    """One line per supervised row: target, probability of the teacher's first token, its first tokens."""
    labels = record["labels"]
    lines = [f"answer: {' '.join(text(int(token)) for token in labels[:_MAX_ROWS])}"]
    if "entry_count" not in record:
        return lines
    lines.append(f"{'row':>4}  {'target':<18}{'p(first)':>9}   the teacher's first tokens, by rank")
    ends = np.cumsum(record["entry_count"], dtype=np.int64)
    for row, label in enumerate(labels[:_MAX_ROWS]):
        start = int(ends[row]) - int(record["entry_count"][row])
        entries = [int(token) for token in record["token_ids"][start : int(ends[row])]]
        first = float(np.exp(np.float64(record["top_logprob"][row])))
        shown = "  ".join(text(token) for token in entries[:_TOP])
        more = f"  (+{len(entries) - _TOP})" if len(entries) > _TOP else ""
        lines.append(f"{row:>4}  {text(int(label)):<18}{first:>9.3f}   {shown}{more}")
    if len(labels) > _MAX_ROWS:
        lines.append(f"      ... and {len(labels) - _MAX_ROWS} more rows")
    return lines


def _token_text(cache: TeacherCache) -> Callable[[int], str]:
    """Return a function from token id to text, or to the number if there is no tokenizer to ask."""
    try:
        from tokenizers import Tokenizer  # optional: numbers do without it
    except ImportError:
        return str
    name = "processor/tokenizer.json"
    if name not in cache.manifest.files:
        return str
    try:
        tokenizer = Tokenizer.from_file(str(cache.path / name))
    except Exception:  # noqa: BLE001 - tokenizers raises the bare class for whatever it cannot read
        return str

    def text(token: int) -> str:
        piece = tokenizer.decode([token], skip_special_tokens=False) or tokenizer.id_to_token(token)
        return repr(piece)[1:-1] if piece else f"#{token}"

    return text


def _words(values: dict[str, Any], first: tuple[str, ...]) -> str:
    known = [f"{name} {values[name]}" for name in first if values.get(name) not in (None, "", 0)]
    return ", ".join(word.removeprefix("name ") for word in known) or "not stated"


def _fidelity_words(manifest: Manifest | None) -> list[str]:
    if manifest is None or not manifest.fidelity:
        return ["not measured"]
    return [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in manifest.fidelity.items()
        if isinstance(value, int | float | str)
    ]


def _wrapped(title: str, words: list[str], width: int = 110) -> list[str]:
    lines, line = [], f"{title:<16}"
    for i, word in enumerate(words):
        piece = word + (", " if i + 1 < len(words) else "")
        if len(line) > 16 and len(line) + len(piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = " " * 16
        line += piece
    return [*lines, line.rstrip()]


def _next_command(cache_dir: Path, *, sealed: bool, missing: bool) -> str:
    if missing:
        return "teacher-cache build with the same options makes the missing shards"
    if not sealed:
        return f"teacher-cache seal {cache_dir}"
    return f"make distill STUDENT=mobilevlm CACHE={cache_dir}, or cachectl verify {cache_dir}"


def _human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
