"""How far a phase is, told to whoever wants to know."""

from typing import Protocol


class Progress(Protocol):
    """The one progress callback: a phase, how far it is, how far it goes, and a short note.

    With a total of 0 the note is something to be told once, and the phase goes on as it was.
    """

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Called often; must be cheap."""


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """A progress callback that shows nothing."""
