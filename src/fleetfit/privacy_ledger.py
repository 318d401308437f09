"""What a device with ``[privacy]`` on must not forget: its secret, and which message it has answered at each step.

The promise counts one answer a step. An edge that asked twice, with two different messages, would learn more than was
counted; so the second is refused, also after the device was started again, while the same message gets the same reply.
"""

import json
import os
import secrets
from pathlib import Path

from fleetfit.config import Job
from fleetfit.files import read_json, write_atomically
from fleetfit.messages import DeviceMessage
from fleetfit.privacy import DevicePrivacy, digest


class PrivacyLedger:
    """A file of one device in one run. Whoever deletes it starts a new run, which is counted anew.

    Args:
        folder: Where the device keeps what must live between messages.
        job: The device's own job: whatever its edge says, it keeps to this.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.path = folder / "privacy.json"
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
        write_atomically(self.path, json.dumps({"key": key, "answered": answered}, indent=2))


def ledger_of(folder: Path, job: Job) -> PrivacyLedger | None:
    """The ledger of a device, if its job asks for privacy."""
    return PrivacyLedger(folder, job) if job.privacy.on else None
