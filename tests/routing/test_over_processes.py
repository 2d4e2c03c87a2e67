"""The k-th smallest value over processes, by its bits. With real processes: tests/staged_training/test_parallel.py."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.over_processes import kth_smallest_over_processes


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


# Few values, so that ties are common, with both signs, both infinities, numbers next to each other and subnormal ones.
VALUES = st.sampled_from(
    [-torch.inf, -3.5, -1e-30, -1e-44, 0.0, 1e-44, 1.0, 1.0000001, 2.0, 1e30, torch.inf]
) | st.floats(width=32, allow_nan=False)


@settings(deadline=None, max_examples=80)
@given(values=st.lists(st.lists(VALUES, min_size=1, max_size=40), min_size=1, max_size=3), share=st.floats(0, 1))
def test_it_is_the_kth_value(group, values, share):
    tensors = [torch.tensor(row) for row in values]
    ranks = [1 + round(share * (len(row) - 1)) for row in values]
    expected = torch.stack([tensor.kthvalue(rank)[0] for tensor, rank in zip(tensors, ranks)])
    assert torch.equal(kth_smallest_over_processes(tensors, torch.tensor(ranks), group), expected)


def test_rank_zero_lies_below_everything(group):
    assert kth_smallest_over_processes([torch.tensor([1.0, 2.0])], torch.tensor([0]), group).tolist() == [-torch.inf]
