"""What a device with ``[privacy]`` on must not forget: its secret, which message it has answered at each step of a run,
and what all its runs have promised together.

The promise counts one answer a step. An edge that asked twice, with two different messages, would learn more than was
counted; so the second is refused, also after the device was started again, while the same message gets the same reply.
An edge that begins run after run would learn more too, so runs are counted where no message reaches.
"""

import json
import os
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from fleetfit.config.job import Job
from fleetfit.core.encoding import Message, first_problem
from fleetfit.core.files import read_json, write_atomically
from fleetfit.device.messages import AttributesRequest, DeviceMessage
from fleetfit.device.privacy import DevicePrivacy, digest, releases
from fleetfit.method.noise import epsilon_of

LEDGER_FILE = "privacy.json"


class PrivacyLedger:
    """A file of one device in one run.

    Args:
        folder: Where the device keeps what must live between messages.
        job: The device's own job: whatever its edge says, it keeps to this.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.path = folder / LEDGER_FILE
        if not self.path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            os.chmod(folder, 0o700)  # what is noised lies there as it was, too
            self._write(secrets.token_hex(32), {})
        self.privacy = DevicePrivacy(job.privacy, job.refine, bytes.fromhex(read_json(self.path)["key"]))

    def admit(self, message: DeviceMessage) -> None:
        """Note a message before it is answered.

        Raises:
            ValueError: it was not agreed to, or another message was answered at its step.
        """
        self.privacy.check(message)
        kept = read_json(self.path)
        answered, step, name = dict(kept["answered"]), str(message.step), digest(message).hex()
        if answered.setdefault(step, name) != name:
            raise ValueError(
                f"privacy: another message was answered at step {step}, and a second answer would tell more than was "
                "promised; a new run starts anew"
            )
        self._write(kept["key"], answered)

    def _write(self, key: str, answered: dict[str, str]) -> None:
        write_atomically(self.path, json.dumps({"key": key, "answered": answered}, indent=2), mode=0o600)


class LifetimeLedger:
    """What a device has promised over all runs: a file outside of theirs, which no message deletes or begins anew.

    Gaussian releases compose exactly: all together are as one whose multiplier z has 1 / z^2 the sum of theirs. A run
    counts with all its releases before the first of them is sent, whether it ends or not.

    Args:
        path: The file; its folder is there.
        job: The device's own job.
        limit: The most that all runs together may promise, epsilon; None: what one run of this job does.
        runs: The folder of what is kept of single runs; if there is any, so is the file.

    Raises:
        ValueError: the file is corrupt, or missing though there were runs.
        ImportError: the accountant is missing.
    """

    def __init__(self, path: Path, job: Job, limit: float | None, runs: Path) -> None:
        self.path = path
        self._job = job
        self._spent: dict[str, float] = {}
        self._one_run = len(releases(job.refine)) / job.privacy.noise_multiplier**2
        self.limit = self._epsilon(self._one_run) if limit is None else limit
        if path.exists():
            try:
                self._spent = TypeAdapter(dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]).validate_json(
                    path.read_bytes()
                )
            except ValidationError as error:
                raise ValueError(
                    f"{path} is corrupt ({first_problem(error)}): what this device has promised is not known; put it "
                    "back from a copy, or have a new kit made"
                ) from None
        elif any(runs.glob(f"*/memory/{LEDGER_FILE}")):
            raise ValueError(
                f"{path} is missing, though there were runs: what this device has promised is not known; put it back "
                "from a copy, or have a new kit made"
            )
        else:
            self._write()

    @property
    def words(self) -> str:
        """What is promised so far, for a person."""
        spent, number = self._epsilon(sum(self._spent.values())), len(self._spent)
        return (
            f"epsilon {spent:.3g} of {self.limit:.3g} at delta {self._job.privacy.delta:g} is promised, in {number} "
            f"run{'' if number == 1 else 's'}"
        )

    def check(self, run: str, known: bool, message: Message) -> None:
        """Whether a message of a run may be answered; asked before anything of the run is written.

        Args:
            run: Its id, which the edge has chosen.
            known: Whether what was answered in it is still known here.
            message: One that asks for attributes tells nothing of the data, so it needs no promise.

        Raises:
            ValueError: it is more than may be promised, or a run whose answers are not known any more.
        """
        if run in self._spent and not known:  # a new secret would make new noise for what was answered
            raise ValueError("privacy: this run is over, and what was answered in it is forgotten")
        if run in self._spent or isinstance(message, AttributesRequest):
            return
        total = self._epsilon(sum(self._spent.values()) + self._one_run)
        if total > self.limit * (1 + 1e-9):
            raise ValueError(
                f"privacy: with another run this device would have promised epsilon {total:.4g}, its "
                f"privacy.lifetime_epsilon is {self.limit:.4g}"
            )

    def count(self, run: str, message: Message) -> None:
        """Count a run whose message is about to be answered, once."""
        if run not in self._spent and not isinstance(message, AttributesRequest):
            self._spent[run] = self._one_run
            self._write()

    def _epsilon(self, inverse_square: float) -> float:
        if not inverse_square:
            return 0.0
        return epsilon_of(inverse_square**-0.5, 1, self._job.privacy.delta)

    def _write(self) -> None:
        write_atomically(self.path, json.dumps(self._spent, indent=2) + "\n")


def ledger_of(folder: Path, job: Job) -> PrivacyLedger | None:
    """The ledger of a device, if its job asks for privacy."""
    return PrivacyLedger(folder, job) if job.privacy.on else None
