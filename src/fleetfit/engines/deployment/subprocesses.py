"""Flower's own programs as children of this process: their words are kept in a file, and they end when it ends.

A child holds the reading end of a pipe. When this process ends in whatever way, the pipe ends, and so does the child.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from fleetfit.engines.deployment.inside import Guarded, shown

LOG_BYTES = 5 * 10**6
KEPT_LINES = 40
STOP_SECONDS = 5.0
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1"}
SUPERLINK, SECRET_FILE = "flower-superlink", "--superexec-auth-secret-file"
NOISE = ("/v1/fleet/", "/v1/runtime/", "/health")  # of each request a line, every few seconds for months


class Daemon:
    """One of Flower's programs while it runs.

    Args:
        program: Its command, as Flower installs it.
        arguments: What it is told.
        state: Where it keeps what is its own, and its log.
        hear: Called with each line that it says, from another thread.
    """

    def __init__(
        self, program: str, arguments: Sequence[str], state: Path, hear: Callable[[str], None] = lambda line: None
    ) -> None:
        self.program = program
        self.log_file = state / "logs" / f"{program}.log"
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._hear = hear
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fleetfit.engines.deployment.subprocesses", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(state, os.environ),
            start_new_session=True,  # Ctrl-C is for us; we stop it in order
        )
        self._reader = threading.Thread(target=self._read, name=f"{program}'s log", daemon=True)
        self._reader.start()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def words(self) -> str:
        """What it said last, for a person."""
        self._reader.join(timeout=1.0)
        return "\n".join(self.last_lines)

    def stop(self, at_once: bool = False) -> None:
        """End it, by force if it must be.

        Args:
            at_once: Without a word to others.
        """
        if self.is_running:
            self._process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join(timeout=STOP_SECONDS)

    def _read(self) -> None:
        handler = RotatingFileHandler(self.log_file, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for raw in lines:
                line = raw.decode(errors="replace").rstrip()
                if not line or any(path in line for path in NOISE):
                    continue
                self.last_lines.append(line)
                handler.handle(logging.LogRecord(self.program, logging.INFO, "", 0, line, None, None))
                self._hear(line)
        handler.close()


def environment(state: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """What Flower's programs see: a home of their own, no telemetry, no look for newer versions."""
    home = state / "flower"
    home.mkdir(parents=True, exist_ok=True)
    source = str(Path(__file__).parents[3])  # so that a child finds this package, however the parent did
    path = os.pathsep.join(filter(None, (source, inherited.get("PYTHONPATH", ""))))
    return {**inherited, **QUIET, "FLWR_HOME": str(home.resolve()), "PYTHONPATH": path}


def main(program: str, arguments: Sequence[str]) -> Any:
    """In the child: run one of Flower's programs, and end with the parent."""

    def end_with_parent() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written; it returns when the pipe ends
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if SECRET_FILE in arguments and program == SUPERLINK:
        _guard(Path(arguments[arguments.index(SECRET_FILE) + 1]).read_bytes())
    (command,) = entry_points(group="console_scripts", name=program)
    sys.argv = [program, *arguments]
    return command.load()()


def _guard(secret: bytes) -> None:
    """Whatever Flower serves, it serves to those who know the secret."""
    import uvicorn

    serve = uvicorn.run

    def run(app: Any, **options: Any) -> None:
        serve(Guarded(app, shown(secret)), **options)

    uvicorn.run = run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
