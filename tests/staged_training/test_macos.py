"""What macOS does otherwise, emulated: no call that allocates a file, and peak memory in bytes."""

import os
import resource
import sys

import pytest
import torch

from foundation.environment import peak_memory
from staged_training import activation_cache


@pytest.mark.parametrize("n_bytes", [0, 1, 1 << 20, (5 << 20) + 3])
@pytest.mark.parametrize("system", ["linux", "macos"])
def test_a_file_gets_all_its_blocks(tmp_path, monkeypatch, system, n_bytes):
    if system == "macos":
        monkeypatch.delattr(os, "posix_fallocate")
    elif n_bytes == 0:
        pytest.skip("refused by the system: no cache is empty")
    activation_cache._reserve(tmp_path, n_bytes)
    made = (tmp_path / activation_cache.DATA).stat()
    assert made.st_size == n_bytes
    assert 512 * made.st_blocks >= n_bytes


def test_peak_memory_is_in_bytes_everywhere(monkeypatch):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    counted = {}
    for system in ("linux", "darwin"):
        monkeypatch.setattr(sys, "platform", system)
        counted[system] = peak_memory(torch.device("cpu"))
    assert counted == {"linux": 1024 * usage.ru_maxrss, "darwin": usage.ru_maxrss}
