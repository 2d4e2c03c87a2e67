"""`python -m ablations corpora`: arms that differ in their training text alone: the same tokenizer, model, number of
tokens and validation text."""

import dataclasses

from ablations.text.differences import DifferenceRow, TextRow, difference_text, differences
from ablations.text.options import CorporaOptions
from ablations.text.runs import train_whole
from corpus.prepare import PreparedCorpus, prepare
from foundation.command import leave_options
from foundation.tables import write_rows
from staged_training.staging import corpus_facts, make_whole_plan, training_text

RUNS_FILE, DIFFERENCES_FILE = "runs.csv", "differences.csv"
# Of the validation text one document stays out; of the corpora as few as can be, which are not evaluated on.
NEARLY_ALL, HARDLY_ANY = 1 - 1e-9, 1e-9


def compare_corpora(options: CorporaOptions) -> list[DifferenceRow]:
    """Trains what is not finished, prints, and leaves the tables in `out`.

    Raises:
        ValueError: for text, model or staging that do not fit.
        foundation.stopping.Interrupted: everything saved; the same call continues.
    """
    root = options.out / "corpus"
    tokenizer, arms = None, dict[str, PreparedCorpus]()
    for name, data in options.paths.items():
        arms[name] = prepare(options.corpus(data, HARDLY_ANY), root, tokenizer)
        tokenizer = arms[name].tokenizer
    held_out = prepare(options.corpus(options.valid, NEARLY_ALL), root, tokenizer)
    leave_options(options.out)
    domains = held_out.valid_domains()
    for name, arm in arms.items():
        passes = options.staging.tokens / len(arm.train)
        print(f"{name}: {arm.train.n_documents:,} documents, {len(arm.train):,} tokens, read {passes:.2f} times")
    print(f"evaluated on {held_out.valid.n_documents:,} documents, {held_out.valid.n_bytes:,} bytes", flush=True)
    rows: list[TextRow] = []
    for seed in range(options.seeds):
        for name, arm in arms.items():
            print(f"\n{name}, seed {seed}", flush=True)
            corpus = dataclasses.replace(training_text(arm, options.staging), valid=held_out.valid)
            model = options.model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
            plan = make_whole_plan(options.staging, corpus_facts(corpus), model, seed=seed)
            found = train_whole(plan, corpus, options.out, options.execution, domains)
            rows += [TextRow(name, seed, domain, bits) for domain, bits in found.items()]
            write_rows(options.out / RUNS_FILE, TextRow, rows)
    first, *others = arms
    against = differences(rows, [(other, first) for other in others])
    write_rows(options.out / DIFFERENCES_FILE, DifferenceRow, against)
    print(f"\n{difference_text(rows, against)}\n\ntables: {options.out}")
    return against
