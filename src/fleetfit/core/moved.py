"""Names at the places where they were before modules moved to the rooms of docs/architecture.md, until version 0.2.

``from fleetfit.messages import take`` still works, with a DeprecationWarning that says where it is now.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PLACES: dict[str, tuple[str, ...]] = {
    "adapt": ("runs.adapt",),
    "artifacts": ("runs.folder", "core.checkpoints"),
    "bounds": ("core.bounds",),
    "cloud": ("cloud.elastic", "cloud.candidates"),
    "clusters": ("cloud.clusters",),
    "config": ("config.sections", "config.fleet", "config.types", "config.job"),
    "config_errors": ("config.errors",),
    "data.owned": ("data.participant",),
    "device": ("device.device",),
    "doctor": ("cli.machine_checks",),
    "edge": ("edge.header",),
    "elastic_training": ("cloud.elastic_training", "cloud.importance"),
    "enas": ("edge.enas",),
    "estimates": ("runs.estimates",),
    "evaluate": ("runs.evaluate",),
    "export": ("runs.export",),
    "files": ("core.files",),
    "hardware": ("core.hardware",),
    "header_proof": ("edge.header_proof",),
    "header_search": ("edge.header_search",),
    "header_trials": ("edge.header_trials",),
    "int8": ("runs.int8",),
    "inventory": ("config.inventory",),
    "job_text": ("config.explain",),
    "members": ("device.handler", "edge.run", "core.link"),
    "messages": (
        *("core.encoding", "core.link", "core.checkpoints", "core.progress", "device.messages", "edge.messages"),
    ),
    "method.matching": ("method.choices",),
    "method.privacy": ("method.noise",),
    "model_folder": ("runs.device_folder",),
    "new_job": ("runs.new_job",),
    "onnx_model": ("runs.onnx_model",),
    "onnx_module": ("runs.onnx_module",),
    "outcome": ("runs.summary",),
    "pipeline": ("cloud.run", "edge.run"),
    "plan": ("runs.plan",),
    "power_meters": ("device.power_meters",),
    "predict": ("runs.predict",),
    "presets": ("config.presets",),
    "pretrain": ("cloud.pretrain",),
    "privacy": ("device.privacy",),
    "privacy_ledger": ("device.privacy_ledger",),
    "profiled_models": ("device.profiled_models",),
    "profiles": ("config.profiles",),
    "profiling": ("device.profiling",),
    "quorum": ("edge.polling", "cloud.run"),
    "randomness": ("core.randomness",),
    "records": ("core.records",),
    "reference": ("cloud.reference",),
    "refinement": ("device.refinement",),
    "replies": ("edge.checks", "cloud.checks"),
    "report": ("runs.report",),
    "rounds": ("edge.rounds",),
    "shipping": ("edge.shipping", "device.ways"),
    "terminal": ("cli.terminal",),
    "tracking": ("runs.tracking",),
    "training": ("models.training",),
    "units": ("core.units",),
    **{
        f"engines.flower.{old}": (f"engines.{new}",)
        for old, new in {
            "certificates": "deployment.certificates",
            "cloud_run": "deployment.run",
            "daemons": "deployment.subprocesses",
            "fleet_file": "deployment.fleet_file",
            "gate": "deployment.proxy",
            "greeting": "deployment.handshake",
            "handover": "simulation.device_files",
            "hub": "deployment.server",
            "inside": "deployment.inside",
            "kit": "deployment.kit",
            "member": "deployment.client",
            "nodes": "simulation.ray_nodes",
            "participants": "deployment.start",
            "provision": "deployment.provision",
            "runtime": "deployment.flower_api",
            "simulated_device": "simulation.worker",
            "simulation": "simulation.run",
        }.items()
    },
}


def found(old: str, name: str) -> Any:
    """What a module that moved had by this name.

    Raises:
        AttributeError: it had nothing of that name.
    """
    if not name.startswith("__"):
        for place in _places(old):
            module = importlib.import_module(f"fleetfit.{place}")
            if hasattr(module, name):
                told = f"fleetfit.{old}.{name} is now fleetfit.{place}.{name}"
                warnings.warn(told, DeprecationWarning, stacklevel=3)
                return getattr(module, name)
    raise AttributeError(f"module 'fleetfit.{old}' has no attribute {name!r}")


def _places(old: str) -> tuple[str, ...]:
    """Where a module is now; nowhere, if it was never there."""
    return (f"runs.{old}",) if old.startswith("report.") else PLACES.get(old, ())


class _Moved(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return found(self.__name__.removeprefix("fleetfit."), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, so only for modules that are not there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == "fleetfit" and _places(old) else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _Moved(spec.name)
        module.__path__ = []  # so that what was below it is looked for, too
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: its names are looked up when they are asked for."""


def find_moved_modules() -> None:
    """Let imports of old places find the new ones."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
