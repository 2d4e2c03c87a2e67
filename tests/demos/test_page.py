"""The page of a recorded generation: what it holds, and in a real browser what it decides, shows and does."""

import base64
import json
import re

import numpy as np
import pytest

from demos.browser import BrowserConfig, main
from demos.figures import read_frontier
from demos.recording import probability_LE
from lm.generation_trace import read_generation, read_scores, write_generation
from lm.pretrained import load_pretrained
from tests.demos.chromium import needs_browser, opened_tab
from tests.demos.commands import run


@pytest.fixture(scope="module")
def trace(varied_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace") / "trace"
    options = ("--run", varied_folder, "--prompt", "def main", "--max-new-tokens", 60, "--trace", folder)
    assert run("generate", *options).returncode == 0
    return folder


@pytest.fixture(scope="module")
def page(trace):
    return main(BrowserConfig(trace=trace))


@pytest.fixture(scope="module")
def tab(page, tmp_path_factory):
    with opened_tab(tmp_path_factory.mktemp("browser")) as tab:
        tab.window(1280)
        tab.open(page.as_uri())
        yield tab
        assert not tab.errors
        # The page itself, and nothing else.
        assert {address for address in tab.requests if not address.startswith("data:")} == {page.as_uri()}


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="recording">(.*?)</script>', page.read_text())
    return json.loads(text)


def unpacked(text, dtype):
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype).newbyteorder("<"))


def decisions(trace, model_folder, place):
    """The experts of every token and layer under a budget of the table, as the model's own policies decide them on the
    stored scores."""
    import torch

    scores, model = read_scores(trace), load_pretrained(model_folder)
    found = []
    for logit_LE in scores.logit_NLE:
        layers = []
        for layer, (router, logit_E) in enumerate(zip(model.routers(), logit_LE)):
            router.policy.budget.threshold.fill_(float(scores.threshold_ML[place, layer]))
            known = router.scores_of(torch.zeros(1, router.d_model), torch.tensor(logit_E[None]))
            slots, _ = router.decide(known)
            layers.append(slots.expert_TK[slots.keep_TK].tolist())
        found.append(layers)
    return found


def test_the_data_is_the_trace(trace, page):
    data, scores, (text, experts_NL) = data_of(page), read_scores(trace), read_generation(trace)
    assert [token["text"] for token in data["tokens"]] == list(text.pieces)
    assert data["means"] == scores.mean_M.tolist()
    assert (unpacked(data["table"], np.float32) == scores.threshold_ML.ravel()).all()
    for n, token in enumerate(data["tokens"]):
        level_K = unpacked(token["level"], np.float32).reshape(3, -1)
        used = level_K <= unpacked(token["threshold"], np.float32)[:, None]
        assert used.sum(-1).tolist() == experts_NL[n].tolist()
        probability = (unpacked(token["probability"], np.uint16).reshape(3, -1) / 65535) ** 2
        assert probability == pytest.approx(probability_LE(scores.logit_NLE[n]), abs=1e-4)
    assert len(data["cache"]["model"]) == len(data["cache"]["full"]) == len(text.prompt) + len(text.tokens)
    assert data["cache"]["model"][-1] < data["cache"]["full"][-1]


def test_the_file_asks_for_nothing(page):
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\((?!#)|@import|https?://(?!www\.w3\.org)', text)
    assert "default-src 'none'" in text


def test_text_of_a_model_cannot_leave_its_place(trace, tmp_path):
    text, _ = read_generation(trace)
    wicked = "</script><script>document.title='taken'</script><!--"
    for file in trace.iterdir():
        if file.suffix == ".npz":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    changed = {**vars(text), "pieces": (wicked, *text.pieces[1:]), "prompt_text": wicked, "source": f"/{wicked}"}
    write_generation(tmp_path, type(text)(**changed), read_scores(trace))
    written = main(BrowserConfig(trace=tmp_path)).read_text()
    assert wicked not in written
    assert written.count("</script>") == 2


def test_a_frontier_can_be_given(trace, tmp_path):
    csv = tmp_path / "frontier.csv"
    csv.write_text("method,mean_experts,bits_per_byte,seconds\nstatic,4,2.2,1\nstatic,2,2.3,1\ndynamic,3,2.25,1\n")
    assert read_frontier(csv) == {"static": [(2, 2.3), (4, 2.2)], "dynamic": [(3, 2.25)]}
    written = main(BrowserConfig(trace=trace, frontier=csv, out=tmp_path / "page.html")).read_text()
    assert "Bits per byte against experts" in written
    for content, said in (
        ("a,b\n1,2\n", "legal: method"),
        ("mean_experts,mean\nx,2\n", "no two numbers"),
        ("", "none"),
    ):
        csv.write_text(content)
        with pytest.raises(ValueError, match=said):
            read_frontier(csv)


@needs_browser
@pytest.mark.slow
def test_the_page_decides_exactly_as_the_policy(tab, trace, varied_folder):
    means = tab.js("means")
    assert len(means) > 20
    for place in range(0, len(means), 3):
        assert tab.js(f"decisions({place})") == decisions(trace, varied_folder, place), means[place]
    assert tab.js("decisions(null)") == [
        [expert_LK[layer][keep_LK[layer]].tolist() for layer in range(3)]
        for expert_LK, keep_LK in zip(read_scores(trace).expert_NLK, read_scores(trace).keep_NLK)
    ]


@needs_browser
@pytest.mark.slow
def test_the_slider_shows_what_would_change(tab, trace, varied_folder):
    tab.click("#as-recorded")
    before = tab.js("[...document.querySelectorAll('button.token .count')].map((e) => e.textContent)")
    assert "As recorded" in tab.js("$('change').textContent")
    tab.click("#budget", across=0.2)
    place = tab.js("Number($('budget').value)")
    asked, was = decisions(trace, varied_folder, place), tab.js("decisions(null)")
    assert 0 < place < len(tab.js("means")) - 1
    counts = [np.mean([len(layer) for layer in token]) for token in asked]
    shown = tab.js("[...document.querySelectorAll('button.token .count')].map((e) => Number(e.textContent))")
    assert shown == pytest.approx(counts, abs=0.501)
    assert [str(count) for count in shown] != before
    changed = sum(new != old for new, old in zip(asked, was))
    assert tab.js("document.querySelectorAll('button.token.changed').length") == changed
    said = tab.js("$('change').textContent")
    assert f"{changed} of {len(asked)} tokens would change" in said
    assert f"to {np.mean(counts):.2f} experts" in said
    assert tab.js("$('mean').textContent") == f"{np.mean(counts):.2f}"
    # The keyboard moves it, too, and a button takes it back.
    tab.js("$('budget').focus()")
    tab.press("ArrowRight")
    assert tab.js("Number($('budget').value)") == place + 1
    tab.click("#as-recorded")
    assert tab.js("[...document.querySelectorAll('button.token .count')].map((e) => e.textContent)") == before


@needs_browser
@pytest.mark.slow
def test_pointer_and_keyboard_look_at_a_token(tab, trace):
    scores, (_, experts_NL) = read_scores(trace), read_generation(trace)
    tab.js("window.scrollTo(0, 0)")
    tab.point("button.token:nth-of-type(1)")
    tab.js("document.querySelectorAll('button.token')[0].focus()")
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowDown", 12), ("ArrowLeft", 11), ("End", 59)):
        tab.press(key)
        assert f"token {place + 1} of 60" in tab.js("$('token-facts').textContent")
        numbers = tab.js("[...document.querySelectorAll('.layer-number')].map((e) => e.textContent)")
        assert numbers == [f"{count} of 16" for count in experts_NL[place]]
        used = tab.js("[...document.querySelectorAll('.layer svg')].map((s) => s.querySelectorAll('.used').length)")
        assert used == experts_NL[place].tolist()
        best = tab.js("[...document.querySelectorAll('.best')].map((e) => e.firstChild.textContent)")
        assert best == [f"#{e} {w:.2f}" for e, w in zip(scores.expert_NLK[place, :, 0], scores.weight_NLK[place, :, 0])]
    assert tab.js("document.querySelectorAll('button.token[tabindex=\"0\"]').length") == 1
    tab.js("document.querySelectorAll('button.token')[4].id = 'fifth'")
    tab.point("#fifth")
    assert "token 5 of 60" in tab.js("$('token-facts').textContent")


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out(tab, tmp_path, width, dark):
    tab.window(width, dark=dark)
    tab.wait(f"innerWidth === {width}")
    assert not tab.overflows()
    colours = tab.js("[...document.querySelectorAll('button.token')].map((e) => getComputedStyle(e).backgroundColor)")
    assert len(set(colours)) > 3
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"
    tab.window(1280)


# The contrast of WCAG 2 between what is written on a token and its ground, for a number of experts.
CONTRAST = """(share) => {
  const token = document.querySelector('button.token');
  token.style.setProperty('--t', `${200 * (share > 0.5 ? share - 0.5 : share)}%`);
  token.classList.toggle('many', share > 0.5);
  const style = getComputedStyle(token);
  const pen = new OffscreenCanvas(1, 1).getContext('2d');
  const light = (colour) => {
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const linear = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255)
      .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const [text, ground] = [light(style.color), light(style.backgroundColor)];
  return [(Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05), ground];
}"""


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_can_be_read_and_they_rise_or_fall_all_the_way(tab, dark):
    tab.window(1280, dark=dark)
    found = [tab.js(f"({CONTRAST})({step / 24})") for step in range(25)]
    assert min(ratio for ratio, _ in found) > 4.5
    grounds = [ground for _, ground in found]
    assert grounds == sorted(grounds, reverse=not dark)
    tab.js("tokens.forEach(paint)")
    tab.window(1280)


@pytest.mark.parametrize(
    "words", [["/nowhere"], ["{trace}", "--out", "/dev/null/x"], ["{trace}", "--frontier", "/nowhere"]]
)
def test_errors_are_one_line(words, trace):
    failed = run("browser", *(word.replace("{trace}", str(trace)) for word in words))
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
