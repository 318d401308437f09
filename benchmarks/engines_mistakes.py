"""How soon a mistake of a fleet is told, by the one who made it and by the one above: engines_mistakes.md."""

import argparse
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from datasets import Dataset
from engines_loopback import SHORT, Fleet, leftovers
from engines_page import setting, table, verdict

from fleetfit.config.job import load_job
from fleetfit.core.files import write_atomically
from fleetfit.engines.deployment.certificates import Authority, make_authority, make_member_key, make_server
from fleetfit.engines.deployment.kit import read_kit
from fleetfit.engines.deployment.kit_file import kit_toml
from fleetfit.engines.deployment.proxy import REPEATED_SECONDS

TARGET_SECONDS = 30.0
PATIENCE_SECONDS = 120.0
OTHER_VERSION = (  # a program of another release
    "import sys, fleetfit.engines.flower.greeting as g; g.own_version = lambda: '9.9'; "
    "from fleetfit.cli import main; sys.argv[0] = 'fleetfit'; main()"
)

Spoil = Callable[[Fleet, Path], object]


@dataclass(frozen=True)
class Mistake:
    """What is wrong, and what must be said of it.

    Attributes:
        what: In words.
        kit: Whose kit is copied and spoilt.
        spoil: Does it, to the copy.
        own: What its program says.
        above: What the one above says.
        tells: The one above; empty: it is never reached.
        version: Another release of fleetfit.
    """

    what: str
    kit: str
    spoil: Spoil
    own: str
    above: str
    tells: str
    version: bool = False


def replaced_key(_: Fleet, kit: Path) -> None:
    """A key that nobody was told of."""
    (kit / "node.key").write_bytes(make_member_key()[0])


def renamed(_: Fleet, kit: Path) -> None:
    """A name that nobody was told of."""
    file = read_kit(kit).file
    (kit / "kit.toml").write_text(kit_toml(file.model_copy(update={"name": "phones-9"})))


def expired_server(fleet: Fleet, kit: Path) -> None:
    """The server's own certificate, of the right authority, is over."""
    key = load_pem_private_key((fleet.kits / "ca" / "ca.key").read_bytes(), None)
    certificate = x509.load_pem_x509_certificate((fleet.kits / "ca" / "ca.pem").read_bytes())
    pem, private = make_server(Authority(key, certificate), "boxes", ["127.0.0.1"], days=0)  # type: ignore[arg-type]
    (kit / "server.pem").write_bytes(pem)
    (kit / "server.key").write_bytes(private)


def expired_kit(_: Fleet, kit: Path) -> None:
    """All of the kit is over."""
    (kit / "ca.pem").write_bytes(make_authority("old", 0).certificate_pem)


def of_another_fleet(fleet: Fleet, kit: Path) -> None:
    """The same participant of a fleet that was provisioned at another time."""
    other = Fleet(fleet.folder / "other", SHORT)
    port = fleet.kit("phones").server.port
    shutil.rmtree(kit)
    shutil.copytree(other.kits / "phones-1", kit)
    file = read_kit(kit).file
    assert file.upstream is not None
    upstream = file.upstream.model_copy(update={"port": port})
    (kit / "kit.toml").write_text(kit_toml(file.model_copy(update={"upstream": upstream})))


def other_job(_: Fleet, kit: Path) -> None:
    """One of the two has a job that was changed."""
    fields = load_job(kit / "job.toml").model_dump(mode="json", exclude_none=True)
    (kit / "job.toml").write_text(tomli_w.dumps(fields | {"seed": 99}))


def no_data(_: Fleet, kit: Path) -> None:
    """The data is not where the kit says."""
    shutil.rmtree(kit / "data")


def other_labels(_: Fleet, kit: Path) -> None:
    """A label that the job does not know."""
    for path in (kit / "data").glob("*.parquet"):
        rows = Dataset.from_parquet(str(path), keep_in_memory=True)
        label = next(name for name in rows.column_names if "label" in name)
        rows.remove_columns(label).add_column(label, ["eleven"] * len(rows)).to_parquet(path)


def nothing(*_: object) -> None:
    """The kit is as it was."""


MISTAKES = (
    Mistake(
        "a key that is not the registered one",
        *("phones-1", replaced_key, "does not have the key", "refused .*does not have the key", "phones"),
    ),
    Mistake(
        "a participant that is not registered",
        *("phones-1", renamed, "is not among the devices", "refused .*is not among the devices", "phones"),
    ),
    Mistake(
        "an edge whose certificate has expired",
        *("boxes", expired_server, "has expired on", "refused .*boxes cannot take part: .*expired", "cloud"),
    ),
    Mistake("a kit that has expired", "phones-1", expired_kit, "this kit has expired", "", ""),
    Mistake(
        "a certificate of another authority: a kit from another fleet",
        *("phones-1", of_another_fleet, "is not signed by the authority", "refused .*a kit from another fleet"),
        "phones",
    ),
    Mistake(
        "a port that is taken",
        *(
            "boxes",
            nothing,
            "error: boxes cannot listen at",
            "refused .*boxes cannot take part: .*already in use",
            "cloud",
        ),
    ),
    Mistake(
        "two participants with one name",
        *("phones-2", nothing, "error: 'phones-2' is taken", "refused .*'phones-2' is taken", "phones"),
    ),
    Mistake(
        "a job that was changed on one side",
        *("phones-1", other_job, "has another job than phones", "refused .*has another job than phones", "phones"),
    ),
    Mistake(
        "data that is missing",
        *("phones-1", no_data, "error: data.source", "refused .*phones-1 cannot take part: its data", "phones"),
    ),
    Mistake(
        "a label that the job does not know",
        *("phones-1", other_labels, "eleven", "refused .*phones-1 cannot take part: its data", "phones"),
    ),
    Mistake(
        "another version on the edge than on the cloud",
        *("boxes", nothing, "install the same version", "refused .*install the same version", "cloud", True),
    ),
)


@contextmanager
def taken(port: int) -> Iterator[None]:
    """Another program listens there."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        yield


def heard(path: Path, words: str, since: int = 0) -> bool:
    """Whether a log has these words behind some byte."""
    return bool(re.search(words, path.read_bytes()[since:].decode(errors="replace")))


def wait(done: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> bool:
    """Until something is so, or too long."""
    ends = time.monotonic() + seconds
    while not done():
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True


def make(fleet: Fleet, mistake: Mistake, number: int) -> tuple[float | None, float | None]:
    """Make one; seconds until its own program and the one above have told of it, from its start."""
    kit = fleet.folder / f"wrong-{number}"
    shutil.copytree(fleet.kits / mistake.kit, kit, ignore=shutil.ignore_patterns("state", "*.lock"))
    mistake.spoil(fleet, kit)
    log = fleet.log(mistake.tells or "cloud")
    since = log.stat().st_size
    name = kit.name
    start = time.perf_counter()
    if mistake.version:
        with fleet.log(name).open("ab") as own:
            command = [sys.executable, "-c", OTHER_VERSION, "start", str(kit)]
            fleet.programs[name] = subprocess.Popen(command, stdout=own, stderr=own)
    else:
        fleet.fleetfit(name, "start", str(kit))
    at: dict[str, float] = {}

    def both() -> bool:
        if "own" not in at and heard(fleet.log(name), mistake.own):
            at["own"] = time.perf_counter() - start
        if "above" not in at and mistake.above and heard(log, mistake.above, since):
            at["above"] = time.perf_counter() - start
        return len(at) == 1 + bool(mistake.above)

    wait(both)
    program = fleet.programs[name]
    wait(lambda: program.poll() is not None, 30.0)
    if program.poll() is None:
        program.terminate()
        program.wait()
    return at.get("own"), at.get("above")


def mistakes(options: argparse.Namespace) -> None:
    """Each once, in a fleet that is at work."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="fleetfit-mistakes-") as temporary:
        fleet = Fleet(Path(temporary), SHORT)
        try:
            fleet.fleetfit("cloud", "start", str(fleet.kits / "cloud"))
            for name in ("phones", "phones-2"):
                fleet.fleetfit(name, "start", str(fleet.kits / name))
            if not wait(lambda: heard(fleet.log("phones"), "phones-2 is there")):
                raise SystemExit(fleet.log("phones").read_text())
            told: dict[str, float] = {}
            for number, mistake in enumerate(MISTAKES):
                if mistake.above:  # a door repeats the same words only after some time
                    time.sleep(max(0.0, told.get(mistake.above, 0.0) + REPEATED_SECONDS - time.monotonic()))
                    told[mistake.above] = time.monotonic() + TARGET_SECONDS
                if "port" in mistake.what:
                    with taken(fleet.kit("boxes").server.port):
                        own, above = make(fleet, mistake, number)
                else:
                    own, above = make(fleet, mistake, number)
                rows.append((mistake, own, above))
                print(f"{mistake.what}: {own} {above}", flush=True)
        finally:
            fleet.close()
        left = leftovers(fleet.mark)
    write_atomically(options.out / "engines_mistakes.md", "\n".join(page(rows, left)))


def page(rows: list[tuple[Mistake, float | None, float | None]], left: list[str]) -> list[str]:
    """The figures as a page."""

    def seconds(value: float | None, expected: bool = True) -> str:
        return (f"{value:.1f}" if value is not None else "**never**") if expected else "–"

    all_told = all(own is not None and (above is not None or not m.above) for m, own, above in rows)
    slowest = max((s for _, own, above in rows for s in (own, above) if s is not None), default=0.0)
    return [
        "# How soon a mistake is told",
        "",
        setting("python benchmarks/engines.py mistakes", "flwr"),
        "",
        "Programs of the fleet of recipes/fleet-loopback.toml, over TLS with keys; the cloud, one edge and one device "
        "are at work. Each mistake is made once, by a program that is started with a spoilt copy of a kit. Seconds "
        "from its start, that of Python included, until its own log names what is wrong, and until the log of the "
        "one above does. A kit that has expired is not used at all: its owner is told.",
        "",
        *table(
            ["mistake", "told by its own program, s", "told by the one above, s"],
            [[m.what, seconds(own), seconds(above, bool(m.above))] for m, own, above in rows],
        ),
        "",
        *table(
            ["figure", "target", "measured", ""],
            [
                ["told on both sides", "all", "all" if all_told else "not all", verdict(all_told)],
                ["slowest, s", f"<= {TARGET_SECONDS:.0f}", f"{slowest:.1f}", verdict(slowest <= TARGET_SECONDS)],
                ["processes left", "0", len(left), verdict(not left)],
            ],
        ),
        "",
    ]
