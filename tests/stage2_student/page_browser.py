"""Pages opened in a real browser: what their document holds, at phone width, with every button pressed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE = 360  # pixels
# Runs in the page around, which has no policy; the pages inside have theirs.
_LOOK = """
window.ran = [];
window.addEventListener('load', () => {
  const told = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, all = [...page.querySelectorAll('*')];
    const shown = element => frame.contentWindow.getComputedStyle(element).display !== 'none';
    const seen = group => [...group.querySelectorAll('.panes')].map(p => [...p.children].map(shown));
    const groups = [...page.querySelectorAll('.tabs')].map(group => {
      const buttons = [...group.querySelectorAll(':scope > input')];
      return buttons.map((button, place) => { button.click(); return seen(group).map(p => [place, p.flatMap((s, i) => s ? [i] : [])]); });
    });
    return {
      text: page.body.innerText, names: [...new Set(all.map(e => e.localName))],
      handlers: all.filter(e => [...e.attributes].some(a => a.name.startsWith('on'))).length,
      sources: [...page.images].map(i => i.getAttribute('src').slice(0, 11)), broken: [...page.images].filter(i => !i.naturalWidth).length,
      links: [...page.links].map(a => a.getAttribute('href')), ids: all.filter(e => e.id).map(e => e.id),
      wide: page.documentElement.scrollWidth, beyond: [...page.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText.slice(0, 300)), groups, title: page.title,
      ink: frame.contentWindow.getComputedStyle(page.body).color, paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    };
  });
  document.getElementById('told').textContent = JSON.stringify({pages: told, ran: window.ran});
});
"""  # noqa: E501


def look_at(pages: list[str], folder: Path, *, dark: bool = False) -> dict:
    """What a browser makes of some pages; skips the test where there is none.

    Returns:
        ``pages``, what each holds, and ``ran``: what any script in them has said.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    frames = "".join(
        f'<iframe style="width:{PHONE}px;height:600px" srcdoc="{html.escape(page)}"></iframe>' for page in pages
    )
    outer = folder / "outer.html"
    outer.write_text(
        f'<!doctype html><meta charset="utf-8"><script>{_LOOK}</script><pre id="told"></pre>{frames}', encoding="utf-8"
    )
    command = [found, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    ran = subprocess.run(
        [*command, "--virtual-time-budget=20000", "--dump-dom", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told = re.search(r'<pre id="told">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert told, ran.stderr[-2000:]
    return dict(json.loads(html.unescape(told[1])))
