"""What this machine offers and what is missing: values for ``fleetfit doctor``, nothing is printed here."""

import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from fleetfit.config.sections import RunConfig
from fleetfit.core.records import Record

MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}  # where a package's module is not its name with underscores
EXTRAS = {"export": "fleetfit export", "privacy": "[privacy]", "xlsx": "spreadsheets"}  # what an extra is for
SMALL_MEMORY_BYTES = 2 * 2**30
SMALL_DISK_BYTES = 2**30


class Check(Record):
    """One line of the doctor: what was looked at, what was found, and whether it will do."""

    name: str
    found: str
    needs: str = ""
    ok: bool = True
    note: str = ""


def examine(doing: Callable[[str], None] = lambda name: None) -> Iterator[Check]:
    """Look at Python, every package that fleetfit and its extras need, the machine and the cache folder.

    Args:
        doing: Called with what is looked at next; loading a package takes a while.
    """
    yield from _python()
    yield from _packages(doing)
    doing("the machine")
    yield _processor()
    yield _memory()
    yield _gpu()
    yield _cache(Path(RunConfig().cache).expanduser())


def _python() -> Iterator[Check]:
    try:
        own = metadata.metadata("fleetfit")
    except metadata.PackageNotFoundError:
        yield Check(name="fleetfit", found="not installed", ok=False, note="pip install . in its folder")
        return
    yield Check(name="fleetfit", found=own["Version"])
    needs = own["Requires-Python"] or ""
    found = platform.python_version()
    fits = _fits(found, needs)
    note = "" if fits else "make a virtual environment with a supported Python"
    yield Check(name="python", found=found, needs=needs, ok=fits, note=note)


def _packages(doing: Callable[[str], None]) -> Iterator[Check]:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Check(name="packaging", found="missing", ok=False, note="pip install packaging")
        return
    try:
        lines = metadata.requires("fleetfit") or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        optional = marker is not None and not marker.evaluate({"extra": ""})
        uses = [use for extra, use in EXTRAS.items() if marker is not None and marker.evaluate({"extra": extra})]
        if optional and not uses:
            continue
        name = requirement.name
        needs = ",".join(sorted(map(str, requirement.specifier), reverse=True))
        doing(name)
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            use = f"only for {uses[0]}: " if optional else ""
            note = f"{use}pip install '{name}{needs}'"
            yield Check(name=name, found="missing", needs=needs, ok=optional, note=note)
            continue
        if not _fits(found, needs):
            yield Check(name=name, found=found, needs=needs, ok=False, note=f"pip install '{name}{needs}'")
            continue
        note = _load_error(MODULES.get(name, name.replace("-", "_")))
        yield Check(name=name, found=found, needs=needs, ok=not note, note=note)


def _fits(version: str, needs: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(needs).contains(version, prereleases=True)


def _load_error(module: str) -> str:
    """Why an installed package does not load, in one line; empty if it does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation may raise anything
        lines = str(error).strip().splitlines() or [""]
        return f"installed, but does not load: {type(error).__name__}: {lines[0]}"
    return ""


def _processor() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = f"{usable} of {os.cpu_count()} cores usable"
    threads = f"run.threads is {RunConfig().threads} by default"
    return Check(name="cpu", found=f"{cores}, {platform.machine()}", note=threads)


def _memory() -> Check:
    total, free = _memory_bytes()
    if not total:
        return Check(name="memory", found="unknown")
    small = free < SMALL_MEMORY_BYTES
    return Check(
        name="memory",
        found=f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB",
        note="little; close other programs or use a smaller model" if small else "",
    )


def _memory_bytes() -> tuple[int, int]:
    """(total, available), the container's limit counted in; zeros where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, LookupError, ValueError):
        try:
            total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return 0, 0
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        total, free = min(total, limit), min(free, max(0, limit - used))
    except (OSError, ValueError):  # no limit: "max", or no such file
        pass
    return total, free


def _gpu() -> Check:
    try:
        import torch

        from fleetfit.core.hardware import torch_device_of

        if not torch.cuda.is_available():
            if torch.backends.mps.is_available():
                return Check(name="gpu", found="Metal", note="used with run.torch_device = 'mps'")
            return Check(name="gpu", found="none", note="not needed")
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found = ", ".join(f"{c.name} ({c.total_memory / 2**30:.0f} GiB)" for c in cards)
        return Check(
            name="gpu",
            found=found,
            note=f"jobs run on {torch_device_of('auto')}, unless run.torch_device says otherwise",
        )
    except Exception as error:  # a broken driver; torch itself is checked above
        return Check(name="gpu", found="unknown", note=f"{type(error).__name__}: {error}")


def _cache(folder: Path) -> Check:
    """The cache folder is made on first use: what counts is whether its nearest existing parent can be written."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Check(
            name="cache",
            found=str(folder),
            ok=False,
            note=f"not writable: {error.strerror}: {existing}; set run.cache to a folder of yours",
        )
    note = f"writable, {free / 2**30:.1f} GiB free" + ("; little" if free < SMALL_DISK_BYTES else "")
    return Check(name="cache", found=str(folder), note=note)
