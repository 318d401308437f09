"""Models that are adapted where they are used: class shares from inputs alone, undone exactly, refused with reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny_job import tiny_fields
from typer.testing import CliRunner

import fleetfit
from fleetfit.cli import app
from fleetfit.config.job import make_job
from fleetfit.method.class_prior import SHIFT_PRIORS, ShiftPrior
from fleetfit.runs import adapt as module
from fleetfit.runs.adapt import adapt_folder, estimate, undo
from fleetfit.runs.device_folder import read_card, write_model
from fleetfit.runs.predict import predict

DIGITS = load_digits()


def fields(cache: Path, **data: Any) -> dict[str, Any]:
    """A job whose models are good enough to say what comes how often."""
    enough = {"model": {"epochs": 12}, "backbone": {"steps": 60, "specialise_steps": 60}, "refine": {"guard": True}}
    return tiny_fields(cache, data={"split": "iid", **data}, **enough)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Devices that have met all classes alike."""
    folder = tmp_path_factory.mktemp("adapted")
    fleetfit.run(fields(folder / "cache"), folder / "run")
    return folder / "run"


@pytest.fixture
def device(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "devices" / "large-1", tmp_path / "device"))


def mostly(label: int, number: int = 120) -> np.ndarray:
    """Digits of which nine in ten are of one class."""
    rng = np.random.default_rng(1)
    one, others = (np.flatnonzero(DIGITS.target == label), np.flatnonzero(DIGITS.target != label))
    rows = np.concatenate([rng.choice(one, 9 * number // 10), rng.choice(others, number // 10)])
    return DIGITS.images[rng.permutation(rows)].astype(np.uint8)


def array(tmp_path: Path, values: np.ndarray, name: str = "seen.npy") -> Path:
    np.save(tmp_path / name, values)
    return tmp_path / name


def test_shares_that_inputs_speak_for_are_expected_from_then_on(device: Path, tmp_path: Path) -> None:
    seen = array(tmp_path, mostly(3))
    before, model = predict(device, [seen]), fleetfit.load(device)
    weights = (device / "model.safetensors").read_bytes()
    found = adapt_folder(device, [str(seen)])
    assert found.adapted is not None
    assert found.num_inputs == 120
    by_label = {c.label: c for c in found.classes}
    assert by_label["3"].now > 2 * by_label["3"].shipped
    assert sum(c.now for c in found.classes) == pytest.approx(1)
    after = predict(device, [seen])
    assert sum(p.label == "3" for p in after) >= sum(p.label == "3" for p in before)
    adapted = fleetfit.load(device)
    x = torch.randn(5, 1, 8, 8)
    moved_by = (adapted(x) - model(x)).detach().numpy()
    expected = np.log([c.now / c.shipped for c in found.classes])
    np.testing.assert_allclose(moved_by, np.tile(expected, (5, 1)), atol=1e-5)
    assert (device / "model.safetensors").read_bytes() == weights
    assert undo(device)
    assert predict(device, [seen]) == before
    assert undo(device) == ()


def test_the_same_inputs_twice_give_the_same(device: Path, tmp_path: Path) -> None:
    seen = str(array(tmp_path, mostly(3)))
    first = adapt_folder(device, [seen])
    again = adapt_folder(device, [seen, seen])
    assert again.adapted == first.adapted
    assert [c.before for c in again.classes] == [c.now for c in first.classes]


def test_inputs_that_come_as_expected_change_nothing_and_end_what_was_before(device: Path, tmp_path: Path) -> None:
    card = (device / "model.json").read_bytes()
    rng = np.random.default_rng(0)
    usual = array(tmp_path, DIGITS.images[rng.permutation(len(DIGITS.images))[:150]].astype(np.uint8), "usual.npy")
    assert adapt_folder(device, [str(usual)]).adapted is None
    assert (device / "model.json").read_bytes() == card
    adapt_folder(device, [str(array(tmp_path, mostly(3)))])
    assert adapt_folder(device, [str(usual)]).adapted is None
    assert (device / "model.json").read_bytes() == card


def test_pictures_tables_and_arrays_of_the_same_inputs_say_the_same(device: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    values = mostly(5, 60)
    rows = Dataset.from_dict({"image": [v.tolist() for v in values], "kind": ["unknown"] * len(values)})
    rows.to_parquet(str(tmp_path / "seen.parquet"))
    (tmp_path / "pictures" / "in" / "folders").mkdir(parents=True)
    for i, v in enumerate(values):
        Image.fromarray((v / 16 * 255).round().astype(np.uint8)).save(tmp_path / f"pictures/in/folders/{i:03}.png")
    (tmp_path / "pictures" / "notes.md").write_text("no picture")
    of_array = adapt_folder(device, [str(array(tmp_path, values))])
    of_table = adapt_folder(device, [str(tmp_path / "seen.parquet")])
    of_pictures = adapt_folder(device, [str(tmp_path / "pictures")])
    for other in (of_table, of_pictures):
        assert other.num_inputs == 60
        for one, two in zip(of_array.classes, other.classes, strict=True):
            assert two.now == pytest.approx(one.now, abs=0.02)


def test_a_picture_that_cannot_be_read_is_told(device: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, v in enumerate(mostly(5, 120)):
        Image.fromarray((v / 16 * 255).round().astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture at all")
    found = adapt_folder(device, [str(folder)])
    assert found.num_inputs == 120
    assert "left out 1 file that cannot be read" in found.notes[0]
    (folder / "other.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 files of 122 cannot be read"):
        adapt_folder(device, [str(folder)])


def test_what_cannot_be_adapted_is_refused_and_nothing_is_written(device: Path, tmp_path: Path) -> None:
    card = (device / "model.json").read_bytes()
    few = array(tmp_path, mostly(3)[:19], "few.npy")
    with pytest.raises(ValueError, match="at least 20 inputs are needed to estimate class shares, got 19"):
        adapt_folder(device, [str(few)])
    for key, told in (("expected_shares", "does not say which class shares"), ("shifts", "its own mistakes")):
        (device / "model.json").write_text(json.dumps(json.loads(card) | {key: []}))
        with pytest.raises(ValueError, match=told):
            adapt_folder(device, [str(array(tmp_path, mostly(3)))])
    (device / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="is an export, and stays as it is"):
        adapt_folder(device, [str(few)])


@pytest.mark.parametrize(
    "change",
    [
        {"expected_shares": [0.5, 0.5]},
        {"expected_shares": [0.0] + [0.1] * 9},
        {"expected_shares": [float("nan")] * 10},
        {
            "adapted": {
                "class_shares": [0.1] * 9,
                "num_inputs": 50,
                "strength": 10,
                "concentration": 1,
                "gain": 1,
                "gain_error": 0.1,
            }
        },
        {
            "adapted": {
                "class_shares": [-0.1] * 10,
                "num_inputs": 50,
                "strength": 10,
                "concentration": 1,
                "gain": 1,
                "gain_error": 0.1,
            }
        },
    ],
)
def test_cards_with_shares_that_are_none_are_refused(device: Path, change: dict[str, Any]) -> None:
    fields = json.loads((device / "model.json").read_text()) | change
    (device / "model.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="class shares must be 10 numbers"):
        fleetfit.load(device)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"expected_shares": [0.2] * 10}, "class shares must add up to 1, got 2"),
        ({"expected_shares": [0.05] * 10}, "class shares must add up to 1, got 0.5"),
        ({"shifts": [[10, 0]]}, "shifts must be pairs of numbers that are finite and > 0"),
        ({"shifts": [[10, 1]] * 2000}, "at most 1000 items"),
    ],
)
def test_a_card_that_asks_for_nonsense_is_refused(device: Path, change: dict[str, Any], says: str) -> None:
    fields = json.loads((device / "model.json").read_text()) | change
    (device / "model.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=says) as error:
        fleetfit.load(device)
    assert ": :" not in str(error.value)


def test_what_is_wrong_is_told_by_the_option_that_said_it(device: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(device), "--data", "/no/such/place"])
    assert result.exit_code == 1
    assert "--data = '/no/such/place' is no file or folder here" in result.stderr


def test_a_run_that_is_gone_on_with_keeps_what_its_devices_were_adapted_to(tmp_path: Path) -> None:
    job = fields(tmp_path / "cache")
    fleetfit.run(job, tmp_path / "run")
    device = tmp_path / "run" / "devices" / "large-1"
    adapt_folder(device, [str(array(tmp_path, mostly(3)))])
    adapted = read_card(device).adapted
    (tmp_path / "run" / "summary.json").unlink()
    fleetfit.run(job, tmp_path / "run")
    assert adapted is not None
    assert read_card(device).adapted == adapted
    other = fleetfit.load(device).train(False)
    with torch.no_grad():
        other.header.last_linear.bias += 1  # another model in its place has not met those inputs
    write_model(device, other, read_card(device).model_copy(update={"adapted": None}))
    assert read_card(device).adapted is None


def test_exports_are_of_the_adapted_model(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    seen = array(tmp_path, mostly(3))
    device = copy / "devices" / "large-1"
    adapt_folder(device, [str(seen)])
    for kind in ("onnx", "safetensors"):
        done = CliRunner().invoke(
            app, ["export", str(copy), "--device", "large-1", "--format", kind, "--out", str(tmp_path / kind)]
        )
        assert done.exit_code == 0, done.output
        exported = predict(next((tmp_path / kind).rglob("model.*")).parent, [seen])
        for one, two in zip(exported, predict(device, [seen]), strict=True):
            assert one.label == two.label
            assert one.probability == pytest.approx(two.probability, abs=1e-4)


def test_the_command_says_before_and_after_and_takes_it_back(device: Path, tmp_path: Path) -> None:
    seen = str(array(tmp_path, mostly(3)))
    said = CliRunner().invoke(app, ["adapt", str(device), "--data", seen])
    assert said.exit_code == 0, said.output
    assert "as shipped" in said.stdout
    assert "120 inputs" in said.stdout
    as_json = CliRunner().invoke(app, ["adapt", str(device), "--data", seen, "--json"])
    assert json.loads(as_json.stdout)["adapted"]["num_inputs"] == 120
    assert CliRunner().invoke(app, ["adapt", str(device), "--undo"]).stdout.rstrip().endswith("as it was shipped")
    assert read_card(device).adapted is None
    for options in ([], ["--data", seen, "--undo"]):
        wrong = CliRunner().invoke(app, ["adapt", str(device), *options])
        assert wrong.exit_code == 2
        assert "either --data INPUTS or --undo" in wrong.output


def test_shares_are_estimated_by_what_makes_held_out_inputs_likeliest() -> None:
    rng = np.random.default_rng(2)
    classes = rng.choice(3, 400, p=[0.8, 0.15, 0.05])
    logits = torch.from_numpy(4 * (np.eye(3)[classes] + rng.normal(size=(400, 3)) / 2))
    found, gain, error = estimate(logits, torch.full((3,), 1 / 3, dtype=torch.float64), SHIFT_PRIORS)
    assert found is not None
    assert gain > 2 * error
    assert found.class_shares == pytest.approx((0.8, 0.15, 0.05), abs=0.05)


def test_copies_that_notebooks_and_systems_hide_are_no_inputs(device: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for place in (folder, folder / ".ipynb_checkpoints", folder / "__MACOSX"):
        place.mkdir(parents=True)
        for i, v in enumerate(mostly(5, 40)):
            Image.fromarray((v / 16 * 255).round().astype(np.uint8)).save(place / f"{i}.png")
    assert adapt_folder(device, [str(folder)]).num_inputs == 40


def test_a_class_that_was_all_but_ruled_out_comes_back_where_the_model_still_knows_it() -> None:
    shares = torch.tensor([0.499, 0.499, 0.002], dtype=torch.float64)
    rng = np.random.default_rng(4)
    classes = rng.choice(3, 200, p=[0.2, 0.2, 0.6])
    logits = torch.from_numpy(9 * (np.eye(3)[classes] + rng.normal(size=(200, 3)) / 3)) + shares.log()
    found, _, _ = estimate(logits, shares, (ShiftPrior(10.0),))
    assert found is not None
    assert found.class_shares[2] == pytest.approx(0.6, abs=0.05)


# -- found by an attack -----------------------------------------------------------------------------------------------


def pictures(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def adapted_by(device: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["adapt", str(device), *options])


@pytest.mark.parametrize("name", ["pictures", "array"])
def test_inputs_that_are_all_alike_say_nothing(device: Path, tmp_path: Path, name: str) -> None:
    before = (device / "model.json").read_bytes()
    if name == "pictures":
        source = pictures(tmp_path / "dark", np.zeros((30, 8, 8)))
    else:
        source = tmp_path / "dark.npy"
        np.save(source, np.zeros((30, 8, 8), dtype=np.float32))
    result = adapted_by(device, "--data", str(source))
    assert result.exit_code == 1
    assert "at least 20 inputs are needed to estimate class shares, got 30, of which 1 are different" in result.stderr
    assert (device / "model.json").read_bytes() == before


def test_a_place_that_is_not_there_is_asked_for_nowhere_else(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evilmod.py").write_text("open('ran', 'w')\ndef f(): return []\n")
    for source in ("today.npy", "seen/today", "evilmod:f"):
        result = adapted_by(device, "--data", source)
        assert result.exit_code == 1
        assert f"--data: {source}: no such file or folder" in result.stderr
    assert not (tmp_path / "ran").exists()
    assert "--data must name a file or a folder, got an empty name" in adapted_by(device, "--data", "").stderr


def test_what_is_given_twice_counts_once_and_what_is_left_out_is_told(device: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8))
    folder = pictures(tmp_path / "seen", images)
    (folder / "more.csv").write_text("a\n1\n")
    once = adapt_folder(device, [str(folder)])
    assert any("1 file beside these" in note or "1 files beside these" in note for note in once.notes)
    twice = adapt_folder(device, [str(folder), str(folder / ".." / "seen" / "3.png")])
    assert twice.num_inputs == once.num_inputs == 30
    assert any("count once" in note for note in twice.notes)


def test_a_model_that_was_replaced_in_the_meantime_is_not_written_over(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pictures(tmp_path / "seen", np.random.default_rng(0).integers(0, 255, (30, 8, 8)))
    real = module.estimate

    def while_it_works(*arguments: Any) -> Any:
        weights = device / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(content)
        return real(*arguments)

    monkeypatch.setattr(module, "estimate", while_it_works)
    before = (device / "model.json").read_bytes()
    with pytest.raises(ValueError, match="was replaced in the meantime; nothing was changed"):
        adapt_folder(device, [str(source)])
    assert (device / "model.json").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"expected_shares": [1e-50, *[1 / 9] * 9]},
        {"labels": ["a"] * 10},
        {"adapted": {"class_shares": [0.1] * 10, "num_inputs": -5, "strength": 1, "concentration": 1, "gain": 1}},
        {"adapted": {"class_shares": [0.1] * 10, "num_inputs": 5, "strength": -1, "concentration": 1, "gain": 1}},
    ],
)
def test_a_card_that_cannot_work_is_refused_as_what_it_is(device: Path, change: dict[str, Any]) -> None:
    fields = json.loads((device / "model.json").read_text()) | change
    (device / "model.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"model\.json is not a model card"):
        fleetfit.load(device)


def test_labels_are_not_thrown_away_for_what_nothing_looks_at() -> None:
    for fields, rule in (
        ({"refine": {"unlabelled": True, "class_prior": False}}, "refine.class_prior = true"),
        ({"refine": {"unlabelled": True}, "privacy": {"noise_multiplier": 1.0}}, "privacy.noise_multiplier = 0"),
    ):
        with pytest.raises(ValueError, match=f"refine.unlabelled needs {rule}"):
            make_job(fields)
    with pytest.raises(ValueError, match=r"data\.unlabelled_share must be < 1"):
        make_job({"data": {"unlabelled_share": 1.0}})
