"""bf16 is chosen where the machine is good at it, and nowhere else."""

import pytest
import torch

from lm.precision import fast_dtype

CPU_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@pytest.mark.parametrize(
    ("avx", "amx", "expected"), [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")]
)
def test_on_a_cpu_the_instructions_decide(monkeypatch, avx, amx, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, answer in zip(CPU_CHECKS, (avx, amx)):
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert fast_dtype() == expected


def test_a_torch_without_these_checks_means_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in CPU_CHECKS:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert fast_dtype() == "float32"


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_on_a_gpu_the_gpu_decides(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert fast_dtype() == expected
