"""A fleet of three devices behind two edges: its kits, made once, and its programs, started by who wants them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import tomli_w
from ports import reserved_port
from same_run import differences, weight_differences
from tiny_job import tiny_fields

import fleetfit
from fleetfit.config.job import load_job
from fleetfit.engines.deployment.kit import read_kit
from fleetfit.engines.deployment.kit_file import kit_toml
from fleetfit.engines.deployment.provision import provision

TINY = tiny_fields(
    seed=3,
    data={"split": "classes", "limit": 600},
    header={"search": "halving", "budget_steps": 20},
    refine={"prune_share": 0.3},
)
TINY["fleet"]["devices"][0]["gpu_capacity"] = [40, 50]  # devices of one cluster differ, and their kits must say so

FLEET: dict[str, Any] = {"job": "job.toml", "edges": [{"name": "small"}, {"name": "large"}]}
Write = Callable[[Path, dict[str, Any], dict[str, Any]], Path]


def write_fleet(folder: Path, job: dict[str, Any], fleet: dict[str, Any]) -> Path:
    """A job and a FLEET.toml that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.toml").write_text(tomli_w.dumps(job))
    path = folder / "FLEET.toml"
    path.write_text(tomli_w.dumps(fleet))
    return path


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """The job's fields."""
    return TINY


@pytest.fixture(scope="session")
def fleet() -> dict[str, Any]:
    """The fleet's fields."""
    return FLEET


@pytest.fixture(scope="session")
def write() -> Write:
    """Writes a job and its fleet."""
    return write_fleet


@pytest.fixture(scope="session")
def made_kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits with a part of the data each; not to be changed."""
    folder = tmp_path_factory.mktemp("fleet")
    job = TINY | {"run": {"cache": str(folder / "cache")}}
    provision(write_fleet(folder, job, FLEET), folder / "kits", split_data=True)
    return folder / "kits"


@pytest.fixture
def kits(made_kits: Path, tmp_path: Path) -> Path:
    """A copy of the kits, to do with as one likes."""
    return Path(shutil.copytree(made_kits, tmp_path / "kits"))


# -- programs ----------------------------------------------------------------------------------------------------------

PATIENCE_SECONDS = 600.0


class Fleet:
    """The programs of one fleet, and what they say.

    Args:
        folder: Where logs and runs go.
        kits: The kits, with ports of their own.
        inside: A name -> the words before its command, such as those that enter a network namespace.
    """

    def __init__(self, folder: Path, kits: Path, inside: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
        self.kits = kits
        self.folder = folder
        self.inside = inside
        self.mark = f"fleetfit-test-{os.getpid()}-{time.monotonic_ns()}"
        self.programs: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: dict[str, Path] = {}
        self._heard: dict[Path, int] = {}
        self._local: dict[str, Any] | None = None
        names = [path.parent.name for path in kits.glob("*/kit.toml")]
        roles = {name: read_kit(kits / name).file.role for name in names}
        self.devices = tuple(name for name in sorted(names) if roles[name] == "device")
        self.members = tuple(name for name in sorted(names) if roles[name] == "edge") + self.devices

    def fleetfit(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one of ours."""
        return self.program(name, sys.executable, "-m", "fleetfit", *arguments)

    def program(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a program; its words go to a file."""
        self.logs[name] = self.folder / f"{name}.{len(list(self.folder.glob(f'{name}.*.log')))}.log"
        with self.logs[name].open("wb") as log:
            self.programs[name] = subprocess.Popen(
                [*self.inside.get(name, ()), *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"FLEETFIT_TEST": self.mark},
                start_new_session=True,
            )
        return self.programs[name]

    def start(self, *names: str, once: bool = True) -> None:
        for name in names:
            self.fleetfit(name, "start", str(self.kits / name), *(["--once"] if once else []))

    def run(self, out: str = "run") -> subprocess.Popen[bytes]:
        job, cloud = self.kits / "cloud" / "job.toml", self.kits / "cloud"
        arguments = ("--engine", "flower", "--cloud", str(cloud), "--out", str(self.folder / out), "--json")
        return self.fleetfit("run", "run", str(job), *arguments)

    def says(self, name: str) -> str:
        """What a program has said since it was started, or since ``forget``."""
        log = self.logs[name]
        return log.read_bytes()[self._heard.get(log, 0) :].decode(errors="replace")

    def forget(self) -> None:
        """What was said so far is of before, and so are the models."""
        self._heard = {log: log.stat().st_size for log in self.logs.values()}
        for device in self.devices:
            shutil.rmtree(self.kits / device / "model", ignore_errors=True)

    def wait_for(self, name: str, words: str) -> None:
        """Until a program has said something."""
        self.wait_until(name, lambda: bool(re.search(words, self.says(name))), f"says {words!r}")

    def wait_until(self, name: str, done: Callable[[], bool], what: str) -> None:
        """Until something is so, while a program runs."""
        ends = time.monotonic() + PATIENCE_SECONDS
        while not done():
            assert self.programs[name].poll() is None, f"{name} has ended before it {what}:\n{self.says(name)}"
            assert time.monotonic() < ends, f"{name} never {what}:\n{self.everything()}"
            time.sleep(0.1)

    def ends_well(self, *names: str) -> None:
        for name in names:
            try:
                assert self.programs[name].wait(PATIENCE_SECONDS) == 0, f"{name}:\n{self.says(name)}"
            except subprocess.TimeoutExpired:
                pytest.fail(f"{name} does not end:\n{self.everything()}")

    def kill(self, name: str) -> None:
        """As a power cut would, this program and no other; those of Flower go with it."""
        self.programs[name].kill()
        self.programs[name].wait()

    def alive(self) -> list[str]:
        """Processes that were started here, or by those, whoever their parent is now."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def leaves_nothing(self, seconds: float = 120.0) -> None:
        ends = time.monotonic() + seconds
        while (alive := self.alive()) and time.monotonic() < ends:
            time.sleep(0.1)
        assert not alive, alive

    def everything(self) -> str:
        return "\n".join(f"--- {name}\n{self.says(name)[-3000:]}" for name in self.logs)

    def close(self) -> None:
        for program in self.programs.values():
            if program.poll() is None:
                program.kill()
                program.wait()
        self.leaves_nothing()

    # -- what came of it ------------------------------------------------------------------------------------------

    def summary(self, out: str = "run") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / out / "summary.json").read_text())
        return found

    def local(self) -> tuple[dict[str, Any], Path]:
        """What the local engine makes of the same job."""
        out = self.folder / "local"
        if self._local is None:
            self._local = fleetfit.run(load_job(self.kits / "cloud" / "job.toml"), out)
        return self._local, out

    def is_the_same(self, out: str = "run", expected: tuple[dict[str, Any], Path] | None = None) -> None:
        """The deployment's figures and models are those of the local engine, all of them, but for rounding."""
        summary, folder = expected or self.local()
        found = self.summary(out)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        tested = [d["num_test"] for line in lines if line["step"].startswith("finish/") for d in line["devices"]]
        for key in ("reference", "clusters", "devices", "absent"):
            assert not list(differences(found[key], summary[key], min(tested), key))
        for device in summary["devices"]:
            ours, theirs = self.kits / device["id"] / "model", folder / "devices" / device["id"]
            assert not list(weight_differences(ours / "model.safetensors", theirs / "model.safetensors"))
            cards = [json.loads((each / "model.json").read_text()) for each in (ours, theirs)]
            assert not list(differences(*cards, min(tested), device["id"]))
            fleetfit.load(ours)


def free_ports(kits: Path) -> None:
    """Two test runs on one machine must not meet."""
    for path in kits.glob("*/kit.toml"):
        upper = read_kit(path.parent)
        if upper.file.server is None:
            continue
        port = reserved_port()
        for name in (upper.file.name, *(member.name for member in upper.file.members)):
            kit = read_kit(kits / name)
            part = "server" if name == upper.file.name else "upstream"
            changed = getattr(kit.file, part).model_copy(update={"port": port})
            (kits / name / "kit.toml").write_text(kit_toml(kit.file.model_copy(update={part: changed})))


MakeFleet = Callable[..., Fleet]


@pytest.fixture(scope="module")
def provisioned() -> Iterator[MakeFleet]:
    """Makes fleets of programs, none of which is started, and ends all that is left of them."""
    made: list[Fleet] = []

    def make(
        folder: Path,
        fleet: dict[str, Any] = FLEET,
        fleet_of_job: Sequence[Mapping[str, Any]] = TINY["fleet"]["devices"],
        insecure: bool = False,
        inside: Mapping[str, Sequence[str]] = MappingProxyType({}),
        **changed: Any,
    ) -> Fleet:
        links = {"deadline_seconds": 120.0, "quorum": 1.0}
        job = TINY | {"fleet": {"devices": list(fleet_of_job)}, "run": {"cache": str(folder / "cache")}, "links": links}
        job |= changed
        provision(write_fleet(folder, job, fleet), folder / "kits", split_data=True, insecure=insecure)
        free_ports(folder / "kits")
        (folder / "logs").mkdir()
        made.append(Fleet(folder / "logs", folder / "kits", inside))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def programs() -> Iterator[Callable[[Path, Path], Fleet]]:
    """The programs of kits that are there, none of which is started; ends all that is left of them."""
    made: list[Fleet] = []

    def programs(folder: Path, kits: Path) -> Fleet:
        (folder / "logs").mkdir()
        made.append(Fleet(folder / "logs", kits))
        return made[-1]

    yield programs
    for each in made:
        each.close()


@pytest.fixture
def make(provisioned: MakeFleet, tmp_path: Path) -> Iterator[MakeFleet]:
    """Makes the fleet of one test."""
    made: list[Fleet] = []

    def make(**changed: Any) -> Fleet:
        made.append(provisioned(tmp_path, **changed))
        return made[-1]

    yield make
    for each in made:
        each.close()
