"""`make docs`: the site has every public function, and every link of it leads somewhere."""

import importlib.util
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_package_has_a_page_of_its_public_modules():
    site = pages()
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(site.PACKAGES)
    modules = {module for package in site.PACKAGES for module in site.public_modules(package)}
    assert {"routing.router", "moe.layer", "attention.plan", "ablations.method", "lm.options"} <= modules
    assert not any(module.endswith(("_kernels", "_launch", "__main__")) for module in modules)
    # A method's file is a change of a configuration.
    assert "ablations.top_p" not in modules
    assert "::: routing.router" in site.package_page("routing")


def test_links_of_the_root_stay_inside_the_notes():
    assert pages().from_root("[map](notes/001-architecture.md), [notes](x)") == "[map](001-architecture.md), [notes](x)"


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.ids = [], set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]


@pytest.mark.long
def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: make docs, or the extra 'docs'")
    command = [sys.executable, "-m", "mkdocs", "build", "-f", str(ROOT / "docs" / "mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    parsed = {}
    for path in tmp_path.rglob("*.html"):
        parsed[path] = Links()
        parsed[path].feed(path.read_text(encoding="utf-8"))
    assert len(parsed) > 30
    missing = []
    for path, page in parsed.items():
        # Its links begin at the root of a server, which nobody knows here.
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                missing.append(f"{path.name}: {link}")
            elif parts.fragment and target in parsed and unquote(parts.fragment) not in parsed[target].ids:
                missing.append(f"{path.name}: {link} has no such place")
    assert not missing, missing[:20]
    assert "route" in (tmp_path / "api" / "routing.html").read_text(encoding="utf-8")
