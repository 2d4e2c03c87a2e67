"""An option has one name and one default, whichever command takes it."""

import dataclasses
from collections import defaultdict

import pytest

from ablations.agreement.options import AgreementOptions
from ablations.comparison.options import Options
from ablations.difficulty.training import TrainingOptions
from ablations.scaling.ladder_options import LadderOptions
from corpus.prepare import CorpusConfig
from lm.bench import BenchConfig
from lm.long_context import LongContextConfig
from lm.options import ModelOptions
from staged_training.__main__ import RunConfig
from staged_training.parallel import ParallelConfig
from staged_training.profile import ProfileConfig
from staged_training.staging import StagingConfig
from staged_training.sweep import SweepConfig
from tests.test_command_lines import COMMANDS, help_of

COMMANDS_OF = {
    "corpus prepare": CorpusConfig,
    "ablations compare": Options,
    "ablations agreement": AgreementOptions,
    "ablations difficulty": TrainingOptions,
    "ablations scaling ladder": LadderOptions,
    "staged_training run": RunConfig,
    "staged_training parallel": ParallelConfig,
    "staged_training sweep": SweepConfig,
    "staged_training profile": ProfileConfig,
    "lm bench": BenchConfig,
    "lm long-context": LongContextConfig,
}
# Option and command: why it is another there.
OTHERS = {
    ("out", None): "a folder of its own, so that runs of different kinds are told apart",
    ("csv", None): "each writes a table of its own",
    ("repeats", None): "how often something is timed depends on how long it takes",
    ("valid_characters", "ablations agreement"): "all runs read one text: half of it says which is better",
    ("valid_share", "ablations scaling ladder"): "likewise, of whole documents",
    ("seeds", None): "of a comparison, pairs; of a sweep, runs of one setting; of a study, those of its form",
    ("trunk_seeds", "ablations agreement"): "one per seed, to spread the noise of trunks",
    ("tokens", "ablations agreement"): "those of its form",
    ("batch_size", "ablations agreement"): "that of its form",
    ("tokens", "ablations difficulty"): "a study of one long run",
    ("trunk_share", "ablations difficulty"): "its static models need longer branches",
    ("tokens", "lm long-context"): "of a prompt",
    ("n_layers", "lm long-context"): "a plan that shares keys and values needs eight",
    ("layer_plan", "lm long-context"): "likewise",
    ("window", "lm long-context"): "what its record was made with",
    ("d_expert", "lm long-context"): "likewise",
    ("decode_tokens", None): "likewise",
    ("vocab_size", None): "without a text to learn from, the 4,096 that a text gets where nothing is said",
    ("resamples", None): "how many cost little depends on what is fitted to each",
    ("token_budgets", None): "of a ladder several, of a sweep the one budget",
    ("methods", None): "arguments of one, an option of the other",
}


def defaults(config, found):
    """Every option with its default, those of nested configurations without the name of what holds them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            defaults(value, found)
        else:
            found[field.name] = value
    return found


def test_an_option_has_one_default():
    by_option = defaultdict(dict)
    for command, kind in COMMANDS_OF.items():
        for name, value in defaults(kind(), {}).items():
            by_option[name][command] = value
    shared = {name: values for name, values in by_option.items() if len(values) > 1}
    assert {"data", "valid_share", "vocab_size", "d_model", "dtype", "tokens", "learning_rate", "kind"} <= set(shared)
    different = {
        (name, command): value
        for name, values in shared.items()
        for command, value in values.items()
        if value != defaults(home(name), {}).get(name, next(iter(values.values())))
        and not {(name, None), (name, command)} & OTHERS.keys()
    }
    assert not different, different


def home(name):
    """Where an option's default is."""
    for kind in (ModelOptions, CorpusConfig, StagingConfig, Options):
        if name in defaults(kind(), {}):
            return kind()
    return ModelOptions()


def test_what_is_listed_as_different_is():
    for name, command in OTHERS:
        kinds = COMMANDS_OF.values() if command is None else (COMMANDS_OF[command],)
        assert any(name in defaults(kind(), {}) for kind in kinds), (name, command)


@pytest.mark.parametrize(("package", "command"), COMMANDS)
def test_no_option_says_which_part_of_a_configuration_it_is_of(package, command, capsys, monkeypatch):
    words = help_of(package, command, capsys, monkeypatch).split()
    dotted = {word.partition("[")[0] for word in words if word.startswith("--") and "." in word.rstrip(".,;")}
    assert not {word for word in dotted if not word.startswith("--columns.")}
