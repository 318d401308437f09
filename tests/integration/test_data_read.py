"""Data as people have it, through whole runs: read right or refused, told before training, and kept with the run."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from tiny_job import tiny_fields
from typer.testing import CliRunner

from fleetfit.cli import app
from fleetfit.config.job import make_job
from fleetfit.data.participant import load_owned
from fleetfit.data.sources import load_samples
from fleetfit.data.tables import open_table
from fleetfit.runs.export import check_data

torch.set_num_threads(1)

TINY_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 200,
}
CODES = ("01", "1", "NA", "<b>é</b>")


def rows(codes: tuple[str, ...] = CODES, each: int = 40) -> list[tuple[str, str]]:
    return [(f"thing {i}, of kind {n}", code) for i in range(each) for n, code in enumerate(codes)]


def table(path: Path, codes: tuple[str, ...] = CODES, more: str = "") -> Path:
    """With semicolons, as cp1252, and blank rows between: what a spreadsheet saves."""
    lines = ["text;label", *(f"{text};{code}" for text, code in rows(codes)), ";", ""]
    path.write_bytes(("\r\n".join(lines) + more).encode("cp1252"))
    os.utime(path, (10**9, 10**9))
    return path


def fields(source: Path, cache: Path, **data: Any) -> dict[str, Any]:
    made = tiny_fields(cache, {"small": 2}, data={"source": str(source), "split": "iid", **data})
    return made | {"model": {"family": "bert", "epochs": 1, "config": TINY_BERT}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and its job."""
    folder = tmp_path_factory.mktemp("read")
    table(folder / "rows.csv")
    (folder / "job.toml").write_text(tomli_w.dumps(fields(folder / "rows.csv", folder / "cache")))
    result = run(folder)
    assert result.exit_code == 0, result.output
    (folder / "told.txt").write_text(result.stderr)
    return folder


def run(folder: Path, *more: str) -> Any:
    command = ["run", str(folder / "job.toml"), "-o", str(folder / "run"), *more]
    return CliRunner().invoke(app, command, env={"NO_COLOR": "1", "COLUMNS": "200"})


def test_what_was_read_is_told_before_anything_is_trained(folder: Path) -> None:
    told = (folder / "told.txt").read_text().splitlines()
    data = [line.removeprefix("· ") for line in told[: next(i for i, t in enumerate(told) if "reference" in t)]]
    assert f"161 rows in 1 file, 160 used ({folder / 'rows.csv'})" in data
    assert "left out 1 blank row" in data
    assert "inputs from column 'text' (its name)" in data
    assert "labels from column 'label' (its name)" in data
    assert "4 classes (01 40, 1 40, <b>é</b> 40, NA 40)" in data
    assert "fields of rows.csv are divided by semicolons" in data
    assert any(line.startswith("rows.csv was read as cp1252, since it is no UTF-8") for line in data)


def test_what_was_read_is_kept_and_on_the_page(folder: Path) -> None:
    kept = json.loads((folder / "run" / "summary.json").read_text())["data"]
    assert kept == json.loads((folder / "run" / "data.json").read_text())
    assert kept["classes"] == {"01": 40, "1": 40, "<b>é</b>": 40, "NA": 40}
    assert kept["left_out"] == {"blank rows": 1}
    page = (folder / "run" / "report.html").read_text()
    assert "What was read" in page
    assert "160 samples of 161 rows" in page
    assert "Left out: 1 blank row." in page
    assert "<td>column text (its name)</td>" in page
    assert re.search(
        r"What was noted</h3><ul [^>]*><li>[^<]*semicolons|What was noted</h3><ul [^>]*><li>rows.csv", page
    )
    assert "&lt;b&gt;é&lt;/b&gt;" in page
    assert "<b>é</b>" not in page
    assert json.loads((folder / "run/devices/small-1/model.json").read_text())["labels"] == sorted(CODES)


def test_a_run_whose_data_changed_is_not_answered_from_old_steps(folder: Path) -> None:
    """Same name, size and time; of a run that was finished, and of one that was stopped half way."""
    path = folder / "rows.csv"
    before = path.read_bytes()
    try:
        table(path, ("02", "2", "MA", "<b>è</b>"))
        assert (path.stat().st_size, path.stat().st_mtime) == (len(before), 10**9)
        for _ in range(2):
            result = run(folder, "-q")
            assert result.exit_code == 1
            assert (
                "changed since it began: no longer the classes '01', '1', '<b>é</b>', 'NA', new class" in result.stderr
            )
            assert "put it back, or choose another --out, or begin anew here with --again" in result.stderr
            (folder / "run" / "summary.json").unlink(missing_ok=True)
            (folder / "run" / "steps" / "finish" / "small.safetensors").unlink(missing_ok=True)
        export = CliRunner().invoke(app, ["export", str(folder / "run"), "--all"])
        assert export.exit_code == 1
        assert "changed since it began" in export.stderr
    finally:
        path.write_bytes(before)
    assert run(folder, "-q").exit_code == 0


def test_an_export_of_a_deployments_run_does_not_ask_for_its_kits_data(folder: Path, tmp_path: Path) -> None:
    samples = load_samples(make_job(fields(folder / "rows.csv", folder / "cache")))
    noted = json.loads((folder / "run" / "data.json").read_text())
    for source, refused in ((noted["source"], True), ("data", False)):
        (tmp_path / "data.json").write_text(json.dumps(noted | {"fingerprint": "another", "source": source}))
        with pytest.raises(ValueError, match="changed since it began") if refused else contextlib.nullcontext():
            check_data(tmp_path, samples)


def test_one_reader_serves_all_owners(folder: Path, tmp_path: Path) -> None:
    """An edge's and a device's own file are read as the cloud's is, and refused where that would be."""
    job = make_job(fields(folder / "rows.csv", folder / "cache"))
    samples = load_samples(job)
    form = samples.inputs.form
    assert form is not None

    def own(source: Path, names: tuple[str, ...] = samples.label_names) -> Any:
        return load_owned(job, str(source), "own", names, form, 0.25, ("device", "a"))  # type: ignore[arg-type]

    split = own(table(tmp_path / "own.csv", ("NA", "1")))
    assert split.summary is not None
    assert split.summary.classes == {"01": 0, "1": 40, "<b>é</b>": 0, "NA": 40}
    assert split.summary.left_out == {"blank rows": 1}
    assert {samples.label_names[i] for i in split.train.labels.tolist()} == {"NA", "1"}
    with pytest.raises(ValueError, match=r"own\.csv, line 83: the row has 3 fields, and the header 2"):
        own(table(tmp_path / "own.csv", ("NA", "1"), more="a;1;x\r\n"))
    with pytest.raises(ValueError, match="have '2', which the job does not know"):
        own(table(tmp_path / "own.csv", ("NA", "2")))
    (tmp_path / "own.csv").write_text("text,label\n" + "a thing,0\nanother,1\n" * 9)
    with pytest.raises(ValueError, match="numbers may be in another order"):
        own(tmp_path / "own.csv", ("ash", "oak"))
    (tmp_path / "own.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="has no rows"):
        own(tmp_path / "own.csv")


def test_a_described_copy_of_tables_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: rows.csv\n---\n")
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{t.replace(',', '')},{c}\n" for t, c in rows()))
    found = open_table(make_job(fields(tmp_path, tmp_path)).data, tmp_path / "cache", lambda _: None)
    assert set(found.column("label")) == set(CODES)
    assert found.as_text


def test_all_missing_keys_are_told_in_one_go(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("title,body,team,desk\n" + "a,b,c,d\ne,f,g,h\n" * 9)
    (tmp_path / "job.toml").write_text(tomli_w.dumps(fields(tmp_path / "rows.csv", tmp_path / "cache")))
    result = run(tmp_path, "-q")
    assert result.exit_code == 1
    assert re.search(r"data\.label_column must be given.*; data\.input_column must be given", result.stderr)
    assert not list((tmp_path / "run").rglob("*.safetensors"))
