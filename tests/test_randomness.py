"""Every draw names its generator: global random states decide nothing, so nothing depends on what ran before."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "poisson"}
IN_PLACE = {"uniform_", "normal_", "random_", "bernoulli_", "exponential_", "trunc_normal_", "cauchy_", "geometric_"}
# Dropout takes no generator, and global seeds and states are what nothing may need.
NEVER = {"dropout", "Dropout", "rand_like", "randn_like", "randint_like", "get_rng_state", "set_rng_state", "seed_all"}
# Models of transformers draw their weights from the global state: it is seeded and put back around them.
OTHERS = {"lm/published/parity.py": ["torch.manual_seed"]}
OWN_STATE = {
    "random": {"Random"},
    "np.random": {"default_rng", "Generator", "SeedSequence", "Philox"},
}


def global_draws(tree: ast.AST) -> Iterator[str]:
    """Uses of a global random state."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
            yield f"{node.lineno}: from {node.module}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        named = any(keyword.arg == "generator" for keyword in node.keywords)
        if (
            (owner in OWN_STATE and name not in OWN_STATE[owner])
            or (owner in ("torch", "torch.cuda") and (name == "manual_seed" or name in NEVER))
            or (owner == "torch" and name in TORCH_DRAWS and not named)
            or (name in IN_PLACE and not named)
            or name in NEVER
        ):
            yield f"{node.lineno}: {owner}.{name}"


def own_draws(path: Path) -> list[str]:
    known = OTHERS.get(str(path.relative_to(ROOT)), [])
    return [draw for draw in global_draws(ast.parse(path.read_text())) if draw.split(": ")[1] not in known]


def test_every_draw_names_its_generator() -> None:
    found = {
        str(path.relative_to(ROOT)): draws
        for path in sorted(ROOT.glob("*/**/*.py"))
        if path.relative_to(ROOT).parts[0] not in ("tests", "runs") and ".venv" not in path.parts
        if (draws := own_draws(path))
    }
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.randn(3)",
        "x.uniform_(0, 1)",
        "torch.manual_seed(0)",
        "F.dropout(x)",
        "torch.rand_like(x)",
        "random.shuffle(x)",
        "np.random.permutation(3)",
        "from random import choice",
        "torch.multinomial(p, 1)",
    ],
)
def test_a_global_draw_is_found(line: str) -> None:
    assert list(global_draws(ast.parse(line)))


def test_draws_of_a_generator_are_none() -> None:
    lines = (
        "torch.randn(3, generator=g)\ntorch.Generator().manual_seed(0)\nrandom.Random(0).choice(x)\nrng.normal(0, 1)"
    )
    assert list(global_draws(ast.parse(lines))) == []
