"""What commands share: arguments and options of the same name, and how results are printed."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

MOST_NAMED = 10
OPTIONS = {
    "data.source": "--data",
    "data.input_column": "--input-column",
    "data.label_column": "--label-column",
    "data.splits": "--split",
}

# Hidden from the panel, not from the usage line: click 8.5 loses the help of typer 0.20's arguments. The text says it.
JobFile = Annotated[Path, typer.Argument(metavar="JOB", hidden=True)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", hidden=True)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one key of the job; repeat for more."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, warnings and log lines.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


@contextmanager
def told_as_options() -> Iterator[None]:
    """A job's keys in an error, as the options that they were given by."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        for key, option in OPTIONS.items():
            said = re.sub(rf"\b{re.escape(key)}\b", option, said)
        raise ValueError(said) from error


def expect_file(path: Path, otherwise: str) -> None:
    """See that a folder is what a command needs, before libraries are loaded that take seconds.

    Raises:
        ValueError: it has no such file.
    """
    if not path.exists():
        raise ValueError(otherwise)


def expect_run(folder: Path, name: str) -> None:
    """See that a folder is that of a finished run.

    Raises:
        ValueError: it is not.
    """
    expect_file(folder / name, f"{folder / name} is missing: is {folder} the folder of a finished run?")


def named(names: Sequence[str]) -> str:
    """Some names in words, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def stdout() -> "Console":
    """Where results go."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def percent(share: float | None) -> str:
    """A share for people; a dash if it is not known."""
    return "–" if share is None or share != share else f"{share:.1%}"
