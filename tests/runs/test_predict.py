"""Files in, labels out: images of every kind, arrays, and what is neither; on device folders and on ONNX exports."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import fleetfit
from fleetfit import cli
from fleetfit.config.job import Job
from fleetfit.core.randomness import seeded_init
from fleetfit.core.records import HeaderSpec
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.sample_files import read_samples, read_texts
from fleetfit.data.sources import load_samples
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone
from fleetfit.models.header import build_header
from fleetfit.runs.device_folder import ModelCard, load_model
from fleetfit.runs.export import export_devices
from fleetfit.runs.folder import RunFolder
from fleetfit.runs.predict import predict

torch.set_num_threads(1)

CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "initializer_range": 0.3,
}
LABELS = tuple(f"digit {i}" for i in range(10))
RAW = load_digits().images  # [sample row column], 0..16
SAMPLES = load_samples(Job())
FORM = Preprocessing(size=(8, 8), channels=1, maximum=16, mean=(0.5,), std=(0.5,))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one device, exported as ONNX too."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    with seeded_init(0, "predict"):
        backbone = Backbone("vit", CONFIG)
        header = build_header(HeaderSpec(), backbone.feature_shape, 10)
        header.last_linear.weight.data.normal_(std=0.5)
    card = ModelCard(
        device_id="phones-1",
        cluster="phones",
        family="vit",
        config=backbone.config,
        header=HeaderSpec(),
        labels=LABELS,
        width=1.0,
        depth=1,
        inputs="pixels",
        preprocessing=FORM,
        size_bytes=1,
        limit_bytes=10**6,
        accuracy=None,
    )
    with RunFolder(folder, Job()) as files:
        files.write_device(Classifier(backbone, header), card)
    assert export_devices(folder, ["phones-1"])[1] == []
    return folder


@pytest.fixture(params=["devices", "exports"])
def folder(run: Path, request: pytest.FixtureRequest) -> Path:
    return run / str(request.param) / "phones-1"


@torch.no_grad()
def expected(run: Path, rows: slice) -> tuple[list[str], list[float]]:
    shares = load_model(run / "devices" / "phones-1")(SAMPLES.inputs[rows]).softmax(1)
    best = shares.max(1)
    assert len(best.values) < 20 or len(set(best.indices.tolist())) > 1, "a model of one answer tests nothing"
    return [LABELS[i] for i in best.indices.tolist()], best.values.tolist()


def as_image(row: int, scale: int = 4) -> Image.Image:
    """A digit as a picture, each pixel a square; 16 becomes 255, within half a grey level."""
    return Image.fromarray(np.kron(np.rint(RAW[row] * 255 / 16), np.ones((scale, scale))).astype(np.uint8))


# -- right answers ----------------------------------------------------------------------------------------------------


def test_images(run: Path, folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for row, path in enumerate(paths):
        as_image(row).save(path)
    found = predict(folder, paths)
    labels, shares = expected(run, slice(20))
    assert [p.label for p in found] == labels
    assert [p.probability for p in found] == pytest.approx(shares, abs=0.02)
    assert [(p.input, p.row) for p in found] == [(str(path), 0) for path in paths]


def test_arrays(run: Path, folder: Path, tmp_path: Path) -> None:
    labels, shares = expected(run, slice(300))
    for values in (RAW[:300], RAW[:300, None], RAW[:300].astype(np.uint8)):
        np.save(tmp_path / "many.npy", values)
        found = predict(folder, [tmp_path / "many.npy"])
        assert [p.label for p in found] == labels
        assert [p.probability for p in found] == pytest.approx(shares, abs=1e-5)
        assert [p.row for p in found] == list(range(300))
    for values in (RAW[0], RAW[:1]):
        np.save(tmp_path / "one.npy", values)
        assert [p.label for p in predict(folder, [tmp_path / "one.npy"])] == labels[:1]


@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "P", "1", "I;16", "LA", "CMYK", "YCbCr"])
def test_every_kind_of_image_is_the_same_picture(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(np.kron((RAW[0] > 8) * 255, np.ones((3, 5))).astype(np.uint8))
    if kind == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    elif kind in ("RGBA", "LA"):  # white strokes on nothing: they are seen on black
        whole = Image.new("L", image.size, 255)
        image = Image.merge(kind, (*[whole] * (len(kind) - 1), image))
    else:
        image = image.convert(kind)
    path = tmp_path / f"x.{'png' if kind not in ('CMYK', 'YCbCr') else 'tiff'}"
    image.save(path)
    values, note = read_samples(path, FORM)
    assert values.shape == (1, 1, 8, 8)
    assert np.abs(values[0, 0] - (RAW[0] > 8) * 16).max() <= 0.3
    assert note == ("parts of it are transparent and laid on black" if kind in ("RGBA", "LA") else "")


def test_a_camera_that_was_turned_and_colours(tmp_path: Path) -> None:
    upright = Image.fromarray(np.stack([np.full((4, 6), v, np.uint8) for v in (255, 128, 0)], 2))
    upright.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=exif)
    form = Preprocessing(size=(4, 6), channels=3, maximum=255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    values, _ = read_samples(tmp_path / "x.png", form)
    assert values.shape == (1, 3, 4, 6)
    assert values[0, :, 0, 0].tolist() == [0, 0, 255]
    assert values[0, :, 3, 5].tolist() == [255, 128, 0]
    inputs = form.apply(values)
    assert inputs[0, :, 3, 5] == pytest.approx([0.5 / 0.2, (128 / 255 - 0.4) / 0.3, -0.3 / 0.4], rel=1e-5)
    assert inputs.dtype == np.float32
    pixels = values.astype(np.float32)
    assert eval(form.numpy_code("pixels"), {"numpy": np, "pixels": pixels}) == pytest.approx(inputs, abs=1e-6)
    assert form.words == ("pixel values / 255, minus 0.5, 0.4, 0.3, divided by 0.2, 0.3, 0.4; [sample, 3, 4, 6]")


def test_preprocessing_is_validated() -> None:
    fields = FORM.model_dump()
    for changed in ({"mean": (0.5, 0.5)}, {"std": (0.0,)}, {"channels": 2}, {"size": (0, 8)}, {"maximum": 0}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            Preprocessing.model_validate({**fields, **changed})


@pytest.mark.parametrize("white", [16, 255])
def test_arrays_of_a_known_range(tmp_path: Path, white: int) -> None:
    """Truth values and, where raw values go to 255, numbers of 16 bits are scaled; the rest is as it is."""
    form = FORM.model_copy(update={"maximum": white})
    right = np.rint(RAW[:4] * white / 16)
    given = [right, right[0], right.astype(np.uint8), right.astype(np.int64), right.astype(np.float16)]
    for values in given:
        np.save(tmp_path / "x.npy", values)
        assert np.array_equal(
            read_samples(tmp_path / "x.npy", form)[0], right[: len(values) if values.ndim == 3 else 1, None]
        )
    np.save(tmp_path / "x.npy", RAW[:4] > 8)
    assert np.array_equal(read_samples(tmp_path / "x.npy", form)[0][:, 0], (RAW[:4] > 8) * white)
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8)))
    assert not read_samples(tmp_path / "x.npy", form)[0].any()
    np.save(tmp_path / "x.npy", np.rint(RAW[:4] * 65535 / 16).astype(np.uint16))
    if white == 255:
        assert np.abs(read_samples(tmp_path / "x.npy", form)[0][:, 0] - RAW[:4] * 255 / 16).max() < 0.01
        np.save(tmp_path / "x.npy", np.full((8, 8), 9, np.uint8))  # bytes say that it is dark
        assert read_samples(tmp_path / "x.npy", form)[0].max() == 9
    else:
        with pytest.raises(ValueError, match="from 0 to 16, got 0 to 65535"):
            read_samples(tmp_path / "x.npy", form)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (RAW[:4] / 16, "from 0 to 255, got 0 to 1: is 1 white, or nearly black"),
        ((RAW[:4] > 8).astype(np.uint8), "from 0 to 255, got 0 to 1: is 1 white"),
        ((RAW[:4] > 8).astype(int), "from 0 to 255, got 0 to 1: is 1 white"),
        (RAW[:4] * 0.9, r"no raw value is over 14\.4, and white is 255: are they of another range"),
        (RAW[:4].astype(int) - 1, "from 0 to 255, got -1 to 15"),
        ((RAW[:4] * 255).astype(np.uint16), "have 16 bits and none is over 4080"),
        ((RAW[:4] * 4095).astype(int), "from 0 to 255, got 0 to 65520"),
        (np.where(RAW[:4] > 8, np.inf, 99), "from 0 to 255, got 99 to inf"),
    ],
)
def test_arrays_of_a_range_that_cannot_be_known(tmp_path: Path, values: np.ndarray, says: str) -> None:
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(ValueError, match=rf"x\.npy: .*{says}"):
        read_samples(tmp_path / "x.npy", FORM.model_copy(update={"maximum": 255}))


def test_what_had_to_be_done_is_told(run: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    as_image(0).save(path, save_all=True, append_images=[as_image(1)])
    np.save(tmp_path / "x.npy", RAW[0])
    note = "it has several frames; the first is taken"
    found = predict(folder, [path, tmp_path / "x.npy"])
    assert [p.note for p in found] == [note, ""]
    assert found[0].label == found[1].label
    result = CliRunner().invoke(cli.app, ["predict", str(folder), str(path)])
    assert result.stderr == f"note: {path}: {note}\n"
    assert len(result.stdout.splitlines()) == 1


def test_an_image_that_is_nearly_black_is_told(tmp_path: Path) -> None:
    """Classes of pixels, 0 and 1, saved as an image of 8 bits: nothing says that 1 is white."""
    Image.fromarray((RAW[0] > 8).astype(np.uint8)).save(tmp_path / "x.png")
    assert (
        read_samples(tmp_path / "x.png", FORM)[1]
        == "it is (nearly) of one colour: its pixels go from 0 to 1 of 0 to 255"
    )


def test_16_bits_and_a_drawing_on_nothing(tmp_path: Path) -> None:
    values = np.rint(RAW[0] * 65535 / 16).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.abs(read_samples(tmp_path / "x.png", FORM)[0][0, 0] - RAW[0]).max() <= 16 / 255
    ink = Image.fromarray(np.dstack([np.zeros((8, 8, 3)), RAW[0] * 255 / 16]).astype(np.uint8))
    ink.save(tmp_path / "x.png")
    samples, note = read_samples(tmp_path / "x.png", FORM)
    assert np.abs(16 - samples[0, 0] - RAW[0]).max() <= 16 / 200
    assert note == "parts of it are transparent and laid on white"
    Image.fromarray(np.rint(RAW[0] * 100).astype(np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(
        ValueError, match=r"x\.png cannot be read: its values have 16 bits and none is over 1500: of fewer"
    ):
        read_samples(tmp_path / "x.png", FORM)


# -- lines of text ----------------------------------------------------------------------------------------------------

LINES = ["good\u2028thing", "", "bad\x0cthing", "a\u0085b\x0bc\u2029d\x1ce", " ", "caf\u00e9 \u65e5\u672c", "mid\rdle"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_lines_are_those_that_other_tools_count(tmp_path: Path, end: str, last: bool, encoding: str) -> None:
    path = tmp_path / "x.txt"
    mark = "\ufeff" if encoding.endswith("e") else ""
    path.write_bytes((mark + end.join(LINES) + (end if last else "")).encode(encoding))
    assert read_texts(str(path)) == {n: line for n, line in enumerate(LINES) if n not in (1, 4)}
    with path.open(encoding=encoding, newline="\n") as file:
        assert len(file.readlines()) == len(LINES)


def test_marks_within_a_file_and_on_lines_alone_are_no_text(tmp_path: Path) -> None:
    """Files that were put one after the other."""
    path = tmp_path / "x.TXT"
    path.write_bytes("\ufeffa\n\ufeffb\n\ufeff\n\ufeff \nc\ufeffd\r\n".encode())
    assert read_texts(str(path)) == {0: "a", 1: "b", 4: "c\ufeffd"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"one\rtwo\rthree\r", "its lines end in CR alone"),
        ("one\ntwo\n".encode("utf-16-le"), "has characters of number 0: is it in UTF-16 without a mark"),
        ("caf\u00e9\n".encode("cp1252"), "is not a text in UTF-8: .*; save it as UTF-8"),
        (b"\xff\xfea", "is not a text in UTF-16"),
        (b"\xef\xbb\xbf", "has no line with a text"),
        (b" \r\n\x0c\n", "has no line with a text"),
        (b"", "has no line with a text"),
    ],
)
def test_text_files_that_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.txt: ?{says}|x\.txt {says}"):
        read_texts(str(path))


def test_one_line_may_end_in_anything_or_nothing(tmp_path: Path) -> None:
    for content in (b"one", b"one\r", b"one\r\n", b"one\n"):
        (tmp_path / "x.txt").write_bytes(content)
        assert read_texts(str(tmp_path / "x.txt")) == {0: "one"}


def test_a_file_that_is_no_txt_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.csv").write_text("text\none\n")
    with pytest.raises(ValueError, match=r"^lines\.csv is a file, but no \.txt file"):
        read_texts("lines.csv")
    for text in ("other.csv", "look at lines.csv", "see notes.txt", "long " * 9999, "\x00"):
        assert read_texts(text) == {0: text}
    (tmp_path / "my notes.txt").write_text("a\nb")
    assert read_texts("my notes.txt") == {0: "a", 1: "b"}


# -- what is no sample ------------------------------------------------------------------------------------------------


def npy(values: Any, pickled: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=pickled)
    return file.getvalue()


def png(row: int = 0) -> bytes:
    file = io.BytesIO()
    as_image(row, 20).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.png", b"", "cannot be read: it is no image of a known kind: the file is empty"),
        ("x.txt", b"some text", "cannot be read: it is no image of a known kind: it holds text"),
        ("x.png", png()[:-60], "cannot be read: "),
        (
            "x.png",
            png().replace(b"IDAT", b"IDAX"),
            "cannot be read: it is no image of a known kind: it begins like a PNG",
        ),
        ("x.npy", b"", "is not a .npy array that can be read: "),
        ("x.npy", npy(RAW[0])[:-1], "is not a .npy array that can be read: "),
        ("x.npy", npy(np.array([{}]), pickled=True), "is not a .npy array that can be read: Object arrays"),
        ("x.npy", npy(np.array(["a"])), "must hold an array of numbers"),
        (
            "x.npy",
            npy(RAW[0].ravel()),
            "must have shape [1, 8, 8] or [sample, 1, 8, 8], or these without the 1, got [64]",
        ),
        ("x.npy", npy(RAW[:0]), "got [0, 8, 8]"),
        ("x.npy", npy(RAW[0] * 2), "raw values must be from 0 to 16, got 0 to 30"),
        ("x.npy", npy(SAMPLES.inputs[0].numpy()), "raw values must be from 0 to 16, got -1 to "),
        ("x.npy", npy(RAW[0] * np.nan), "raw values must be from 0 to 16, got nan"),
    ],
)
def test_a_bad_file_is_named(folder: Path, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    good, bad = tmp_path / "good.png", tmp_path / name
    good.write_bytes(png())
    bad.write_bytes(content)
    result = CliRunner().invoke(cli.app, ["predict", str(folder), str(good), str(bad)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {bad}")
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_no_file(folder: Path, tmp_path: Path) -> None:
    for path, says in ((tmp_path, "Is a directory"), (tmp_path / "x.npy", "No such file"), (tmp_path / "x.png", "No")):
        result = CliRunner().invoke(cli.app, ["predict", str(folder), str(path)])
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: {path}: {says}")


# -- what is no model -------------------------------------------------------------------------------------------------


def test_what_is_no_model(run: Path, tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    image.write_bytes(png())
    with pytest.raises(ValueError, match=r"is no device folder: .*model\.json is missing"):
        predict(tmp_path, [image])
    copy = shutil.copytree(run / "exports" / "phones-1", tmp_path / "copy")
    whole = (copy / "model.onnx").read_bytes()
    for content in (b"", b"\xff" * 99, whole[: len(whole) // 2]):
        (copy / "model.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.onnx is (corrupt|no model that fleetfit exported)"):
            predict(copy, [image])
    foreign = onnx.load_from_string(whole)
    del foreign.metadata_props[:]
    onnx.save(foreign, copy / "model.onnx")
    with pytest.raises(ValueError, match=r"model\.onnx is no model that fleetfit exported"):
        predict(copy, [image])
    with pytest.raises(ValueError, match=r"model\.onnx is an exported model: run it with onnxruntime"):
        load_model(copy)


def test_an_onnx_export_loads_as_a_torch_module(run: Path, tmp_path: Path) -> None:
    """The same logits as the device's own folder gives; a damaged file is named."""
    inputs = SAMPLES.inputs[:5]
    loaded = fleetfit.load(run / "exports" / "phones-1")
    assert isinstance(loaded, torch.nn.Module)
    assert not loaded.training
    assert torch.allclose(loaded(inputs), fleetfit.load(run / "devices" / "phones-1")(inputs), atol=1e-4)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.onnx is corrupt"):
        fleetfit.load(tmp_path)


def test_a_card_without_preprocessing_loads_but_does_not_predict(run: Path, tmp_path: Path) -> None:
    """The cards of runs that were made before there was any."""
    image = tmp_path / "x.png"
    image.write_bytes(png())
    copy = shutil.copytree(run / "devices" / "phones-1", tmp_path / "copy")
    card = json.loads((copy / "model.json").read_text())
    del card["preprocessing"]
    (copy / "model.json").write_text(json.dumps(card))
    assert load_model(copy)(SAMPLES.inputs[:2]).shape == (2, 10)
    with pytest.raises(ValueError, match="does not say how images become its inputs"):
        predict(copy, [image])


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(run: Path, folder: Path, tmp_path: Path) -> None:
    image, array = tmp_path / "x.png", tmp_path / "some.npy"
    as_image(0).save(image)
    np.save(array, RAW[:2])
    labels, shares = expected(run, slice(2))
    result = CliRunner().invoke(cli.app, ["predict", str(folder), str(image), str(array)])
    lines = [line.split("  ") for line in result.stdout.splitlines()]
    assert [line[0].strip() for line in lines] == [str(image), f"{array}[0]", f"{array}[1]"]
    assert [line[-2:] for line in lines[1:]] == [[n, f"{s:.1%}"] for n, s in zip(labels, shares, strict=True)]
    told = json.loads(CliRunner().invoke(cli.app, ["predict", str(folder), str(array), "--json"]).stdout)
    assert [(p["input"], p["row"], p["label"]) for p in told] == [(str(array), i, labels[i]) for i in range(2)]
    assert [p["probability"] for p in told] == pytest.approx(shares, abs=1e-5)
    assert CliRunner().invoke(cli.app, ["predict", str(folder)]).exit_code == 2


def test_labels_of_a_foreign_model_reach_the_terminal_harmless(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from fleetfit.cli import app
    from fleetfit.runs import predict as module

    evil = "seven\x1b]0;owned\x07\x1b[2J"
    found = module.Prediction(input="a\x1b[1m.png", row=0, label=evil, probability=0.5, note="\x1b[31m")
    monkeypatch.setattr(module, "predict", lambda folder, inputs: [found])
    monkeypatch.setattr(module, "unseen_classes", lambda folder: (evil,))
    (tmp_path / "model.json").touch()
    shown = CliRunner().invoke(app, ["predict", str(tmp_path), "a.png"])
    assert shown.exit_code == 0
    assert "\x1b" not in shown.output
    assert "seven" in shown.output
    exact = CliRunner().invoke(app, ["predict", str(tmp_path), "a.png", "--json"])
    assert json.loads(exact.output)[0]["label"] == evil


def test_it_is_said_which_classes_a_device_has_not_trained_on(tmp_path: Path) -> None:
    from tiny_job import tiny_fields
    from typer.testing import CliRunner

    import fleetfit
    from fleetfit.cli import app

    fields = tiny_fields(tmp_path / "cache", data={"split": "classes", "classes_per_device": 4})
    fleetfit.run(fields, tmp_path / "run")
    folder = tmp_path / "run" / "devices" / "small-1"
    card = json.loads((folder / "model.json").read_text())
    assert len(card["trained_on"]) == 4
    np.save(tmp_path / "x.npy", np.zeros((8, 8), np.uint8))
    shown = CliRunner().invoke(app, ["predict", str(folder), str(tmp_path / "x.npy")])
    missing = ", ".join(label for label in card["labels"] if label not in card["trained_on"])
    assert f"note: this device has not trained on: {missing}" in shown.stderr
    del card["trained_on"]  # as earlier versions wrote it
    (folder / "model.json").write_text(json.dumps(card))
    assert "not trained on" not in CliRunner().invoke(app, ["predict", str(folder), str(tmp_path / "x.npy")]).stderr
