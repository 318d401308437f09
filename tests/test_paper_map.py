"""The paper map names what there is: functions in their files, tests that exist, keys with their values."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fleetfit.config.job import Job, make_job
from fleetfit.config.presets import PAPER

ROOT = Path(__file__).parent.parent
MAP = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")
PLACE = re.compile(r"(?P<file>[\w/]*\w\.py)?(?P<sign>::?)(?P<name>\w+)")
SECTIONS = [name for name in Job.model_fields if hasattr(getattr(Job(), name), "model_fields")]


@cache
def names_in(path: Path) -> set[str]:
    """Functions and classes of a module's top level, methods as their plain names too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def places() -> list[tuple[str, str]]:
    """(file, name) of all that is named as ``file.py:function``, ``file.py::test``, or ``:function`` after either."""
    found = []
    for line in MAP.splitlines():
        last = {":": "", "::": ""}
        for code in CODE.findall(line):
            if not (match := PLACE.fullmatch(code)):
                if re.fullmatch(r"[\w/]+\.py", code):
                    found.append((code, ""))
                continue
            sign = match["sign"]
            last[sign] = match["file"] or last[sign]
            found.append((f"{'tests' if sign == '::' else 'src/fleetfit'}/{last[sign]}", match["name"]))
    return sorted(set(found))


def where(file: str) -> Path | None:
    """A file under the root, the package or the tests."""
    options = [ROOT / file, ROOT / "src" / "fleetfit" / file, ROOT / "tests" / file]
    return next((p for p in options if p.is_file()), None)


def keys() -> list[tuple[str, str, str]]:
    """(key, paper's, default) of each row of the table of what ``method = "paper"`` switches."""
    table = MAP[MAP.index("## What `method") :]
    rows = re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| `([^`]+)` \| `([^`]+)` \|$", table, re.MULTILINE)
    return [(key, paper, default) for key, paper, default in rows]


def value(job: Job, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(job, section), name)


def test_the_map_is_read() -> None:
    assert len(places()) > 100
    assert ("src/fleetfit/method/size.py", "zeta") in places()
    assert ("tests/method/test_size.py", "test_zeta_by_hand") in places()
    assert len(keys()) > 20


@pytest.mark.parametrize(("file", "name"), places(), ids=lambda part: part.rpartition("/")[2])
def test_what_is_named_is_there(file: str, name: str) -> None:
    path = where(file)
    assert path is not None, f"there is no file {file}"
    assert not name or name in names_in(path), f"{file} has no {name}"


@pytest.mark.parametrize(("key", "paper", "default"), keys())
def test_switched_keys_have_the_values_that_are_stated(key: str, paper: str, default: str) -> None:
    for job, told in ((make_job({"method": "paper"}), paper), (Job(), default)):
        assert value(job, key) == tomllib.loads(f"told = {told}")["told"]


def test_every_switched_key_is_in_the_table() -> None:
    assert {key for key, _, _ in keys()} == {f"{section}.{key}" for section, of in PAPER.items() for key in of}


def test_every_key_that_is_named_exists() -> None:
    named = {code for code in CODE.findall(MAP) if re.fullmatch(rf"(?:{'|'.join(SECTIONS)})\.[a-z_]+", code)}
    assert len(named) > 20
    for key in named:
        section, name = key.split(".")
        assert name in type(getattr(Job(), section)).model_fields, f"{key} is no key of the job"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http|#)([^)#]+)", MAP))))
def test_every_linked_page_is_there(link: str) -> None:
    assert (ROOT / "docs" / link).resolve().is_file()
