"""Numbers that nothing can be made of do not get past the configuration that holds them."""

import argparse
import dataclasses
import math

import pytest

from ablations.comparison.options import Options
from attention.config import AttentionConfig
from foundation.numbers import argument, check_numbers
from lm.bench import BenchConfig
from lm.config import ModelConfig
from lm.sampling import SamplingConfig
from moe.bench import Shape
from moe.config import MoEConfig
from routing.losses import ThreeLevelBalance
from routing.policies.top_p import TopP
from routing.router import RouterConfig
from staged_training.execute import ExecutionConfig
from staged_training.optimizer import OptimizerConfig
from staged_training.schedule import Schedule
from staged_training.staging import StagingConfig

BUILT = (
    *(AttentionConfig, BenchConfig, ExecutionConfig, ModelConfig, MoEConfig, Options, OptimizerConfig, RouterConfig),
    *(SamplingConfig, Schedule, Shape, StagingConfig),
)


@pytest.mark.parametrize("config", BUILT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**23], ids=str)
def test_no_config_takes_what_is_no_number(config, value):
    for field in dataclasses.fields(config):
        if isinstance(getattr(config(), field.name), int | float) and "bool" not in str(field.type):
            with pytest.raises(ValueError, match=rf"{config.__name__}\.{field.name}: "):
                config(**{field.name: value})


def test_what_a_router_is_made_of_is_looked_at_too():
    with pytest.raises(ValueError, match=r"TopP\.target_mean: nan, must be a finite number"):
        RouterConfig(policy=TopP(target_mean=math.nan, cap=4))
    with pytest.raises(ValueError, match=r"ThreeLevelBalance\.group_coefficient: inf, must be a finite number"):
        RouterConfig(three_level_balance=ThreeLevelBalance(group_coefficient=math.inf))
    with pytest.raises(ValueError, match=r"RouterConfig\.z_coefficient: -1.0, must be at least 0"):
        RouterConfig(z_coefficient=-1.0)


@dataclasses.dataclass(frozen=True)
class Numbers:
    count: int | None = None
    shares: tuple[float, ...] = ()
    name: str = ""


def test_bounds_hold_inside_tuples_and_none_is_no_number():
    check_numbers(Numbers(), count=1)
    check_numbers(Numbers(count=1, shares=(0.5,)), count=1, shares=0)
    with pytest.raises(ValueError, match=r"Numbers\.shares: \(0.5, -1\), must be at least 0"):
        check_numbers(Numbers(shares=(0.5, -1)), shares=0)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "1e400", "x", "1" + "0" * 23, ""])
def test_an_argument_is_refused_in_words(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be at|is no int"):
        argument(int, 1)(text)
    assert argument(int, 1)("3") == 3


@pytest.mark.parametrize("steps", [{"save_every": 0}, {"log_every": 0}, {"save_every": -1}])
def test_steps_between_things_are_at_least_one(steps):
    with pytest.raises(ValueError, match=r"ExecutionConfig\.(save|log)_every: (0|-1), must be at least 1"):
        ExecutionConfig(**steps)
