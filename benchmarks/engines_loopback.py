"""The fleet of recipes/fleet-loopback.toml as programs of this machine: one cloud, two edges, four devices."""

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fleetfit.engines.deployment.kit import Kit, read_kit
from fleetfit.engines.deployment.kit_file import kit_toml
from fleetfit.engines.deployment.provision import provision
from fleetfit.engines.deployment.server import free_port

RECIPES = Path(__file__).parents[1] / "recipes"
BELOW = {"cloud": ("phones", "boxes"), "phones": ("phones-1", "phones-2"), "boxes": ("boxes-1", "boxes-2")}
MEMBERS = tuple(name for lower in BELOW.values() for name in lower)
DEVICES = tuple(name for name in MEMBERS if name not in BELOW)
SHORT: dict[str, Any] = {  # the phases before the devices' own, which are not what is looked at here
    "model": {"epochs": 1},
    "backbone": {"steps": 8, "specialise_steps": 4, "importance_samples": 64},
    "header": {"budget_steps": 30, "views": 1},
}
MARK = "FLEETFIT_BENCHMARK"
PATIENCE_SECONDS = 3600.0
END_SECONDS = 20.0


def job_fields(changed: Mapping[str, Any]) -> dict[str, Any]:
    """recipes/digits-small.toml with some keys changed, one level deep."""
    fields = tomllib.loads((RECIPES / "digits-small.toml").read_text())
    for key, value in changed.items():
        fields[key] = fields.get(key, {}) | value if isinstance(value, dict) else value
    return fields


def alive(mark: str) -> list[str]:
    """Command lines of processes that were started with this mark, or by those, whoever their parent is now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it is gone
            continue
    return found


def leftovers(mark: str) -> list[str]:
    """Who is still there after some seconds."""
    ends = time.monotonic() + END_SECONDS
    while (found := alive(mark)) and time.monotonic() < ends:
        time.sleep(0.2)
    return found


class Fleet:
    """Programs of one fleet, and what they say.

    Args:
        folder: Where kits, logs and runs go.
        changed: What differs from recipes/digits-small.toml.
    """

    def __init__(self, folder: Path, changed: Mapping[str, Any]) -> None:
        self.folder = folder
        self.kits = folder / "kits"
        self.mark = str(folder)
        self.programs: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.toml").write_text(
            tomli_w.dumps(job_fields({**changed, "run": {"cache": str(folder / "cache-of-the-cloud")}}))
        )
        fleet = tomllib.loads((RECIPES / "fleet-loopback.toml").read_text()) | {"job": "job.toml"}
        (folder / "FLEET.toml").write_text(tomli_w.dumps(fleet))
        provision(folder / "FLEET.toml", self.kits, split_data=True)
        for upper in BELOW:
            self.set_port(upper, free_port())

    def kit(self, name: str) -> Kit:
        """Somebody's kit."""
        return read_kit(self.kits / name)

    def set_port(self, upper: str, port: int, server: bool = True) -> None:
        """Let somebody listen elsewhere, and let those below know; or only the latter."""
        for name in (upper, *BELOW[upper]) if server else BELOW[upper]:
            kit = self.kit(name)
            part = "server" if name == upper else "upstream"
            changed = getattr(kit.file, part).model_copy(update={"port": port})
            (self.kits / name / "kit.toml").write_text(kit_toml(kit.file.model_copy(update={part: changed})))

    def fleetfit(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a program; its words go to files."""
        with self.log(name).open("ab") as log, (self.folder / f"{name}.json").open("wb") as out:
            self.programs[name] = subprocess.Popen(
                [sys.executable, "-m", "fleetfit", *arguments],
                stdout=out,
                stderr=log,
                env=os.environ | {MARK: self.mark},
            )
        return self.programs[name]

    def log(self, name: str) -> Path:
        """What a program has said."""
        return self.folder / f"{name}.log"

    def run(self, *more: str) -> dict[str, Any]:
        """The whole job as in docs/deploy.md, all told; the summary, with the seconds of the cloud's program."""
        for name in MEMBERS:
            self.fleetfit(name, "start", str(self.kits / name), "--once", *more)
        start = time.perf_counter()
        self.fleetfit(
            *("cloud", "run", str(self.kits / "cloud" / "job.toml"), "--engine", "flower", "--cloud"),
            *(str(self.kits / "cloud"), "--out", str(self.folder / "flower"), "--json", *more),
        )
        self._wait("cloud")
        seconds = time.perf_counter() - start
        for name in MEMBERS:
            self._wait(name)
        summary: dict[str, Any] = json.loads((self.folder / "flower" / "summary.json").read_text())
        return summary | {"wall_seconds": seconds}

    def run_whole(self, engine: str) -> dict[str, Any]:
        """The same job by an engine that has all data, from a cache of its own."""
        start = time.perf_counter()
        job, out = str(self.kits / "cloud" / "job.toml"), str(self.folder / engine)
        cache = f"run.cache={self.folder / f'cache-{engine}'}"
        self.fleetfit(engine, "run", job, "--engine", engine, "--out", out, "--set", cache, "--json")
        self._wait(engine)
        summary: dict[str, Any] = json.loads((self.folder / engine / "summary.json").read_text())
        return summary | {"wall_seconds": time.perf_counter() - start}

    def _wait(self, name: str) -> None:
        try:
            code = self.programs[name].wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            code = "no end"  # type: ignore[assignment]
        if code:
            self.close()
            words = "\n".join(f"--- {n}\n{self.log(n).read_text(errors='replace')[-3000:]}" for n in self.programs)
            raise SystemExit(f"{words}\n{name}: {code}")

    def close(self) -> None:
        """End what runs."""
        for program in self.programs.values():
            if program.poll() is None:
                program.terminate()
                try:
                    program.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    program.kill()
                    program.wait()
