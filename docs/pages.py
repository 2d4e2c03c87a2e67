"""What the site has beside the notes: README and AGENTS.md, and one page per package that names its public functions.

A hook of mkdocs, which calls the functions that begin with `on_`. Docstrings are read, nothing is imported.
"""

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "notes"
PACKAGES = (
    *("foundation", "triton_kernels", "corpus", "attention", "routing"),
    *("moe", "lm", "staged_training", "ablations", "demos"),
)
# Kernels are called through the public operation beside them, launch tables are data.
NOT_SHOWN = re.compile(r"(_kernels|_launch|launch_tables|__main__|__init__)$")


def on_config(config: Any) -> Any:
    """Lays out the navigation: what to read first, results, kernels, the public functions."""
    notes = [path.name for path in sorted(NOTES.glob("0*.md"))]
    results = ["results/README.md", *_below(NOTES / "results", "*/*.md")]
    kernels = ["kernels/README.md", *(page for page in _below(NOTES / "kernels", "*.md") if "README" not in page)]
    config["nav"] = [
        {"Start": "index.md"},
        {"For whoever changes the code": "AGENTS.md"},
        {"Notes": notes},
        {"Results": results},
        {"Kernels": kernels},
        {"Log": "LOG.md"},
        {"Functions": [{package: f"api/{package}.md"} for package in PACKAGES]},
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are not in `notes/`."""
    from mkdocs.structure.files import File

    pages = {f"api/{package}.md": package_page(package) for package in PACKAGES}
    for name, page in (("README.md", "index.md"), ("AGENTS.md", "AGENTS.md")):
        pages[page] = from_root((ROOT / name).read_text(encoding="utf-8"))
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def from_root(text: str) -> str:
    """A page of the root, its links as they are inside of `notes/`."""
    return re.sub(r"(?<=\]\()notes/", "", text)


def package_page(package: str) -> str:
    """The page of one package: what each of its modules is for, and its public functions and classes."""
    lines = [f"# {package}", ""]
    for module in public_modules(package):
        lines += [f"::: {module}", ""]
    return "\n".join(lines)


def public_modules(package: str) -> list[str]:
    """Modules with public functions or classes of their own; methods, which are one change of a configuration each, are
    listed by `python -m ablations list`."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        is_method = any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHOD" for node in tree.body)
        if public and not is_method and not NOT_SHOWN.search(path.stem):
            found.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


def _below(folder: Path, pattern: str) -> list[str]:
    return [path.relative_to(NOTES).as_posix() for path in sorted(folder.glob(pattern))]
