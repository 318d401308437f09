"""How commands meet a person: errors as sentences, an orderly stop, progress, numbers as one would say them."""

import contextlib
import errno
import logging
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import typer

GO_ON = "the same command goes on from the last finished step"
SLOW_SECONDS = 10.0  # a phase that takes longer is told when it will end
LINE_EVERY_SECONDS = 60.0  # of a slow phase, where there is no terminal to show a bar
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_TELEMETRY_ENABLED": "0",  # nothing leaves this machine unasked
}


class Signals:
    """Ctrl-C and SIGTERM while a command runs: the first one unwinds, the second one ends the process at once.

    A library may swallow the interrupt or turn it into an error of its own; ``received`` remembers it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._waits = False

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            with contextlib.suppress(OSError):
                os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"\n")  # the cursor was hidden by the progress bar
            os._exit(128 + number)
        self.received = number
        if not self._waits:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def after_this(self) -> Iterator[None]:
        """Stop only when this is over: a native library that is interrupted while it loads may abort the process."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        self.check()

    def check(self) -> None:
        """Raise an interrupt that was swallowed once more."""
        if self.received is not None:
            raise KeyboardInterrupt


@contextlib.contextmanager
def reporting(debug: bool, resumable: bool = False, go_on: str = GO_ON) -> Iterator[Signals]:
    """Turn whatever goes wrong in a command into one message and an exit code; a traceback with debug only."""
    signals = Signals()
    try:
        with signals:
            calm_libraries(debug)
            yield signals
    except (typer.Exit, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt) or signals.received is not None:
            typer.secho(f"stopped; {go_on}" if resumable else "stopped", err=True, fg="yellow")
            raise typer.Exit(128 + (signals.received or signal.SIGINT)) from None
        typer.secho("error: ", err=True, fg="red", bold=True, nl=False)
        typer.echo(error_text(error, resumable, go_on), err=True)
        raise typer.Exit(1) from None


def error_text(error: BaseException, resumable: bool, go_on: str = GO_ON) -> str:
    """What went wrong, for a person: a sentence, and what to do."""
    if isinstance(error, OSError) and error.strerror:
        where = ": ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        text = f"{where}: {error.strerror}" if where else error.strerror
        if resumable and error.errno in WRITE_ERRORS:
            text += f"\nwhat was finished stays; when this is put right, {go_on}"
        return text
    if isinstance(error, ImportError):
        return f"{error}\n`fleetfit doctor` tells what is missing"
    if isinstance(error, (ValueError, OSError)):
        lines = [line for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        return "\n  ".join(lines) or type(error).__name__
    return f"unexpected {type(error).__name__}: {error}\nrun again with --debug for the traceback"


def calm_libraries(debug: bool) -> None:
    """Keep the libraries' own chatter off the terminal; must come before they are imported."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    if debug:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    else:
        warnings.simplefilter("ignore")
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it complains of a home that cannot be written


class Phases:
    """The progress callback: on a terminal a bar for the phase at work, elsewhere a line when a phase starts.

    A finished phase leaves one line, with how long it was since the one before it. A phase that takes long is told when
    it will end; where there is no bar, in a line a minute. A note "who: what" names whose phase it is.
    """

    def __init__(self, signals: Signals, opening: str = "", enabled: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.signals = signals
        self.opening = opening
        self.enabled = enabled
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.live = enabled and self.console.is_terminal
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<26}", markup=False),
            BarColumn(24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.current: tuple[str, str] | None = None
        self.finished: tuple[str, str] | None = None
        self.done = 0
        self.begun = (0.0, 0)
        self.drawn = 0.0
        self.since = time.perf_counter()

    def __enter__(self) -> "Phases":
        self.task = self.bar.add_task("...", total=None, note="")
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """A phase went on; the progress callback."""
        self.signals.check()
        if not self.enabled:
            return
        if total == 0:
            self.tell(note)
            return
        who, colon, what = note.partition(": ")
        key, what = (phase, who if colon else ""), what if colon else note
        if key == self.finished and done >= self.done:
            return  # some steps more than announced
        now = time.perf_counter()
        if key != self.current:
            self._begin(key, total)
            self.begun, self.drawn = (now, done), now if not self.live else self.drawn
        if self.live and (now - self.drawn > 0.05 or done <= 1):
            note = ", ".join(filter(None, (what, self._left(now, done, total))))
            self.bar.update(self.task, completed=min(done, total), total=total, note=note)
            self.drawn = now
        elif not self.live and now - self.drawn > LINE_EVERY_SECONDS and done < total:
            told = (f"{100 * done // total} %", what, self._left(now, done, total))
            self.console.print(f"{' '.join(key).strip()}: {', '.join(filter(None, told))}")
            self.drawn = now
        if done >= total:
            self._finish(key, done, "" if colon else what, now)

    def tell(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.enabled:
            if self.opening:
                self.console.print(self.opening, style="dim")
                self.opening = ""
            self.console.print(f"· {text}", style="dim")

    def _left(self, now: float, done: int, total: int) -> str:
        """When a slow phase will end, as it went so far; what was read back at its beginning does not count."""
        since, first = self.begun
        if now - since < SLOW_SECONDS or not first < done < total:
            return ""
        left = (total - done) * (now - since) / (done - first)
        return f"{format_duration(left)} left" if left >= 1 else ""

    def _begin(self, key: tuple[str, str], total: int) -> None:
        self.current, self.finished = key, None
        if self.opening:
            self.console.print(self.opening, style="dim")
            self.opening = ""
        if self.live:
            self.bar.reset(self.task, description=" ".join(key).strip(), total=total, note="")
        else:
            self.console.print(f"{' '.join(key).strip()} ...")

    def _finish(self, key: tuple[str, str], done: int, what: str, now: float) -> None:
        name = " ".join(key).strip()
        duration = format_duration(now - self.since)
        if self.live:
            self.console.print(f"✓ {name:<26} {duration:>10}   {what}".rstrip())
            self.bar.reset(self.task, description="...", total=None, note="")
        else:
            self.console.print(f"{name}: done in {duration}{', ' if what else ''}{what}")
        self.current, self.finished, self.done, self.since = None, key, done, now


def format_duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def format_bytes(number: float) -> str:
    """Bytes in the units that a job uses: powers of ten, three digits."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
