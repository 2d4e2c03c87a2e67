"""Trains what the difficulty study compares: a reference model, and from one trunk static models and methods that
choose the number per token.

    <out>/synthetic.jsonl        generated problems, part of the text
    <out>/corpus/                the prepared text, validation documents held out by hash
    <out>/trunks/, <out>/branches/   runs, see `staged_training.record`
    <out>/study.json             what was trained and where it lies: all that the analysis reads

The trunk trains with a random number of experts, so no static model starts with weights made for its own k. The
reference has another seed, hence other weights, another data order and other draws, and static top-k; its own trunk is
the early checkpoint that learnability is measured against.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ablations.comparison.registry import find_methods, sources_of
from ablations.difficulty.tasks import generate, write_problems
from ablations.method import with_policy
from corpus.prepare import CorpusConfig, PreparedCorpus, prepare
from foundation.command import command_line, leave_options
from foundation.environment import environment
from foundation.files import check_seal, json_text, write_into_seal, write_text
from foundation.numbers import check_numbers
from foundation.serialize import load_json, to_dict
from lm.config import ModelConfig
from lm.options import ModelOptions
from routing.policies.random_k import RandomK
from routing.policies.top_k import TopK
from staged_training.describe import describe
from staged_training.estimate import estimate
from staged_training.execute import Execution, ExecutionConfig
from staged_training.plan import Plan
from staged_training.staging import StagingConfig, corpus_facts, make_plan

STUDY_FILE, PROBLEMS_FILE = "study.json", "synthetic.jsonl"
# No seed of the models that are compared.
REFERENCE, EARLY, REFERENCE_SEED = "reference", "reference_early", 1000
RANDOM_K = "random_k"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What to train.

    Attributes:
        out: folder of everything; the same command continues what it finds there.
        minutes: train the main model (trunk plus one branch) for about this long on this machine instead of for
            `tokens`; measured once, and kept in the folder, so a run that is continued has the same budget.
        seeds: trunks, each with a branch of every method and static model: the noise of training, which intervals over
            documents do not hold.
        reference_share: tokens of the reference model, as a share of the main model's.
        early_share: share of those after which its early losses are taken.
        synthetic_documents: generated problems that are mixed into the text; those held out are the probes with
            structural labels.
        static: each k a static model is trained at, from the common trunk.
        methods: names as `python -m ablations list` shows them.

    Raises:
        ValueError: for a share outside its range, too few problems, a frozen prefix, or nothing to train.
    """

    out: Path = Path("runs/difficulty")
    minutes: float | None = None
    seeds: int = 1
    reference_share: float = 0.4
    early_share: float = 0.3
    synthetic_documents: int = 24_000
    static: tuple[int, ...] = (4, 8, 12, 16)
    methods: tuple[str, ...] = ("top_p", "difficulty_head")
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    staging: Annotated[StagingConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: StagingConfig(tokens=5_000_000, trunk_share=0.8)
    )
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=CorpusConfig)
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )

    def __post_init__(self) -> None:
        for name in ("reference_share", "early_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must lie between 0 and 1")
        if self.synthetic_documents < 30:
            raise ValueError(
                f"--synthetic-documents {self.synthetic_documents}: at least 30, or none of a task is held out"
            )
        check_numbers(self, static=1, seeds=1)
        if self.seeds > REFERENCE_SEED:
            raise ValueError(f"--seeds {self.seeds}: must be at most {REFERENCE_SEED}, the reference's seed")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"--minutes {self.minutes}: must be above 0")
        if self.staging.freeze:
            raise ValueError(f"--freeze {self.staging.freeze}: must be 0, the study counts the experts of every layer")
        if not self.methods or not self.static:
            raise ValueError("--methods and --static each need at least one entry")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What was trained. Folders are relative to the study's.

    Attributes:
        k: experts per token that every method holds in the mean.
        tokens: the main model's, trunk plus one branch.
        models: `lm.pretrained` folder by name: reference, reference_early, random_k, each method, and static_<k>.
        runs: run folder by name, of the branches: the method's, with `_seed_<s>` behind it for another seed than 0.
        static: the k that a static model was trained at, by its name in `runs`; every other run chooses the number for
            each token.
        methods, seeds: of each run, by its name; of a study with one seed, which may lack them, the name itself and 0.
        seconds: of training by name, trunk plus branch.
        command: that trains it again.
        environment: commit, versions and device.
    """

    k: int
    tokens: int
    corpus: str
    models: dict[str, str]
    runs: dict[str, str]
    static: dict[str, int]
    seconds: dict[str, float]
    command: str
    environment: dict
    methods: dict[str, str] = dataclasses.field(default_factory=dict)
    seeds: dict[str, int] = dataclasses.field(default_factory=dict)

    def method_of(self, name: str) -> str:
        """What a run was trained with."""
        return self.methods.get(name, name)

    def seed_of(self, name: str) -> int:
        """Of a run's trunk and branch."""
        return self.seeds.get(name, 0)


def run_name(method: str, seed: int) -> str:
    """What a run is called, in the study and in tables."""
    return method if seed == 0 else f"{method}_seed_{seed}"


def static_name(k: int) -> str:
    """What the static model of a k is called, in folders and tables."""
    return f"static_{k}"


def train(options: TrainingOptions) -> Study:
    """Trains whatever is not finished.

    Returns:
        What was trained; `study.json` holds it.

    Raises:
        ValueError: for options, text or methods that do not fit.
        foundation.stopping.Interrupted: after a stop signal, everything saved.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = prepare_text(options)
    model = options.model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
    options = with_tokens(options, corpus, model)
    reference = execution(options, corpus, reference_plan(options, corpus, model))
    mains = [execution(options, corpus, main_plan(options, corpus, model, seed)) for seed in range(options.seeds)]
    print(describe(mains[0].plan), flush=True)
    leave_options(options.out)
    reference.trunk()
    late = reference.branch(reference.plan.branches[0])
    models, runs = {REFERENCE: late.folder / "model", EARLY: reference.trunk_folder / "model"}, {}
    seconds, methods, seeds, study = {}, {}, {}, None
    for seed, main in enumerate(mains):
        _, trunk_record = main.trunk()
        for branch in main.plan.branches:
            record, name = main.branch(branch), run_name(branch.method, seed)
            models[name], runs[name] = record.folder / "model", record.folder
            methods[name], seeds[name] = branch.method, seed
            seconds[name] = sum(
                ledger.costs[kind]["seconds"]
                for kind, ledger in (("trunk", trunk_record.ledger), ("branches", record.ledger))
            )
            # Written after every branch: what is trained can be analysed while the rest trains.
            study = Study(
                k=options.model.k,
                tokens=options.staging.tokens,
                corpus=relative(corpus.folder, options.out),
                models={name: relative(folder, options.out) for name, folder in models.items()},
                runs={name: relative(folder, options.out) for name, folder in runs.items()},
                static={name: k for name in runs for k in options.static if methods[name] == static_name(k)},
                seconds=dict(seconds),
                command=command_line(),
                environment=environment(data_hash=main.plan.corpus.content_hash),
                methods=dict(methods),
                seeds=dict(seeds),
            )
            write_into_seal(options.out, {STUDY_FILE: json_text(to_dict(study))}, seal_too=[PROBLEMS_FILE], anew=True)
    assert study is not None
    return study


def relative(folder: Path, root: Path) -> str:
    """A path that stays right when the folder of the study is moved."""
    return str(folder.relative_to(root))


def prepare_text(options: TrainingOptions) -> PreparedCorpus:
    """The user's text and the generated problems, as one corpus."""
    path = options.out / PROBLEMS_FILE
    write_problems(generate(options.synthetic_documents, seed=0), path)
    if not options.corpus.data:
        raise ValueError("--data: name the files or folders of text to train on")
    return prepare(dataclasses.replace(options.corpus, data=(*options.corpus.data, str(path))), options.out / "corpus")


def with_tokens(options: TrainingOptions, corpus: PreparedCorpus, model: ModelConfig) -> TrainingOptions:
    """The options with the number of tokens that `minutes` amounts to on this machine.

    Decided once per folder: run identities hold the number of tokens, so a second measurement would start all anew.
    """
    path = options.out / "tokens.txt"
    if options.minutes is None:
        return options
    if not path.exists():
        trial = execution(
            options, corpus, make_plan(options.staging, corpus_facts(corpus), trunk_model(model, options.model.k), [])
        )
        per_step = estimate(trial, steps=8).trunk / trial.plan.trunk.n_batches
        write_text(path, f"{round(60 * options.minutes / per_step) * trial.plan.tokens_per_batch}\n")
    return dataclasses.replace(options, staging=dataclasses.replace(options.staging, tokens=int(path.read_text())))


def execution(options: TrainingOptions, corpus: PreparedCorpus, plan: Plan) -> Execution:
    """What runs a plan in the folder of the study."""
    return Execution(plan, corpus, options.out, options.execution)


def trunk_model(model: ModelConfig, k: int) -> ModelConfig:
    """Any k from 2 to 2k-2, k in the mean: every k that the analysis forces is one the weights have met."""
    lowest = min(2, k)
    return with_policy(model, RandomK(k_min=lowest, k_max=min(2 * k - lowest, model.moe.n_experts), k_eval=k))


def main_plan(options: TrainingOptions, corpus: PreparedCorpus, model: ModelConfig, seed: int = 0) -> Plan:
    """A trunk of random k, and from it the static models, the same random k, and the methods.

    Args:
        seed: of the trunk and of every branch.

    Raises:
        ValueError: for a method that chooses no number of experts, or that has the name of a static model.
    """
    trunk = trunk_model(model, options.model.k)
    methods = find_methods(list(options.methods))[1:]
    if fixed := [method.name for method in methods if not method.has_budget(model)]:
        raise ValueError(f"--methods {fixed[0]}: must choose the number of experts for every token and hold its mean")
    if taken := [method.name for method in methods if method.name in map(static_name, options.static)]:
        raise ValueError(f"--methods {taken[0]}: is also the name of a static model of --static; leave one of them out")
    models = {RANDOM_K: trunk}
    models |= {method.name: method.change(model) for method in methods}
    models |= {static_name(k): with_policy(model, TopK(k=k)) for k in options.static}
    return make_plan(
        options.staging,
        corpus_facts(corpus),
        trunk,
        [(name, config, seed) for name, config in models.items()],
        trunk_seed=seed,
        sources=sources_of(methods),
    )


def reference_plan(options: TrainingOptions, corpus: PreparedCorpus, model: ModelConfig) -> Plan:
    """A static model of its own seed: its trunk is the early checkpoint, its branch the late one."""
    staging = dataclasses.replace(
        options.staging, tokens=round(options.staging.tokens * options.reference_share), trunk_share=options.early_share
    )
    return make_plan(
        staging, corpus_facts(corpus), model, [(REFERENCE, model, REFERENCE_SEED)], trunk_seed=REFERENCE_SEED
    )


def read_study(folder: Path) -> Study:
    """What `train` recorded.

    Raises:
        ValueError: where no study was trained, or not to the end of its first branch.
    """
    if not (folder / STUDY_FILE).is_file():
        raise ValueError(
            f"{folder} holds no finished {STUDY_FILE}: train it first with `python -m ablations difficulty --out"
            f" {folder} --data ...`"
        )
    check_seal(folder)
    return load_json(Study, folder / STUDY_FILE)
