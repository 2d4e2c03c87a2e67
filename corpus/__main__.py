"""`python -m corpus refine` filters and deduplicates documents, `dirt` makes documents to try it on, `facts` makes text
to learn by heart, `dots` makes text of which a token needs several computations at once, `questions` makes a few-shot
test of held-out documents, `prepare` makes a tokenizer and packed tokens of documents, `show` describes a prepared
folder, `tokenizers` compares tokenizers, `mixture` predicts losses of mixtures."""

import foundation.starting  # noqa: F401

# isort: split

from collections.abc import Sequence
from typing import Annotated

import tyro

from corpus.compressors import xz_bits_per_byte
from corpus.dots import DotsConfig, write_dots
from corpus.facts import FactsConfig, write_facts
from corpus.mixture import MixtureConfig, fit, table
from corpus.prepare import CorpusConfig, PreparedCorpus, open_prepared, prepare
from corpus.questions import QuestionsConfig, write_questions
from corpus.refine.config import RefineConfig
from corpus.refine.dirt import DirtConfig, spoil
from corpus.tokenizer_table import TokenizersConfig, compare_tokenizers
from corpus.tokenizer_table import table as tokenizer_table
from foundation.command import deferred, leave_options, refuse_unwritable, run_command

# Tokens of the validation text that xz is shown: of ten gigabytes what is held out neither fits into memory nor is
# compressed in a minute.
XZ_TOKENS = 1 << 22


def summary(prepared: PreparedCorpus) -> str:
    """One grep-able line per fact, then one line per thing left out."""
    manifest = prepared.manifest
    source = ", ".join(manifest.config.data) or "Python standard library"
    sample = prepared.valid_text(XZ_TOKENS)
    part = "" if len(sample) == manifest.valid.bytes else f", of its first {len(sample):,} bytes"
    lines = [
        f"folder            {prepared.folder}",
        f"source            {source}",
        f"content hash      {manifest.content_hash}",
        f"tokenizer hash    {manifest.tokenizer_hash}",
        f"vocabulary        {manifest.vocab_size}",
    ]
    for name, counts in (("train", manifest.train), ("valid", manifest.valid)):
        lines.append(
            f"{name:<17} {counts.documents:,} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens, "
            f"{counts.bytes / counts.tokens:.3f} bytes per token"
        )
    lines += [
        f"valid under xz -9 {xz_bits_per_byte(sample):.4f} bits per byte{part}",
        f"duplicates        {manifest.duplicates_removed:,} removed",
        f"skipped           {sum(kind.count for kind in manifest.skipped_kinds):,}",
    ]
    return "\n".join([*lines, *(f"  {kind.line()}" for kind in manifest.skipped_kinds)])


def prepare_command(config: tyro.conf.OmitArgPrefixes[CorpusConfig], root: str = "runs/corpus") -> None:
    """Prepare a corpus, or find it prepared.

    Args:
        config: What to read and how.
        root: Folder of prepared corpora; each gets a folder of its own in it, named by the hash of config and content.
    """
    prepared = prepare(config, root)
    leave_options(prepared.folder)
    print(summary(prepared))


def refine_command(config: tyro.conf.OmitArgPrefixes[RefineConfig]) -> None:
    """Filter documents by twelve layers and remove what is there twice; the report says what each layer did.

    Args:
        config: What to refine and how.
    """
    # What it imports takes a second that the other commands need not wait for.
    from corpus.refine.report import summary as refined
    from corpus.refine.run import refine

    refuse_unwritable("--out", config.out, folder=True)
    report = refine(config)
    leave_options(config.out)
    print(refined(report))


def dirt_command(config: tyro.conf.OmitArgPrefixes[DirtConfig]) -> None:
    """Spoil clean documents in every way that `refine` should notice, to see whether it does.

    Args:
        config: What to spoil.
    """
    refuse_unwritable("--out", config.out)
    counts = spoil(config)
    print("\n".join(f"{kind:<20} {count:>6,}" for kind, count in counts.items()))
    print(f"written to {config.out}")


def facts_command(config: tyro.conf.OmitArgPrefixes[FactsConfig]) -> None:
    """Write generated text that has to be known by heart, half of it easy and half of it hard.

    Args:
        config: How much of it, and of which world.
    """
    refuse_unwritable("--out", config.out)
    print(f"{config.documents:,} documents, {write_facts(config):,} bytes: {config.out}")


def dots_command(config: tyro.conf.OmitArgPrefixes[DotsConfig]) -> None:
    """Write generated text of which one token needs several computations at once, as many as dots change.

    Args:
        config: How much of it, and how hard.
    """
    refuse_unwritable("--out", config.out)
    print(f"{config.documents:,} documents, {write_dots(config):,} bytes: {config.out}")


def questions_command(config: tyro.conf.OmitArgPrefixes[QuestionsConfig]) -> None:
    """Make questions with choices, or with an exact answer, from held-out documents, for `lm few-shot`.

    Args:
        config: From what, and of which form.
    """
    refuse_unwritable("--out", config.out)
    counts = write_questions(config)
    print("\n".join(f"{domain:<20} {count:>6,}" for domain, count in counts.items()))
    print(f"written to {config.out}")


def tokenizers_command(config: tyro.conf.OmitArgPrefixes[TokenizersConfig]) -> None:
    """Compare tokenizers on held-out text, by domain and language.

    Args:
        config: Which, and on what.
    """
    print(tokenizer_table(compare_tokenizers(config)))


def mixture_command(config: tyro.conf.OmitArgPrefixes[MixtureConfig]) -> None:
    """Predict from small runs which mixture of domains gives which loss.

    Args:
        config: What to learn from and what to predict.
    """
    print(table(fit(config)))


def show_command(folder: Annotated[str, tyro.conf.Positional]) -> None:
    """Describe a prepared corpus.

    Args:
        folder: The folder that `prepare` printed.
    """
    print(summary(open_prepared(folder)))


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(
        lambda given: tyro.extras.subcommand_cli_from_dict(
            {
                "refine": deferred(refine_command),
                "dirt": deferred(dirt_command),
                "facts": deferred(facts_command),
                "dots": deferred(dots_command),
                "questions": deferred(questions_command),
                "prepare": deferred(prepare_command),
                "show": deferred(show_command),
                "tokenizers": deferred(tokenizers_command),
                "mixture": deferred(mixture_command),
            },
            prog="python -m corpus",
            description=__doc__,
            args=given,
        ),
        lambda command: command(),
        arguments,
        continues=True,
    )


if __name__ == "__main__":
    main()
