"""What keeps code readable at a call: few parameters, and names beside the arguments of a launch."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("foundation", "triton_kernels", "corpus", "attention", "routing"),
    *("moe", "lm", "staged_training", "ablations", "demos"),
)
MOST, MOST_POSITIONAL = 10, 4

# Functions with more parameters, each with the reason why they are not grouped. Besides them only two kinds may have
# more: kernels (`@triton.jit`), and functions registered as torch operators, whose schemas are flat.
OPERANDS = "a public op: its parameters are the operation's own operands and options"
MANY_PARAMETERS = {
    "triton_kernels.softmax.flash_decode.flash_decode": OPERANDS,
    "triton_kernels.linear.gated_delta_rule.gated_delta_rule": OPERANDS,
    "triton_kernels.linear.kimi_delta_attention.kimi_delta_attention": OPERANDS,
    "triton_kernels.linear.linear_decode.delta_decode": OPERANDS,
    "triton_kernels.mixed.mixed_attention.mixed_attention": OPERANDS,
}


def long_signatures(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    """(name with its module, number of parameters) of every function past MOST that is neither a kernel nor an
    operator."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x is not None]
            count = len([name for name in names if name not in ("self", "cls")])
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if count > MOST and "triton.jit" not in decorators and "kernel_op" not in decorators:
                yield f"{module}.{node.name}", count


def test_functions_have_few_parameters() -> None:
    found: dict[str, int] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found |= dict(long_signatures(ast.parse(path.read_text()), module))
    assert found.keys() == MANY_PARAMETERS.keys(), (
        f"more than {MOST} parameters, or listed without having them: {found.keys() ^ MANY_PARAMETERS.keys()}"
    )


def test_a_long_signature_is_found_and_a_kernels_is_not() -> None:
    parameters = ", ".join(f"x{i}" for i in range(MOST))
    for code, n in (
        (f"def f({parameters}): pass", None),
        (f"def f({parameters}, *, y): pass", MOST + 1),
        (f"class C:\n    def f(self, {parameters}): pass", None),
        (f"class C:\n    def f(self, {parameters}, **y): pass", MOST + 1),
        (f"@triton.jit\ndef f({parameters}, y): pass", None),
        (f"@kernel_op('f')\ndef f({parameters}, y): pass", None),
    ):
        assert list(long_signatures(ast.parse(code), "m")) == ([("m.f", n)] if n else [])


def crowded_launches(tree: ast.AST) -> Iterator[int]:
    """Lines of calls of operators (`..._op`) and of kernels (`kernel[grid]`) with more than MOST_POSITIONAL arguments
    that only their place names. Kernels call one another as jitted code must."""
    jitted = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "jit" in " ".join(map(ast.unparse, node.decorator_list))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in jitted or len(node.args) <= MOST_POSITIONAL:
            continue
        if isinstance(node.func, ast.Subscript) or ast.unparse(node.func).endswith("_op"):
            yield node.lineno


def test_launches_name_their_arguments() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "triton_kernels").rglob("*.py"))
        for line in crowded_launches(ast.parse(path.read_text()))
    ]
    assert not found, f"more than {MOST_POSITIONAL} arguments by place: {found}"


def test_a_crowded_launch_is_found() -> None:
    assert list(crowded_launches(ast.parse("x = forward_op(a, b, c, d, None)"))) == [1]
    assert list(crowded_launches(ast.parse("kernel[grid](a, b, c, d, e, N=1)"))) == [1]
    assert list(crowded_launches(ast.parse("forward_op(a, b, c, d, e=1)\nf(a, b, c, d, e)"))) == []
