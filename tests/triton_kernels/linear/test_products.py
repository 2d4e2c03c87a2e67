"""The torch forms' products: the same numbers whichever library multiplies, and its permission gone when the product is
done."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from triton_kernels.linear import products_torch
from triton_kernels.linear.products_torch import add_matmul, matmul, onednn_is_exact

SETTINGS = torch.backends.mkldnn.matmul


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(64, 32, 64, 64), (3, 5, 7, 2)])
def test_products_are_what_their_inputs_say(dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    X, M, K, N = sizes
    a, b, c = torch.randn(X, M, K).to(dtype), torch.randn(X, N, K).to(dtype).mT, torch.randn(X, M, N).to(dtype)
    right, rounding = a.double() @ b.double(), torch.finfo(dtype).eps
    assert (matmul(a, b, torch.full_like(c, torch.nan)) - right).abs().max() <= 4 * rounding * right.abs().max()
    right = c.double() + right
    assert (add_matmul(c, a, b) - right).abs().max() <= 4 * rounding * right.abs().max()
    assert SETTINGS.fp32_precision == "none"


def test_rounding_is_noticed_and_then_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_with_tiles(operation, *operands, **options):
        return operation(*(x.bfloat16().float() for x in operands), **options)

    monkeypatch.setattr(products_torch, "_by_onednn", as_with_tiles)
    assert not onednn_is_exact.__wrapped__()
    monkeypatch.setattr(products_torch, "onednn_is_exact", lambda: False)
    x = torch.full((64, 32, 64), 1 + 2.0**-12)
    assert torch.equal(matmul(x, torch.eye(64).repeat(64, 1, 1), torch.empty_like(x)), x)


@pytest.mark.parametrize("before", ["none", "ieee"])
def test_the_permission_ends_with_the_product(before: str) -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        seen.append(SETTINGS.fp32_precision)
        raise RuntimeError("out of memory")

    seen: list[str] = []
    try:
        SETTINGS.fp32_precision = before
        with pytest.raises(RuntimeError, match="out of memory"):
            products_torch._by_onednn(breaks, torch.zeros(1))
        assert seen == ["bf16"]
        assert SETTINGS.fp32_precision == before
    finally:
        SETTINGS.fp32_precision = "none"


def test_threads_leave_the_setting_as_it_was() -> None:
    a, b = torch.randn(64, 32, 64), torch.randn(64, 64, 64)
    right = torch.bmm(a, b)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: matmul(a, b, torch.empty_like(right)), range(200)):
            torch.testing.assert_close(found, right)
    assert SETTINGS.fp32_precision == "none"
    assert torch.get_float32_matmul_precision() == "highest"
