"""Looks at pages in a headless browser: what overflows, overlaps, is clipped or lies on a curve, at any width.

python tests/ablations/report/browser.py PAGE.html PICTURE.png --width 400 [--dark]     a picture of a page
"""

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

# Run in the page: it measures what is drawn, and tells the page around it.
PROBE = """
addEventListener('load', () => setTimeout(() => {
  const problems = [];
  const name = e => (e.textContent || e.className || e.tagName).trim().slice(0, 40);
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) problems.push(`the page is ${page.scrollWidth} wide`);
  for (const e of document.querySelectorAll('td, th, dt, dd, h1, h2, h3, p, li, pre, figcaption'))
    if (e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && getComputedStyle(e).display !== 'inline')
      problems.push(`clipped: ${name(e)}`);
  for (const e of document.querySelectorAll('.scroll'))
    if (e.scrollWidth > e.clientWidth + 1) problems.push(`scrolls sideways: ${name(e)}`);
  const cross = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  for (const row of document.querySelectorAll('tr')) {
    const cells = [...row.children].filter(e => e.textContent).map(e => [name(e), e.getBoundingClientRect()]);
    cells.forEach(([a, x], i) => cells.slice(i + 1).forEach(([b, y]) => {
      if (cross(x, y)) problems.push(`cells overlap: ${a} and ${b}`);
    }));
  }
  for (const svg of document.querySelectorAll('svg')) {
    const title = svg.getAttribute('aria-label'), frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(t => [name(t), t.getBoundingClientRect()]);
    texts.forEach(([a, x], i) => {
      if (x.left < frame.left - 1 || x.right > frame.right + 1 || x.top < frame.top - 1 || x.bottom > frame.bottom + 1)
        problems.push(`${title}: clipped: ${a}`);
      texts.slice(i + 1).forEach(([b, y]) => { if (cross(x, y)) problems.push(`${title}: ${a} on ${b}`); });
    });
    for (const path of svg.querySelectorAll('path')) {
      const look = getComputedStyle(path), to = path.getScreenCTM();
      if (look.fill !== 'none' || look.stroke === 'none' || path.closest('defs')) continue;
      const clip = (path.getAttribute('clip-path') || '').match(/#(.*)\\)/);
      const rect = clip && svg.querySelector(`[id="${clip[1]}"] rect`);
      const box = rect && ['x', 'y', 'width', 'height'].map(n => +rect.getAttribute(n));
      const length = path.getTotalLength();
      for (let at = 0; at <= length; at += Math.max(length / 400, 0.5)) {
        const p = path.getPointAtLength(at), s = p.matrixTransform(to);
        if (box && (p.x < box[0] || p.y < box[1] || p.x > box[0] + box[2] || p.y > box[1] + box[3])) continue;
        const hit = texts.find(
          ([, x]) => s.x > x.left + 1 && s.x < x.right - 1 && s.y > x.top + 2 && s.y < x.bottom - 2);
        if (hit) { problems.push(`${title}: a line runs through ${hit[0]}`); break; }
      }
    }
  }
  const paper = getComputedStyle(document.body).backgroundColor, ink = getComputedStyle(document.body).color;
  parent.postMessage({page: PAGE, problems, paper, ink}, '*');
}, 50));
"""
AROUND = """<!doctype html><meta charset=utf-8><pre id=found></pre><script>
const found = [];
addEventListener('message', e => {{
  found.push(e.data);
  document.getElementById('found').textContent = JSON.stringify(found);
}});
</script>{frames}"""


def browser() -> str | None:
    """The browser of this machine, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def look(pages: dict[str, Path], widths: tuple[int, ...], *, dark: bool = False) -> dict[str, dict[str, Any]]:
    """What the probe finds on every page at every width, by `name width`: `problems`, and the colours `paper` and
    `ink`."""
    with tempfile.TemporaryDirectory() as name:
        folder, frames = Path(name), []
        for page, path in pages.items():
            for width in widths:
                script = f"<script>const PAGE = {json.dumps(f'{page} {width}')};{PROBE}</script>"
                copy = folder / f"{page}_{width}.html"
                copy.write_text(
                    path.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8"
                )
                frames.append(f'<iframe src="{copy.name}" style="width:{width}px;height:900px;border:0"></iframe>')
        (folder / "around.html").write_text(AROUND.format(frames="".join(frames)), encoding="utf-8")
        dumped = _run([f"file://{folder}/around.html"], ["--dump-dom", "--virtual-time-budget=4000"], dark=dark)
    (text,) = re.findall(r'<pre id="?found"?>(.*?)</pre>', dumped, re.DOTALL)
    return {one.pop("page"): one for one in json.loads(html.unescape(text))}


def picture(page: Path, out: Path, width: int, height: int, *, dark: bool = False) -> None:
    """Writes a picture of a page, as wide as told whatever the browser's least window is."""
    with tempfile.TemporaryDirectory() as name:
        around = Path(name) / "around.html"
        frame = f'<iframe src="file://{page.resolve()}" style="width:{width}px;height:{height}px;border:0"></iframe>'
        around.write_text(f"<!doctype html><body style='margin:0;overflow:hidden'>{frame}", encoding="utf-8")
        size = [f"--screenshot={out.resolve()}", f"--window-size={max(width, 500)},{height + 120}", "--hide-scrollbars"]
        _run([f"file://{around}"], [*size, "--virtual-time-budget=4000"], dark=dark)
    from PIL import Image

    with Image.open(out) as image:
        cut = image.crop((0, 0, width, height)).convert("RGB").quantize(64)
    cut.save(out, optimize=True)


def _run(pages: list[str], options: list[str], *, dark: bool) -> str:
    found = browser()
    assert found is not None
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    # As root there is no sandbox, and in a container little shared memory.
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--allow-file-access-from-files"]
    done = subprocess.run([found, *fixed, *theme, *options, *pages], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=2400)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    if browser() is None:
        sys.exit(f"no browser found: one of {', '.join(BROWSERS)}")
    picture(given.page, given.out, given.width, given.height, dark=given.dark)
