"""Elements of a page that can be mailed and opens from disk: one file, no script, nothing that is fetched.

What moves on it (steps through words, a linear or a log axis) is radio buttons and a style sheet, so that arrow keys work
and a policy can forbid every script. Texts of unknown origin are text, whatever they hold.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import PIL.Image

from vlm_distill_cache.common.files.atomic import write_bytes_atomic
from vlm_distill_cache.common.printing import html_text, one_line

MOST_COLUMNS = 8  # of a table that need not be turned
MOST_PANES = 40  # that one group of radio buttons chooses between
LIGHT = ("#475569", "#0a7d6c", "#c2410c", "#4f46e5", "#a16207", "#be185d", "#0369a1", "#4d7c0f")
DARK = ("#a3b1c6", "#2dd4bf", "#fb923c", "#a5b4fc", "#facc15", "#f9a8d4", "#7dd3fc", "#a3e635")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_SHOWN = "".join(
    f",.tabs>input:nth-of-type({place}):checked~* .panes>:nth-child({place})" for place in range(1, MOST_PANES + 1)
)[1:]
_STYLE = f"""
:root{{color-scheme:light dark;--ink:#1c1917;--soft:#6b645e;--line:#e2dfdc;--page:#fafaf9;--card:#fff;--mark:#0a7d6c;
--on:#fff;
--good:#15803d;--bad:#b91c1c;{"".join(f"--c{place}:{colour};" for place, colour in enumerate(LIGHT))}}}
@media(prefers-color-scheme:dark){{:root{{--ink:#f5f5f4;--soft:#b5afaa;--line:#44403c;--page:#1c1917;--card:#292524;
--mark:#2dd4bf;
--on:#1c1917;--good:#4ade80;--bad:#fca5a5;{"".join(f"--c{place}:{colour};" for place, colour in enumerate(DARK))}}}}}
*{{box-sizing:border-box}}
body{{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;max-width:1160px;
padding:24px}}
h1{{font-size:24px;line-height:1.25;margin:0 0 8px;overflow-wrap:anywhere}}h2{{font-size:19px;margin:40px 0 10px}}
h3{{font-size:15px;margin:20px 0 6px;overflow-wrap:anywhere}}
p{{margin:4px 0 12px;max-width:75ch;overflow-wrap:anywhere}}
p,small,dt,summary,figcaption{{color:var(--soft)}}p.said,p.said b{{color:var(--ink)}}a{{color:var(--mark)}}
nav{{display:flex;flex-wrap:wrap;gap:4px 16px;margin:12px 0}}
.row{{display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start}}
.card{{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;max-width:100%;min-width:0}}
.big{{font-size:30px;line-height:1.2;font-variant-numeric:tabular-nums;color:var(--ink)}}.headline{{flex:1 1 230px}}
.scroll{{overflow-x:auto;max-width:100%}}
table{{border-collapse:separate;border-spacing:0;background:var(--card);border:1px solid var(--line)}}
th,td{{padding:5px 12px;border-top:1px solid var(--line);text-align:right;font-variant-numeric:tabular-nums;
vertical-align:top}}
th{{border-top:0}}th:first-child,td:first-child{{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;
min-width:9em}}
td:first-child,th:first-child{{position:sticky;left:0;background:var(--card)}}td small{{white-space:nowrap}}
table.words td{{text-align:left;overflow-wrap:anywhere;min-width:6em}}
dl{{display:grid;grid-template-columns:fit-content(45%) 1fr;gap:2px 16px;margin:0}}
dt,dd{{margin:0;overflow-wrap:anywhere}}
pre{{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:13px}}
details{{margin:8px 0 14px}}summary{{cursor:pointer}}details>dl{{margin-top:8px}}
figure{{margin:0}}figcaption{{font-size:13px;margin-bottom:4px}}
img{{image-rendering:pixelated;border-radius:4px;max-width:100%;display:block}}
svg{{display:block;max-width:100%;height:auto}}svg text{{font:11px system-ui,sans-serif;fill:var(--soft)}}
.key{{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 5px 0 14px}}
.bars{{display:grid;grid-template-columns:minmax(6em,max-content) minmax(60px,1fr) max-content;gap:3px 12px;
align-items:center;max-width:760px}}
.bars>.of{{grid-column:1/-1;margin-top:6px;font-weight:600}}
.bars>*{{min-width:0;overflow-wrap:anywhere}}.bars h3{{grid-column:1/-1;margin:12px 0 0}}.bars span{{font-size:13px}}
.track{{position:relative;height:14px;background:linear-gradient(var(--line),var(--line)) center/100% 1px no-repeat}}
.track i,.track b,.track u{{position:absolute;top:0;bottom:0}}.track i{{border-radius:2px;opacity:.75}}
.track b{{top:3px;bottom:3px;border:solid var(--ink);border-width:0 1.5px;
background:linear-gradient(var(--ink),var(--ink)) center/100% 1.5px no-repeat}}
.track u{{width:1px;background:var(--soft)}}.num{{font-variant-numeric:tabular-nums;text-align:right}}
.good{{color:var(--good)}}.bad{{color:var(--bad)}}
.tabs{{position:relative}}.tabs>input{{position:absolute;opacity:0;width:1px;height:1px}}
.tabs>label{{display:inline-block;padding:2px 8px;margin:0 4px 6px 0;border:1px solid var(--line);border-radius:6px;
cursor:pointer;max-width:100%;overflow-wrap:anywhere}}
.tabs>input:checked+label{{background:var(--mark);border-color:var(--mark);color:var(--on)}}
.tabs>input:focus-visible+label{{outline:2px solid var(--ink);outline-offset:1px}}
.panes>*{{display:none}}{_SHOWN}{{display:block}}
.view{{position:relative;width:fit-content}}.view>img{{filter:grayscale(1)}}.view .panes{{position:absolute;inset:0}}
.view .panes img{{width:100%;height:100%}}
@media(max-width:600px){{body{{padding:12px}}svg text{{font-size:19px}}th,td{{padding:5px 8px}}th{{overflow-wrap:anywhere}}
dl{{grid-template-columns:1fr}}dd{{margin-bottom:6px}}
.bars{{grid-template-columns:1fr max-content}}.bars>.name{{grid-column:1/-1}}
.stacked,.stacked tbody,.stacked tr,.stacked td{{display:block;min-width:0}}.stacked tr:first-child,
.stacked td:empty{{display:none}}.stacked td{{border:0;padding:2px 8px;text-align:left;overflow-wrap:anywhere}}
.stacked td:first-child{{position:static;font-weight:600}}
.stacked tr{{border-top:1px solid var(--line);padding:4px 0}}.stacked td[data-head]::before{{
content:attr(data-head) ": ";color:var(--soft)}}}}
@media print{{nav{{display:none}}}}
"""


def write_page(path: Path, title: str, body: Iterable[str]) -> None:
    """Write a page, whole or not at all; ``body`` is HTML."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html_text(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    )
    write_bytes_atomic(path, page.encode())


def words(value: object, limit: int = 300) -> str:
    """Text of unknown origin, on one line of at most so many characters."""
    return html_text(one_line(value, limit=limit))


def colour(place: int) -> str:
    """The colour of a model, a run or a benchmark by its place; of the ninth and more a hue of its own in both modes."""
    return f"var(--c{place})" if place < len(LIGHT) else f"hsl({place * 137.5 % 360:.0f} 60% 50%)"


def sections(parts: Mapping[str, str]) -> list[str]:
    """Sections by their headings, those without content left out, below links to them; headings are our own words."""
    found = {heading: content for heading, content in parts.items() if content}
    anchors = {heading: heading.lower().replace(" ", "-") for heading in found}
    links = "".join(f'<a href="#{anchors[heading]}">{heading}</a>' for heading in found)
    return [
        f"<nav>{links}</nav>",
        *(f'<h2 id="{anchors[heading]}">{heading}</h2>{content}' for heading, content in found.items()),
    ]


def facts(known: Mapping[str, object]) -> str:
    """Names and what they are."""
    rows = "".join(f"<dt>{words(name)}</dt><dd>{words(value, 2000)}</dd>" for name, value in known.items())
    return f'<div class="card"><dl>{rows}</dl></div>' if rows else ""


def legend(entries: Mapping[str, str]) -> str:
    """What numbers mean, to be opened; none where there is nothing to tell."""
    rows = "".join(f"<dt>{words(name.strip())}</dt><dd>{words(said, 2000)}</dd>" for name, said in entries.items())
    return f"<details><summary>What the numbers mean</summary><dl>{rows}</dl></details>" if rows else ""


def keys(names: Sequence[str]) -> str:
    """Which colour is whose."""
    return "".join(
        f'<span class="key" style="background:{colour(place)}"></span>{words(name, 60)}'
        for place, name in enumerate(names)
    )


def table(head: Sequence[object], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """A table that scrolls where it is too wide; ``rows`` are HTML, ``head`` is text.

    One of numbers that is wide and low is turned: its columns become rows.
    """
    rows, top = list(rows), [words(name, 60) for name in head]
    if not kind and len(top) > MOST_COLUMNS and len(rows) < len(top):
        top, *rows = map(list, zip(top, *rows, strict=True))
    # What a phone has no room for beside each other stands there below each other, each cell behind its heading.
    narrow = len(top) < 3
    heads = [""] * len(top) if narrow else [f' data-head="{name}"' if name else "" for name in top]
    lines = "".join(
        f"<tr>{''.join(f'<td{head}>{cell}</td>' for head, cell in zip(heads, row, strict=True))}</tr>" for row in rows
    )
    kind = kind if narrow else f"{kind} stacked".strip()
    first = "".join(f"<th>{name}</th>" for name in top)
    return f'<div class="scroll"><table class="{kind}"><tr>{first}</tr>{lines}</table></div>'


def with_interval(value: str, interval: str) -> str:
    """A cell: a number and its interval, as `format_score` gives them."""
    return f"{value} <small>{interval}</small>" if interval else value


def code(text: str) -> str:
    """Lines as they are typed."""
    return f"<pre>{html_text(text)}</pre>"


def tabs(group: str, panes: Mapping[str, str]) -> str:
    """Panes of which one is seen, chosen by their names; ``group`` is unique on the page, panes are HTML."""
    return (
        choices(group, list(panes)) + f'<div><div class="panes">{"".join(map(_pane, panes.values()))}</div></div></div>'
    )


def choices(group: str, names: Sequence[str], chosen: int = 0) -> str:
    """An open ``<div>`` with buttons; in what follows in it, ``panes`` show their child of the chosen place."""
    buttons = "".join(
        f'<input type="radio" name="{group}" id="{group}-{place}"{" checked" if place == chosen else ""}>'
        f'<label for="{group}-{place}">{words(name, 40)}</label>'
        for place, name in enumerate(names[:MOST_PANES])
    )
    return f'<div class="tabs">{buttons}'


def _pane(content: str) -> str:
    return f"<div>{content}</div>"


def picture(image: PIL.Image.Image, alt: str) -> str:
    """A picture inside the page; photos are compressed with loss where that is smaller."""
    return f'<img alt="{words(alt, 100)}" width="{image.width}" src="{_data(image)}">'


def _data(image: PIL.Image.Image) -> str:
    found = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        if kind == "png" or image.mode == "RGB":
            image.save(buffer, format=kind, **options)
            found.append((buffer.getvalue(), kind))
    content, kind = min(found, key=lambda entry: len(entry[0]))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
