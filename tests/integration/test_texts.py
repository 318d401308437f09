"""Texts through a whole job: from a table to models on devices, that read texts here, in ONNX and in Transformers."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import fleetfit
from fleetfit import cli
from fleetfit.config.job import make_job
from fleetfit.config.sections import DataConfig
from fleetfit.data.preprocessing import TextPreprocessing
from fleetfit.data.sources import load_samples
from fleetfit.runs.adapt import adapt_folder, undo
from fleetfit.runs.device_folder import read_card
from fleetfit.runs.export import Export, export_devices
from fleetfit.runs.predict import predict

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from make_data import INTENTS, text_csv, text_fields, text_rows

torch.set_num_threads(1)

TEXTS = ["what is my balance", "I lost my card today", "why did my top up fail", "please cancel the transfer, please"]


def fields(source: Path, cache: Path) -> dict[str, Any]:
    """A job of a few seconds: two clusters, two devices each."""
    job = text_fields(source, cache, split="iid")
    job["model"] |= {"epochs": 20, "learning_rate": 5e-3}
    return job | {
        "fleet": {
            "devices": [
                {"count": 2, "cluster": "small", "storage_limit": "60 KB"},
                {"count": 2, "cluster": "large", "storage_limit": "1 MB"},
            ]
        },
        "backbone": {"widths": [0.5, 1.0], "steps": 10, "specialise_steps": 2, "importance_samples": 32},
        "header": {"search": "cnn_add", "budget_steps": 20, "views": 2},
        "refine": {"rounds": 1, "epochs": 1},
    }


class Run:
    """A finished run, and one device's model in ONNX."""

    def __init__(self, folder: Path) -> None:
        self.fields = fields(text_csv(folder / "rows.csv", 288), folder / "cache")
        self.told: list[str] = []
        self.out = folder / "run"
        self.summary = fleetfit.run(self.fields, self.out, lambda *step: self.told.append(str(step[3:])))
        self.device = self.out / "devices" / "small-1"
        exports, problems = export_devices(self.out, ["small-1"])
        assert problems == []
        ((self.export, self.exported),) = exports.items()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("texts"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_device_has_a_model_and_the_reference_has_learnt(run: Run) -> None:
    assert len(run.summary["devices"]) == 4
    assert run.summary["reference"]["accuracy"] > 0.5, "of four classes"
    assert all(device["size_bytes"] <= device["limit_bytes"] for device in run.summary["devices"])
    assert any("288 rows in 1 file, all used" in note for note in run.told)


def test_the_tokenizer_lies_beside_the_model_and_not_in_its_card(run: Run) -> None:
    assert names(run.device) == ["model.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    form = json.loads((run.device / "model.json").read_text())["preprocessing"]
    assert form.keys() == {"num_tokens", "pad_id"}
    card = read_card(run.device)
    samples = load_samples(make_job(run.fields))
    assert card.preprocessing == samples.inputs.form
    assert card.labels == INTENTS


@torch.no_grad()
def test_texts_are_predicted_as_the_model_and_transformers_tokenizer_do(run: Run, tmp_path: Path) -> None:
    found = predict(run.device, TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(run.device)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    shares = fleetfit.load(run.device)(tokens).softmax(1)
    assert [p.label for p in found] == [INTENTS[i] for i in shares.argmax(1)]
    assert [p.probability for p in found] == pytest.approx(shares.max(1).values.tolist(), abs=1e-5)
    assert [(p.input, p.row) for p in found] == [(text, 0) for text in TEXTS]
    path = tmp_path / "some.txt"
    path.write_text("\n".join([TEXTS[0], "", "  ", *TEXTS[1:]]) + "\n")
    lines = predict(run.device, [path])
    assert [(p.input, p.row) for p in lines] == [(str(path), row) for row in (0, 3, 4, 5)]
    assert [p.label for p in lines] == [p.label for p in found]
    assert [p.probability for p in lines] == pytest.approx([p.probability for p in found], abs=1e-6)


def test_lines_are_the_files_lines_for_a_device_and_its_export(run: Run, tmp_path: Path) -> None:
    """A form feed or a line end of Unicode is within a line, and a byte order mark is no text."""
    path = tmp_path / "some.txt"
    lines = [TEXTS[0], TEXTS[1].replace(" ", "\u2028", 1), TEXTS[2] + "\x0c", TEXTS[3].replace(" ", "\u0085", 1)]
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    for folder in (run.device, run.export):
        found, alone = predict(folder, [path]), predict(folder, TEXTS)
        assert [p.row for p in found] == [0, 1, 2, 3]
        assert [p.label for p in found] == [p.label for p in alone]
        assert found[0].probability == pytest.approx(alone[0].probability, abs=1e-6)


def test_a_text_model_is_better_than_chance_on_its_own_texts(run: Run) -> None:
    rows = text_rows(96)
    found = predict(run.out / "devices" / "large-1", rows["text"])
    assert np.mean([p.label == name for p, name in zip(found, rows["intent"], strict=True)]) > 0.4


def test_onnx_takes_token_numbers_and_computes_the_same(run: Run) -> None:
    assert names(run.export) == ["README.md", "export.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert run.exported.max_difference <= 1e-4
    assert Export.model_validate_json((run.export / "export.json").read_text()).num_samples == 29
    session = onnxruntime.InferenceSession(run.export / "model.onnx")
    form = read_card(run.device).preprocessing
    assert isinstance(form, TextPreprocessing)
    (told,) = session.get_inputs()
    assert (told.type, told.shape) == ("tensor(int64)", ["batch", form.num_tokens])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["preprocessing"]) == {"num_tokens": form.num_tokens, "pad_id": form.pad_id}
    assert json.loads(metadata["labels"]) == list(INTENTS)
    here, there = predict(run.device, TEXTS), predict(run.export, TEXTS)
    assert [p.label for p in here] == [p.label for p in there]
    assert [p.probability for p in here] == pytest.approx([p.probability for p in there], abs=1e-4)


def test_the_readme_runs_where_there_is_no_torch(run: Run) -> None:
    code = re.search(r"```python\n(.*?)```", (run.export / "README.md").read_text(), re.DOTALL)
    assert code is not None
    given = '["a text", "and another"]'
    assert given in code[1]
    block = "import sys; sys.modules.update(torch=None, fleetfit=None, transformers=None)\n"
    program = block + code[1].replace(given, repr(TEXTS))
    done = subprocess.run([sys.executable, "-c", program], cwd=run.export, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([p.label for p in predict(run.device, TEXTS)])


def test_the_command(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("\n".join(TEXTS[:2]))
    result = CliRunner().invoke(cli.app, ["predict", str(run.device), TEXTS[3], str(path), "--json"])
    told = json.loads(result.stdout)
    assert [(p["input"], p["row"]) for p in told] == [(TEXTS[3], 0), (str(path), 0), (str(path), 1)]
    result = CliRunner().invoke(cli.app, ["predict", str(run.device), TEXTS[3], str(path)])
    shown = [line.split("  ")[0].strip() for line in result.stdout.splitlines()]
    assert shown == [TEXTS[3], f"{path}[0]", f"{path}[1]"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("  ", "a text must not be empty"),
        ("nowhere.txt", "nowhere.txt: No such file"),
        ("empty.txt", "has no line with"),
    ],
)
def test_what_is_no_text(given: str, says: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    result = CliRunner().invoke(cli.app, ["predict", str(run.device), given])
    assert (result.exit_code, result.stdout) == (1, "")
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    # A text may end like a file's name.
    assert predict(run.device, ["where is my balance.txt"])[0].row == 0


@pytest.mark.parametrize("kind", ["devices", "exports"])
def test_a_tokenizer_that_is_missing_or_damaged_is_named(kind: str, run: Run, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(run.device if kind == "devices" else run.export, tmp_path / "copy")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer must be the content of a tokenizer\.json"):
        predict(copy, TEXTS)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing; the model reads texts by it"):
        predict(copy, TEXTS)


def test_a_text_model_is_adapted_to_lines_and_tables_and_keeps_its_tokenizer(run: Run, tmp_path: Path) -> None:
    device = Path(shutil.copytree(run.device, tmp_path / "device"))
    card = json.loads((device / "model.json").read_text())
    (device / "model.json").write_text(json.dumps(card | {"shifts": [[10.0, 1.0]]}))  # whatever this tiny one may be
    lines = [" ".join(words) for words in itertools.permutations(["I", "lost", "my", "card", "today"])][:50]
    (tmp_path / "seen.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "seen.csv").write_text("text,note\n" + "".join(f"{line},new\n" for line in lines))
    of_lines = adapt_folder(device, [str(tmp_path / "seen.txt")])
    of_table = adapt_folder(device, [str(tmp_path / "seen.csv")], DataConfig(input_column="text"))
    assert of_lines.num_inputs == 50
    for one, two in zip(of_lines.classes, of_table.classes, strict=True):
        assert two.now == pytest.approx(one.now, abs=1e-6)
    assert of_lines.adapted is not None
    assert predict(device, TEXTS)[0].label in card["labels"]
    assert names(device) == names(run.device)
    undo(device)
    assert predict(device, TEXTS) == predict(run.device, TEXTS)
