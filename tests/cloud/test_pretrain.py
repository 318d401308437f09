"""A checkpoint folder: what a run would train, written so that jobs and Transformers read it, and gone on with."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel
from typer.testing import CliRunner

from fleetfit import cli
from fleetfit.cloud import reference as reference_room
from fleetfit.cloud import run
from fleetfit.cloud.clusters import fleet_of
from fleetfit.cloud.pretrain import CheckpointCard, pretrain
from fleetfit.cloud.reference import Reference, classifier_of, scores_of, train_reference
from fleetfit.cloud.run import cached_reference
from fleetfit.config.job import Job, make_job
from fleetfit.core import checkpoints
from fleetfit.core.checkpoints import Ledger, StepFolder, TrainingState
from fleetfit.core.encoding import take
from fleetfit.data.partition import Split
from fleetfit.data.sources import load_samples
from fleetfit.engines import whole_fleet
from fleetfit.models.elastic import Backbone
from fleetfit.models.pretrained import other_split
from fleetfit.models.training import ParameterAverage

torch.set_num_threads(1)

MODEL = {
    "epochs": 2,
    "config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "patch_size": 4,
    },
}


def make(folder: Path, **model: object) -> Job:
    fields = {**MODEL, **model}
    if "pretrained" in fields:
        del fields["config"]
    return make_job({"model": fields, "run": {"cache": str(folder / "cache"), "torch_device": "cpu"}})


def public_of(job: Job) -> Split:
    devices = {c: [a.device_id for a in members] for c, members in fleet_of(job).items()}
    return whole_fleet.share_out(load_samples(job), job.data, devices, job.seed).public


def quiet(done: int, total: int, note: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job, CheckpointCard]:
    folder = tmp_path_factory.mktemp("made")
    job = make(folder, ema=0.9, flip=True, cutout_pixels=2, mixup=0.2, cutmix=1.0)
    return folder / "checkpoint", job, pretrain(job, folder / "checkpoint", command="fleetfit pretrain x.toml")


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_run_of_the_same_job_finds_the_reference_in_the_cache(
    made: tuple[Path, Job, CheckpointCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: object) -> Reference:
        raise AssertionError("it is trained already")

    _, job, card = made
    monkeypatch.setattr(run, "train_reference", again)
    cache = StepFolder(Path(job.run.cache), Ledger())
    reference = cached_reference(job, public_of(job), cache, quiet)
    assert card.parameters == reference.parameters
    assert card.hardware == reference.hardware
    assert card.seconds == round(cache.ledger.seconds["reference"], 1)


def test_the_folder_is_the_reference_in_16_bits(made: tuple[Path, Job, CheckpointCard]) -> None:
    folder, job, card = made
    public = public_of(job)
    reference = cached_reference(job, public, StepFolder(Path(job.run.cache), Ledger()), quiet)
    model = classifier_of(job, reference, 10).eval()
    inputs = public.test.inputs[:]
    hub_model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    with torch.no_grad():
        tokens = hub_model(inputs).last_hidden_state
        assert torch.allclose(tokens, model.backbone(inputs).output, atol=0.02)
    assert (folder / "model.safetensors").stat().st_size < 2.2 * card.parameters + 4000
    assert card.size_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o644}


def test_the_folders_accuracies_are_those_of_its_files(made: tuple[Path, Job, CheckpointCard]) -> None:
    folder, job, card = made
    as_it_is = train_reference(make(folder, pretrained=str(folder), epochs=0), public_of(job), quiet)
    assert as_it_is.accuracy == card.test_accuracy
    assert as_it_is.validation_accuracy == card.validation_accuracy
    assert as_it_is.curve == ()


def test_another_part_of_the_same_data_is_told(made: tuple[Path, Job, CheckpointCard], tmp_path: Path) -> None:
    folder, job, _ = made
    data = job.data.model_dump(mode="json")
    assert other_split(str(folder), data, 0) == ""
    assert other_split(str(folder), data | {"split": "iid"}, 0) == ""  # how the private samples are dealt out
    assert other_split(str(folder), data | {"source": "other.csv", "limit": 9}, 7) == ""
    assert other_split(str(tmp_path), data, 7) == other_split("some/model-of-the-hub", data, 7) == ""
    assert "(limit, seed differ): some of its" in other_split(str(folder), data | {"limit": 900}, 7)


def test_the_image_processor_of_transformers_makes_the_same_inputs(made: tuple[Path, Job, CheckpointCard]) -> None:
    folder, job, _ = made
    samples = load_samples(job)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = samples.inputs.store[:5].numpy()
    images = [p.transpose(1, 2, 0) for p in pixels]
    found = processor(images, input_data_format="channels_last", return_tensors="pt")
    assert torch.allclose(found["pixel_values"].reshape(5, 1, 8, 8), samples.inputs[:5], atol=1e-6)


def test_the_card_says_how_it_was_made(made: tuple[Path, Job, CheckpointCard]) -> None:
    folder, job, card = made
    assert CheckpointCard.model_validate_json((folder / "card.json").read_text()) == card
    assert card.labels == tuple("0123456789")
    assert (card.seed, card.data["source"], card.model["mixup"]) == (0, "digits", 0.2)
    assert set(card.versions) == {"fleetfit", "python", "torch", "transformers"}
    assert make_job(tomllib.loads((folder / "job.toml").read_text())) == job
    page = (folder / "README.md").read_text()
    for words in (card.command, card.hardware, f"{card.test_accuracy:.2%}", f"{card.parameters:,}", "seed 0"):
        assert words in page
    use = tomllib.loads(page.partition("```toml\n")[2].partition("```")[0])
    assert make_job(use).model.pretrained == str(folder)


def test_a_folder_of_something_else_is_told_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"mine is there already and was not made by this command; choose another"):
        pretrain(make(tmp_path), tmp_path / "mine")
    assert not (tmp_path / "cache").exists()


def test_a_folder_made_here_is_replaced(tmp_path: Path) -> None:
    pretrain(make(tmp_path, epochs=1), tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    card = pretrain(make(tmp_path, epochs=1, flip=True), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "card.json").read_text())["model"]["flip"] is True
    assert card.model["flip"] is True
    assert not (tmp_path / "out" / "old").exists()


# -- starting from it -------------------------------------------------------------------------------------------------


def rewrite_labels(folder: Path, labels: list[str]) -> None:
    path = folder / "header.safetensors"
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(tensors, path, metadata={**metadata, "labels": json.dumps(labels)})


def test_the_header_comes_along_where_classes_agree(made: tuple[Path, Job, CheckpointCard], tmp_path: Path) -> None:
    folder, job, card = made
    public = public_of(job)
    started = train_reference(make(folder, pretrained=str(folder), epochs=1, learning_rate=1e-9), public, quiet)
    assert started.validation_accuracy == pytest.approx(card.validation_accuracy, abs=0.01)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    rewrite_labels(other, list("9876543210"))
    fresh = train_reference(make(folder, pretrained=str(other), epochs=1, learning_rate=1e-9), public, quiet)
    assert fresh.tensors["header.classifier.last.weight"].abs().max() < 1
    assert not torch.allclose(
        fresh.tensors["header.classifier.last.weight"], started.tensors["header.classifier.last.weight"], atol=1e-3
    )


def test_a_fresh_header_is_trained_before_the_backbone(made: tuple[Path, Job, CheckpointCard], tmp_path: Path) -> None:
    folder, job, _ = made
    public, other = public_of(job), tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "header.safetensors").unlink()
    before = safetensors.torch.load_file(other / "model.safetensors")

    def moved(**model: object) -> tuple[float, Reference]:
        result = train_reference(make(folder, pretrained=str(other), epochs=1, **model), public, quiet)
        backbone = Backbone("vit", result.config)
        backbone.model.load_state_dict(take(result.tensors, "backbone"))
        backbone.model.save_pretrained(tmp_path / "after")
        after = safetensors.torch.load_file(tmp_path / "after" / "model.safetensors")
        return max(float((after[name] - t).abs().max()) for name, t in before.items() if name in after), result

    # With a rate of next to nothing the backbone stays, and the header has learned to read it all the same.
    distance, result = moved(learning_rate=1e-9)
    assert distance < 1e-6
    assert result.validation_accuracy > 0.5
    distance, _ = moved(learning_rate=1e-3)
    assert distance > 1e-3


def test_no_epochs_need_a_header(made: tuple[Path, Job, CheckpointCard], tmp_path: Path) -> None:
    folder, job, _ = made
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "header.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"has no header of this kind .* for the data's 10 classes; set model\.epochs >= 1"
    ):
        train_reference(make(folder, pretrained=str(other), epochs=0), public_of(job), quiet)
    with pytest.raises(ValueError, match="has no header of this kind"):
        train_reference(make(folder, pretrained=str(folder), epochs=0, header="linear"), public_of(job), quiet)
    with pytest.raises(ValueError, match=r"^model: epochs must be >= 1 without pretrained, got 0$"):
        make(tmp_path, epochs=0)


def test_a_header_that_is_damaged_is_an_error(made: tuple[Path, Job, CheckpointCard], tmp_path: Path) -> None:
    folder, job, _ = made
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for content in (b"", b"x" * 100, (folder / "header.safetensors").read_bytes()[:-8]):
        (other / "header.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"header\.safetensors is no header for it"):
            train_reference(make(folder, pretrained=str(other)), public_of(job), quiet)


# -- going on ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the program may catch this."""


def bits(reference: Reference) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in reference.tensors.items()}


@pytest.mark.parametrize("command", ["pretrain", "run"])
def test_killed_after_an_epoch_and_gone_on_with_is_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    job = make(tmp_path, epochs=4, ema=0.95, mixup=0.3, cutmix=0.5, flip=True, batch_size=100)
    public = public_of(job)
    whole = train_reference(job, public, quiet)
    monkeypatch.setattr(checkpoints, "KEEP_TRAINING_SECONDS", 0.0)
    real = checkpoints.TrainingFile.save
    saved: list[int] = []

    def dies(self: checkpoints.TrainingFile, state: TrainingState) -> None:
        real(self, state)
        saved.append(state.step)
        if len(saved) == 2:
            raise Killed

    def go(name: str) -> None:
        if command == "pretrain":
            pretrain(job, tmp_path / "out")
        else:
            cached_reference(job, public, StepFolder(tmp_path / "cache", Ledger()), quiet)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.TrainingFile, "save", dies)
        with pytest.raises(Killed):
            go("first")
    (kept,) = (tmp_path / "cache" / "reference").iterdir()
    assert kept.name.endswith(".training.safetensors")
    steps: list[int] = []
    monkeypatch.setattr(checkpoints, "KEEP_TRAINING_SECONDS", 1e9)
    cache = StepFolder(tmp_path / "cache", Ledger())
    reference = cached_reference(job, public, cache, lambda done, total, note: steps.append(done))
    per_epoch = 6  # 575 samples in batches of 100
    assert saved == [per_epoch, 2 * per_epoch]
    assert steps == list(range(2 * per_epoch + 1, 4 * per_epoch + 1))
    assert bits(reference) == bits(whole)
    assert reference == whole.model_copy(update={"tensors": reference.tensors})
    assert [p.name.endswith(".training.safetensors") for p in (tmp_path / "cache" / "reference").iterdir()] == [False]


def test_seconds_of_a_stopped_training_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = StepFolder(tmp_path, Ledger())
    steps.bookmark("reference/x").save(TrainingState(step=1, tensors={"losses": torch.zeros(1)}))
    clock = iter([0.0, 100.0, 100.0, 103.0])
    again = StepFolder(tmp_path, Ledger())
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: next(clock))
    bookmark = again.bookmark("reference/x")
    bookmark.save(TrainingState(step=2))  # after 100 seconds
    monkeypatch.undo()

    def compute() -> TrainingState:
        state = last.bookmark("reference/x").load()
        assert state is not None
        assert state.step == 2
        return state

    last = StepFolder(tmp_path, Ledger())
    last.step("reference/x", TrainingState, compute)
    assert 100 <= last.ledger.seconds["reference"] < 101
    assert last.bookmark("reference/x").load() is None


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    steps = StepFolder(tmp_path, Ledger())
    steps.bookmark("a/b").save(TrainingState(step=1))
    path = tmp_path / "a" / "b.training.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"b\.training\.safetensors \(delete it to train afresh\) is truncated"):
        steps.bookmark("a/b").load()


# -- recipes' means ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"flip": True},
        {"cutout_pixels": 2},
        {"mixup": 0.2},
        {"cutmix": 1.0},
        {"ema": 0.9},
        {"warmup_share": 0.5},
    ],
)
def test_every_key_changes_the_training_and_repeats(tmp_path: Path, more: dict[str, Any]) -> None:
    plain, job = make(tmp_path, epochs=1), make(tmp_path, epochs=1, **more)
    public = public_of(plain)
    one, again, other = (bits(train_reference(j, public, quiet)) for j in (job, job, plain))
    assert one == again
    assert one != other


def test_the_average_is_what_is_scored_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    real = ParameterAverage.keep

    def keep(self: ParameterAverage) -> None:
        seen.append([v.clone() for v in self.values])
        real(self)

    monkeypatch.setattr(ParameterAverage, "keep", keep)
    job = make(tmp_path, ema=0.9)
    reference = train_reference(job, public_of(job), quiet)
    model = classifier_of(job, reference, 10)
    assert all(torch.equal(a, p.detach()) for a, p in zip(seen[-1], model.parameters(), strict=True))
    public = public_of(job)
    assert reference.accuracy == scores_of(model.eval(), public.test).accuracy


def test_validation_is_told_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_room, "VALIDATE_EVERY_SECONDS", 0.0)
    notes: list[str] = []
    job = make(tmp_path, epochs=2, ema=0.9)
    public = public_of(job)
    watched = train_reference(job, public, lambda done, total, note: notes.append(note))
    assert notes[0].startswith("epoch 1 of 2, loss ")
    assert "validation" not in notes[0]
    assert ", rate 1" in notes[-2] or ", rate " in notes[-2]
    assert "%" in notes[-1].partition(", validation ")[2]
    monkeypatch.undo()
    assert bits(watched) == bits(train_reference(job, public, quiet))


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my job.toml").write_text(make(tmp_path, epochs=1).to_toml())
    result = CliRunner().invoke(cli.app, ["pretrain", "my job.toml", "-s", "model.flip=true"])
    assert result.exit_code == 0, result.output
    assert re.search(r"^\d+\.\d% on 10 classes of the public test, [\d,]+ parameters", result.stdout, re.MULTILINE)
    assert 'use:     model.pretrained = "models/my job" in a job' in result.stdout
    card = json.loads(Path("models/my job/card.json").read_text())
    assert card["command"] == "fleetfit pretrain 'my job.toml' --out 'models/my job' --set model.flip=true"
    assert "reference: done in" in result.stderr
    again = CliRunner().invoke(cli.app, ["pretrain", "my job.toml", "--json", "-o", "here"])
    assert json.loads(again.stdout)["model"]["flip"] is False
    silent = CliRunner().invoke(cli.app, ["pretrain", "my job.toml", "-q", "-o", "here"])
    assert (silent.exit_code, silent.output) == (0, "")
