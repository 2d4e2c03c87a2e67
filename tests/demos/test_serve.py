"""The live page: its server's protocol, what it does with bad input and with readers that go away, and in a real
browser a generation whose budget is moved while it runs."""

import http.client
import json
import threading
import time
from urllib.parse import urlencode

import pytest

from demos.serve import ServeConfig, serve
from tests.demos.chromium import needs_browser, opened_tab


@pytest.fixture(scope="module")
def server(varied_folder):
    server = serve(ServeConfig(run=varied_folder, port=0))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, method, path, body=None, **headers):
    """(status, text) of a request."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=30)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


class Events:
    """A generation as its reader sees it."""

    def __init__(self, server, **fields):
        self.connection = http.client.HTTPConnection(*server.server_address, timeout=30)
        self.connection.request("GET", f"/events?{urlencode({'pace': 1e4, **fields})}")
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        assert self.answer.getheader("Content-Type").startswith("text/event-stream")

    def next(self):
        name = self.answer.readline().decode()
        if not name:
            return None
        data = self.answer.readline().decode()
        assert self.answer.readline() == b"\n"
        return name.removeprefix("event: ").strip(), json.loads(data.removeprefix("data: "))

    def all(self):
        return list(iter(self.next, None))

    def close(self):
        self.answer.close()
        self.connection.close()


def text_of(events):
    return "".join(data["text"] for name, data in events if name == "token")


def used(data):
    import numpy as np

    from tests.demos.test_page import unpacked

    level_LK = unpacked(data["level"], np.float32).reshape(3, -1)
    return (level_LK <= unpacked(data["threshold"], np.float32)[:, None]).sum(-1).mean()


def test_a_generation_is_head_tokens_done_and_its_seed_repeats_it(server):
    asked = {"prompt": "def main", "seed": 3, "max_new_tokens": 12, "temperature": 0.8}
    events = Events(server, **asked).all()
    assert [name for name, _ in events] == ["head", *["token"] * 12, "done"]
    assert events[-1][1] == {"end": "length"}
    assert text_of(Events(server, **asked).all()) == text_of(events)
    assert text_of(Events(server, **asked | {"seed": 4}).all()) != text_of(events)


def test_the_budget_moves_while_it_runs(server):
    events = Events(server, prompt="def main", max_new_tokens=2000, budget=2, temperature=0)
    assert events.next()[0] == "head"
    numbers = [used(events.next()[1]) for _ in range(20)]
    assert sum(numbers) / len(numbers) < 3.5
    assert ask(server, "POST", "/budget", "mean=11") == (200, "ok")
    later = []
    while len(later) < 100 and (event := events.next()) and event[0] == "token":
        later.append(used(event[1]))
    assert sum(later[-30:]) / 30 > 8
    assert ask(server, "POST", "/stop", "") == (200, "ok")
    rest = events.all()
    assert rest[-1] == ("done", {"end": "stop"})
    assert len(later) + len(rest) < 1900


def test_a_reader_that_goes_away_ends_its_generation_and_nothing_else(server):
    events = Events(server, prompt="def main", max_new_tokens=2000, temperature=0)
    assert events.next()[0] == "head"
    events.close()
    started = time.monotonic()
    while not server.RequestHandlerClass.session.running.acquire(timeout=0.05):
        assert time.monotonic() < started + 20, "the generation goes on without a reader"
    server.RequestHandlerClass.session.running.release()
    assert Events(server, prompt="def", max_new_tokens=2).all()[-1][0] == "done"


def test_another_generation_takes_the_place_of_the_first(server):
    first = Events(server, prompt="def main", max_new_tokens=2000, temperature=0)
    assert first.next()[0] == "head"
    assert Events(server, prompt="def", max_new_tokens=2).all()[-1] == ("done", {"end": "length"})
    assert first.all()[-1] == ("done", {"end": "stop"})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": "x"}, "seed: 'x' is no whole number"),
        ({"temperature": "nan"}, "finite"),
        ({"temperature": "-1"}, "at least 0"),
        ({"max_new_tokens": "0"}, "at least 1"),
        ({"max_new_tokens": "99999"}, "legal: 1 to"),
        ({"budget": "99"}, "legal: above 0, at most 12"),
        ({"budget": "inf"}, "finite"),
        ({"pace": "0"}, "at least 0.1"),
        ({"bugdet": "3"}, "unknown field 'bugdet'"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_is_one_line(server, fields, said):
    ((name, data),) = Events(server, prompt="def", **fields).all()
    assert name == "refused"
    assert said in data["error"]
    assert "\n" not in data["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nothing", None, 404),
        ("POST", "/nothing", "", 404),
        ("POST", "/budget", "mean=x", 400),
        ("POST", "/budget", "mean=99", 400),
        ("POST", "/budget", "men=3", 400),
        ("POST", "/budget", b"\xff\xfe", 400),
        ("POST", "/budget", "mean=3&" * 300, 400),
        ("PUT", "/", None, 501),
    ],
)
def test_other_requests_are_refused(server, method, path, body, status):
    found, text = ask(server, method, path, body)
    assert found == status
    assert "Traceback" not in text


def test_pages_of_other_places_are_refused(server):
    for headers in ({"Host": "example.org"}, {"Origin": "http://example.org"}, {"Sec-Fetch-Site": "cross-site"}):
        assert ask(server, "GET", "/", **headers)[0] == 403
        assert ask(server, "POST", "/stop", "", **headers)[0] == 403


def test_the_last_generation_can_be_kept(server):
    Events(server, prompt="def main", max_new_tokens=5).all()
    status, text = ask(server, "GET", "/page.html")
    assert status == 200
    assert "decided again from the stored scores" in text


def test_a_port_that_is_taken_is_one_line(server, varied_folder):
    with pytest.raises(ValueError, match="legal: one that is free"):
        serve(ServeConfig(run=varied_folder, port=server.server_address[1]))


@needs_browser
@pytest.mark.slow
def test_a_browser_starts_moves_the_budget_and_stops(server, tmp_path):
    with opened_tab(tmp_path) as tab:
        tab.window(1280)
        tab.open(f"http://127.0.0.1:{server.server_address[1]}/")
        tab.js("document.querySelector('[name=max_new_tokens]').value = 2000")
        # The most likely token, so that the text does not happen to end.
        tab.js("document.querySelector('[name=temperature]').value = 0")
        tab.js("document.querySelector('[name=pace]').value = 100")
        tab.click("#go")
        tab.wait("tokens.length > 20")
        assert tab.js("text.querySelectorAll('button.token').length") > 20
        tab.click("#budget", across=0.02)
        tab.wait("$('state').textContent.startsWith('budget')")
        begun = tab.js("tokens.length")
        tab.wait(f"tokens.length > {begun + 60} || $('stop').disabled")
        few = tab.js("mean(tokens.slice(-30).map((token) => experts(token.recorded)))")
        assert few < 2.5
        tab.click("#stop")
        tab.wait("$('stop').disabled")
        assert "stopped here" in tab.js("text.textContent")
        assert not tab.js("$('keep').hidden")
        assert not tab.overflows()
        tab.window(400)
        tab.wait("innerWidth === 400")
        assert not tab.overflows()
        # Started again it begins anew, from the keyboard, under the same budget.
        tab.js("document.querySelector('[name=max_new_tokens]').value = 5; $('go').focus()")
        tab.press("Enter")
        tab.wait("$('state').textContent === 'finished' && tokens.length === 5")
        assert not tab.errors
