"""Options of a command in a file: `--config FILE.toml`, with any command.

    arguments = ["baseline", "top_p"]   # what stands without a name
    tokens = 300_000
    dry-run = true                      # --dry-run
    data = ["one folder", "another"]
    [attention]                         # --attention.window, where options of a command have such names
    window = 64

A key is an option's name as `--help` shows it, with - or _. What the command line gives too, it decides, arguments
ahead of its options too. Runs leave such a file beside their results.
"""

import itertools
import json
import tomllib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foundation.files import write_text

OPTION, ARGUMENTS = "--config", "arguments"
OPTIONS_FILE = "options.toml"


def with_option_files(words: Sequence[str], nested: Container[str] = ()) -> list[str]:
    """A command line with every `--config FILE` replaced by what the file says.

    Args:
        words: behind the program.
        nested: subcommands that have subcommands of their own.

    Raises:
        ValueError: for a file that is missing or no TOML, or a value that no option has, naming both.
    """
    given = {_name(word) for word in words if word.startswith("--")}
    command = subcommand(words, nested)
    if any(not word.startswith("-") for word in words[len(command) :][:1]):
        # Arguments, see `_options`.
        given.add("")
    expanded: list[str] = []
    # Ahead of the options: behind one that takes several values arguments would be some of these.
    arguments: list[str] = []
    rest = iter(words[len(command) :])
    for word in rest:
        option, equals, path = word.partition("=")
        if option != OPTION:
            expanded.append(word)
            continue
        path = path if equals else next(rest, "")
        if not path:
            raise ValueError(f"{OPTION}: no file is named; legal: the options of the command in a TOML file")
        for key, found in _options(Path(path)):
            if key not in given:
                (expanded if key else arguments).extend(found)
    return [*command, *arguments, *expanded]


def subcommand(words: Sequence[str], nested: Container[str] = ()) -> Sequence[str]:
    """The words of a command line that say which command of the program it is: none where it has but one, else the
    first, and the second where `nested` has the first."""
    most = 2 if words and words[0] in nested else 1
    return list(itertools.takewhile(lambda word: not word.startswith("-"), words[:most]))


def without_option(words: Sequence[str], option: str) -> list[str]:
    """A command line without an option and its value."""
    rest: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word.partition("=")[0] == option
        if not skipping:
            rest.append(word)
    return rest


def write_options(folder: Path, words: Sequence[str]) -> None:
    """Writes a command line, without the program and its subcommand, as `folder`/options.toml."""
    arguments: list[str] = []
    options: dict[str, list[str]] = {}
    values = arguments
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            values = options[name] = [value] if equals else []
        else:
            values.append(word)
    lines = [f"{ARGUMENTS} = {json.dumps(arguments)}"] if arguments else []
    for name, values in options.items():
        value = json.dumps(values) if len(values) > 1 else _written(values[0]) if values else "true"
        lines.append(f"{name if '.' not in name else json.dumps(name)} = {value}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / OPTIONS_FILE, "\n".join([*lines, ""]))


def _written(word: str) -> str:
    """A word as a value of TOML: a number where that is read back as the same word, else a string."""
    try:
        found = tomllib.loads(f"x = {word}")["x"]
    except tomllib.TOMLDecodeError:
        found = None
    # What JSON writes of strings, and of lists of them, TOML reads.
    return word if isinstance(found, int | float) and str(found) == word else json.dumps(word)


def _options(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, words) of each option in the file, what stands without a name first, as ''."""
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise ValueError(f"{OPTION} {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{OPTION} {path}: is no TOML: {error}") from error
    arguments = found.pop(ARGUMENTS, [])
    if not isinstance(arguments, list):
        raise ValueError(f"{OPTION} {path}: {ARGUMENTS} = {arguments!r}; legal: a list of words")
    yield "", [str(word) for word in arguments]
    yield from _flat(path, found, "")


def _flat(path: Path, table: Mapping[str, Any], above: str) -> Iterator[tuple[str, list[str]]]:
    for key, value in table.items():
        name = f"{above}{key}".replace("_", "-")
        if isinstance(value, dict):
            yield from _flat(path, value, f"{name}.")
        elif isinstance(value, bool):
            *groups, last = name.split(".")
            yield name, [f"--{'.'.join([*groups, last if value else f'no-{last}'])}"]
        elif isinstance(value, str | int | float):
            yield name, [f"--{name}", str(value)]
        elif isinstance(value, list) and all(isinstance(part, str | int | float) for part in value):
            yield name, [f"--{name}", *map(str, value)]
        else:
            raise ValueError(
                f"{OPTION} {path}: {name} = {value!r}; legal: a number, a string, true or false, or a list"
            )


def _name(word: str) -> str:
    """The name of the option that a word gives, the same for `--no-x` and `--x`."""
    *groups, last = word.removeprefix("--").partition("=")[0].replace("_", "-").split(".")
    return ".".join([*groups, last.removeprefix("no-")])
