"""`python -m tests.demos.screenshots FOLDER --run RUN`: pictures of the demos, from a trained model: the page of a
recorded generation at two widths, light and dark, the same with its slider moved, the live page, and the terminal alone
and side by side."""

import argparse
import html
import io
import re
import tempfile
import threading
from pathlib import Path

from PIL import Image

from demos.browser import BrowserConfig
from demos.browser import main as write_page
from demos.live import LiveModel
from demos.serve import ServeConfig, serve
from demos.side import Side, timing_line
from demos.terminal import DemoConfig, models, title_of, turn
from demos.terminal_view import Palette, frame
from lm.__main__ import GenerateConfig, run_generate
from lm.sampling import SamplingConfig
from tests.demos.chromium import Tab, opened_tab

PROMPT = 'class Stack:\n    """A stack of items."""\n\n    def '
TOKENS = 150
COLOUR = re.compile(r"\x1b\[(?:(48|38);5;(\d+)|0)m")


def save(tab: Tab, path: Path) -> None:
    """A screenshot in few colours, which keeps the file small."""
    tab.screenshot(path)
    image = (
        Image.open(io.BytesIO(path.read_bytes()))
        .convert("RGB")
        .quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    )
    image.save(path, optimize=True)


def recorded(tab: Tab, run: Path, folder: Path, work: Path) -> None:
    trace = work / "trace"
    run_generate(
        GenerateConfig(
            run=run,
            prompt=(PROMPT,),
            max_new_tokens=TOKENS,
            trace=trace,
            sampling=SamplingConfig(temperature=0.7, seed=1),
        )
    )
    page = write_page(BrowserConfig(trace=trace))
    tab.open(page.as_uri())
    for width, height in ((1280, 1000), (400, 900)):
        for dark in (False, True):
            tab.window(width, height, dark=dark)
            tab.wait(f"innerWidth === {width}")
            tab.js("window.scrollTo(0, 0); setBudget(null); choose(24, false)")
            save(tab, folder / f"page_{width}_{'dark' if dark else 'light'}.png")
    tab.window(1280, 1000)
    tab.click("#budget", across=0.17)
    tab.js("window.scrollTo(0, 0)")
    save(tab, folder / "page_budget_moved.png")
    tab.js("document.querySelector('.by-layer').closest('.scroll').previousElementSibling.scrollIntoView()")
    save(tab, folder / "page_figures.png")
    tab.window(400, 900)
    tab.js("$('token-name').scrollIntoView(); document.querySelector('.columns').scrollIntoView()")
    save(tab, folder / "page_400_text.png")


def live(tab: Tab, run: Path, folder: Path) -> None:
    server = serve(ServeConfig(run=run, port=0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tab.window(1280, 1000)
    tab.open(f"http://127.0.0.1:{server.server_address[1]}/")
    tab.js("document.querySelector('[name=max_new_tokens]').value = 400")
    tab.js("document.querySelector('[name=pace]').value = 100")
    tab.click("#go")
    tab.wait("tokens.length > 40")
    tab.click("#budget", across=0.05)
    tab.wait("$('state').textContent.startsWith('budget')")
    tab.wait("tokens.length > 120 || $('stop').disabled")
    tab.click("#stop")
    tab.wait("$('stop').disabled")
    tab.js("window.scrollTo(0, 0)")
    save(tab, folder / "live_1280.png")
    server.shutdown()


def terminal(tab: Tab, run: Path, folder: Path, work: Path) -> None:
    for name, options, size in (
        ("terminal", {"budget": 8.0}, (110, 34)),
        ("terminal_budgets", {"side_by_side": "budgets"}, (140, 34)),
        ("terminal_static", {"side_by_side": "static", "budget": 8.0}, (140, 34)),
    ):
        config = DemoConfig(run=run, prompt=PROMPT, max_new_tokens=400, **options)
        lives = models(config)
        sides = [side_of(model, config, several=len(lives) > 1) for model in lives]
        for number in range(400):
            turn(sides, number)
        palette = Palette(max(model.cap for model in lives), True)
        head = [str(lives[0].run), palette.legend(), *([timing_line(sides)] if len(sides) > 1 else [])]
        lines = frame(
            [side.pane for side in sides], palette, head, "+ - budget   t as trained   space pause   q leave", size
        )
        path = work / f"{name}.html"
        path.write_text(as_html(lines), encoding="utf-8")
        tab.window(size[0] * 8 + 60, 34 * 17 + 50)
        tab.open(path.as_uri())
        save(tab, folder / f"{name}.png")


def side_of(model: LiveModel, config: DemoConfig, *, several: bool) -> Side:
    title = title_of(model) if several else ""
    return Side(model, config.prompt, title=title, max_new_tokens=config.max_new_tokens, sampling=config.sampling)


def as_html(lines: list[str]) -> str:
    """What a terminal would show of the lines."""
    text = COLOUR.sub(span, html.escape("\n".join(lines)))
    style = "margin:0;padding:20px;background:#16191d;color:#e4e7ea;font:13px/17px 'DejaVu Sans Mono',monospace"
    return f'<!doctype html><meta charset="utf-8"><pre style="{style}">{text}</pre>'


def span(found: re.Match) -> str:
    if found[1] is None:
        return "</span></span>"
    number = int(found[2])
    if number < 16:
        red, green, blue = 0, 0, 0
    elif number < 232:
        red, green, blue = (0 if n == 0 else 55 + 40 * n for n in divided(number - 16))
    else:
        red = green = blue = 8 + 10 * (number - 232)
    return f'<span style="{"background" if found[1] == "48" else "color"}:rgb({red},{green},{blue})">'


def divided(number: int) -> tuple[int, int, int]:
    return number // 36, number // 6 % 6, number % 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained model or of its run")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, opened_tab(Path(work) / "browser") as tab:
        recorded(tab, asked.run, asked.folder, Path(work))
        live(tab, asked.run, asked.folder)
        terminal(tab, asked.run, asked.folder, Path(work))


if __name__ == "__main__":
    main()
