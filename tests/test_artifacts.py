"""The run folder: whole files or none, steps read back with their cost, one owner at a time, models that load."""

import csv
import errno
import json
import os
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fleetfit import artifacts
from fleetfit.artifacts import (
    Ledger,
    MemoryFolder,
    ModelCard,
    RunFolder,
    StepFolder,
    content_hash,
    load_model,
    read_card,
    read_json,
    write_atomically,
)
from fleetfit.config import Job, make_job
from fleetfit.edge import EdgeState
from fleetfit.messages import ClusterReport, StatsRequest, encode
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.header import build_header
from fleetfit.models.pruning import extract, prunable_layers
from fleetfit.randomness import named_generator, seeded_init
from fleetfit.records import BackboneShape, Block, HeaderSpec, ValidationScores

torch.set_num_threads(1)


def reply(value: float = 1.0) -> EdgeState:
    scores = ValidationScores(num_samples=1, loss_sum=value, num_correct=1)
    return EdgeState(scores=scores, tensors={"t": torch.full((3,), value)})


# -- whole files or none ----------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.txt"
    write_atomically(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_atomically(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod", "fdopen"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full", "interrupted"]
)
@pytest.mark.parametrize("before", [b"old", None])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException, before: bytes | None
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(artifacts.os, failing, fail)
        with pytest.raises(type(error)):
            write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file"]), "a temporary file was left"
    assert before is None or path.read_bytes() == before
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_the_new_content_is_flushed_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "file", []
    path.write_bytes(b"old")
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append(("fsync", os.fstat(handle).st_size, path.read_bytes()))
        real_sync(handle)

    def replace(source: str, target: Path) -> None:
        events.append(("replace", Path(source).stat().st_size, path.read_bytes()))
        assert Path(source).parent == path.parent, "a rename is atomic within one file system only"
        real_replace(source, target)

    monkeypatch.setattr(artifacts.os, "fsync", fsync)
    monkeypatch.setattr(artifacts.os, "replace", replace)
    write_atomically(path, b"newer")
    assert events == [("fsync", 5, b"old"), ("replace", 5, b"old")]


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    """Killed for good just before the rename: no handler runs."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import os, sys, pathlib\nfrom fleetfit import artifacts\n"
        "artifacts.os.replace = lambda *_: os._exit(9)\n"
        "artifacts.write_atomically(pathlib.Path(sys.argv[1]), b'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_is_computed_once_and_its_cost_counted_once_in_each_run(tmp_path: Path) -> None:
    calls: list[int] = []

    def run() -> tuple[Ledger, EdgeState, list[tuple[str, dict[str, int]]]]:
        ledger, told = Ledger(), []
        steps = StepFolder(tmp_path, ledger, lambda name, s, bytes_by_link, value: told.append((name, bytes_by_link)))
        ledger.traffic["up"] += 1000  # of something else, before

        def compute() -> EdgeState:
            calls.append(1)
            ledger.traffic["up"] += 5
            ledger.traffic["down"] += 7
            return reply(0.25)

        value = steps.step("refine/phones/1", EdgeState, compute)
        return ledger, value, told

    first, value, told = run()
    second, again, told_again = run()
    assert calls == [1]
    assert again.scores == value.scores == reply(0.25).scores
    assert torch.equal(again.tensors["t"], torch.full((3,), 0.25))
    assert first.traffic == second.traffic == Counter(up=1005, down=7)
    assert told == told_again == [("refine/phones/1", {"up": 5, "down": 7})]
    assert first.seconds["refine"] > 0
    assert second.seconds == first.seconds, "the seconds that it took, not those of reading it"
    assert (tmp_path / "refine" / "phones" / "1.safetensors").exists()


def test_phases_add_up(tmp_path: Path) -> None:
    ledger = Ledger()
    steps = StepFolder(tmp_path, ledger)
    for name in ("a/x", "a/y", "b/x"):
        steps.step(name, EdgeState, reply)
    assert set(ledger.seconds) == {"a", "b"}
    one = Ledger()
    StepFolder(tmp_path, one).step("a/x", EdgeState, reply)
    assert 0 < one.seconds["a"] < ledger.seconds["a"]


def test_a_step_that_fails_leaves_nothing_and_runs_again(tmp_path: Path) -> None:
    steps = StepFolder(tmp_path, Ledger())

    def fail() -> EdgeState:
        raise RuntimeError("flux")

    with pytest.raises(RuntimeError, match="flux"):
        steps.step("a", EdgeState, fail)
    assert not list(tmp_path.rglob("*"))
    assert steps.step("a", EdgeState, reply).scores == reply().scores


def never() -> Any:
    raise AssertionError("the step is there: it must not be computed")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda blob: b"", "truncated"),
        (lambda blob: blob[:-1], "corrupt"),
        (lambda blob: blob[: len(blob) // 2], "truncated"),
        (lambda blob: b"\xff" * 300, "truncated or foreign"),
        (lambda blob: encode(StatsRequest(), cost="{}"), "is a 'stats_request', expected a 'edge_state'"),
        (lambda blob: encode(reply()), "does not say what it cost"),
        (lambda blob: encode(reply(), cost="no json"), "does not say what it cost"),
        (lambda blob: encode(reply(), cost="[1]"), "does not say what it cost"),
        (lambda blob: encode(reply(), cost='{"seconds": "long", "traffic": {}}'), "does not say what it cost"),
        (lambda blob: encode(reply(), cost='{"seconds": 1, "traffic": {"up": "much"}}'), "does not say what it cost"),
        (lambda blob: encode(reply(), cost='{"seconds": 1, "traffic": 3}'), "does not say what it cost"),
    ],
)
def test_a_corrupt_step_names_its_file_and_counts_nothing(tmp_path: Path, damage: Any, says: str) -> None:
    StepFolder(tmp_path, Ledger()).step("a/b", EdgeState, reply)
    path = tmp_path / "a" / "b.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    ledger = Ledger()
    with pytest.raises(ValueError, match=says) as error:
        StepFolder(tmp_path, ledger).step("a/b", EdgeState, never)
    assert str(error.value).startswith(f"{path} (delete it to compute this step again) ")
    assert not ledger.traffic
    assert not ledger.seconds
    path.unlink()
    assert StepFolder(tmp_path, ledger).step("a/b", EdgeState, reply).scores == reply().scores


def test_a_ledger_tells_what_was_added_since() -> None:
    ledger = Ledger(Counter(up=3, down=1))
    before = ledger.traffic.copy()
    assert ledger.since(before) == {}
    ledger.traffic["up"] += 4
    ledger.traffic["sideways"] += 2
    assert ledger.since(before) == {"up": 4, "sideways": 2}


# -- memory of devices ------------------------------------------------------------------------------------------------


def test_the_last_two_memories_of_a_device_are_kept(tmp_path: Path) -> None:
    folder = MemoryFolder(tmp_path / "memory" / "phones-1")
    for step in range(5):
        folder.save(step, reply(float(step)))
    assert sorted(p.name for p in folder.folder.iterdir()) == ["3.safetensors", "4.safetensors"]
    for step in (3, 4):
        assert torch.equal(folder.load(step, EdgeState).tensors["t"], torch.full((3,), float(step)))
    # The message before the last is repeated after a kill: what it meets is still there afterwards.
    folder.save(4, reply(4.5))
    assert float(folder.load(4, EdgeState).scores.loss_sum) == 4.5
    assert folder.load(3, EdgeState).scores.loss_sum == 3.0


def test_the_memory_that_a_message_meets(tmp_path: Path) -> None:
    """Also when steps were missed, and when the message is repeated; a step that is over meets none."""
    folder = MemoryFolder(tmp_path)
    assert folder.before(1, EdgeState) is None
    for step in (1, 2, 5):
        folder.save(step, reply(float(step)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2.safetensors", "5.safetensors"]
    for step, met in ((5, 2), (6, 5), (9, 5)):
        memory = folder.before(step, EdgeState)
        assert memory is not None
        assert float(memory.tensors["t"][0]) == met
    for step in (1, 2, 4):
        with pytest.raises(ValueError, match=f"^step {step} is over: the device has come to 5$"):
            folder.before(step, EdgeState)
    folder.save(1, reply())  # another run begins
    assert [p.name for p in tmp_path.iterdir()] == ["1.safetensors"]


def test_a_memory_that_is_missing_or_corrupt_is_named(tmp_path: Path) -> None:
    folder = MemoryFolder(tmp_path)
    path = tmp_path / "7.safetensors"
    with pytest.raises(ValueError, match=r"7\.safetensors is missing: the run folder is damaged") as error:
        folder.load(7, EdgeState)
    assert str(path) in str(error.value)
    folder.save(7, StatsRequest())
    with pytest.raises(ValueError, match="is a 'stats_request'") as error:
        folder.load(7, EdgeState)
    assert str(path) in str(error.value)


# -- one owner --------------------------------------------------------------------------------------------------------


def test_a_run_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    job = Job()
    with RunFolder(tmp_path / "run", job):
        for other in (job, make_job({"seed": 1})):
            with pytest.raises(ValueError, match=r"run is in use by another fleetfit process$") as error:
                RunFolder(tmp_path / "run", other)
            assert str(tmp_path / "run") in str(error.value)
        RunFolder(tmp_path / "elsewhere", job).close()
    RunFolder(tmp_path / "run", job).close()


def test_another_process_is_kept_out_and_its_lock_dies_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, os, pathlib\nfrom fleetfit.artifacts import RunFolder\nfrom fleetfit.config import Job\n"
        "folder = RunFolder(pathlib.Path(sys.argv[1]), Job())\nprint('mine', flush=True)\n"
        "sys.stdin.read()\nos._exit(9)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match="in use by another"):
            RunFolder(tmp_path, Job())
    finally:
        process.stdin.close()
        assert process.wait() == 9
        process.stdout.close()
    RunFolder(tmp_path, Job()).close()


def test_another_jobs_folder_names_the_keys_and_frees_the_lock(tmp_path: Path) -> None:
    RunFolder(tmp_path, Job()).close()
    saved = (tmp_path / "job.toml").read_bytes()
    other = make_job({"seed": 3, "refine": {"rounds": 5}, "model": {"config": {"hidden_size": 32}}})
    with pytest.raises(ValueError, match="holds the run of another job") as error:
        RunFolder(tmp_path, other)
    assert "(differs in model.config.hidden_size, refine.rounds, seed); choose another --out" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert (tmp_path / "job.toml").read_bytes() == saved
    how = {"run": {"threads": 2, "cache": "elsewhere"}, "links": {"quorum": 0.25}}
    with RunFolder(tmp_path, make_job(how)) as folder:
        assert folder.job.run.threads == 2  # how to run is no part of what is run
        assert folder.job.links.quorum == 0.25


def test_a_key_that_only_one_job_has_is_a_difference(tmp_path: Path) -> None:
    more = make_job({"model": {"config": {"qkv_bias": False}}})
    for name, first, second in (("a", more, Job()), ("b", Job(), more)):
        RunFolder(tmp_path / name, first).close()
        with pytest.raises(ValueError, match=r"differs in model\.config\.qkv_bias\)"):
            RunFolder(tmp_path / name, second)


def test_a_damaged_job_frees_the_lock(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("= =")
    with pytest.raises(ValueError, match=r"job\.toml is not TOML"):
        RunFolder(tmp_path, Job())
    (tmp_path / "job.toml").unlink()
    RunFolder(tmp_path, Job()).close()


def test_the_saved_job_is_the_job(tmp_path: Path) -> None:
    job = make_job({"seed": 5, "backbone": {"widths": [0.5]}, "fleet": {"devices": [{"storage_limit": "3 KB"}]}})
    RunFolder(tmp_path, job).close()
    assert artifacts.load_job(tmp_path / "job.toml") == job


def test_metrics_have_one_line_a_step_also_when_it_is_read_back(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder(tmp_path, Job()) as folder:
            for name in ("a/x", "b/x"):
                folder.steps.step(name, EdgeState, reply)
            lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == ["a/x", "b/x"]
        assert lines[0]["scores"] == {"num_samples": 1, "loss_sum": 1.0, "num_correct": 1}
        assert lines[0]["bytes"] == {}


def test_what_a_step_took_is_in_its_line_also_of_an_edge_that_reports_seconds_of_its_own(tmp_path: Path) -> None:
    report = ClusterReport(
        cluster="x",
        header=HeaderSpec(),
        trials=(),
        similarity=(),
        distance=(),
        rounds=(),
        decision={},
        devices=(),
        traffic={"edge_to_device": 9},
        phase_seconds={"refine": 9.0},
    )
    with RunFolder(tmp_path, Job()) as folder:
        folder.steps.step("finish/x", ClusterReport, lambda: report)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert isinstance(line["seconds"], float)
    assert (line["traffic"], line["phase_seconds"]) == ({"edge_to_device": 9}, {"refine": 9.0})


def test_tables_and_json(tmp_path: Path) -> None:
    with RunFolder(tmp_path, Job()) as folder:
        folder.write_table("cloud/t.csv", [{"a": 1, "b": 'x,"y"\n'}, {"a": 0.1, "b": ""}])
        with (tmp_path / "cloud" / "t.csv").open(newline="") as file:
            assert list(csv.DictReader(file)) == [{"a": "1", "b": 'x,"y"\n'}, {"a": "0.1", "b": ""}]
        folder.write_json("j.json", {"a": [1, None], "ü": 0.1})
        assert read_json(tmp_path / "j.json") == {"a": [1, None], "ü": 0.1}
        with pytest.raises(ValueError, match="not JSON compliant"):
            folder.write_json("j.json", {"a": float("nan")})
        assert read_json(tmp_path / "j.json") == {"a": [1, None], "ü": 0.1}


@pytest.mark.parametrize(
    ("content", "says"), [(None, "is missing"), (b"{", "corrupt"), (b"[1]", "JSON object"), (b"\xff\xfe", "corrupt")]
)
def test_a_json_file_that_is_none_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_hashes_change_with_any_part_and_not_with_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": [2]}, 3) == content_hash({"b": [2], "a": 1}, 3)
    hashes = [content_hash(*p) for p in [({"a": 1},), ({"a": 2},), ({"b": 1},), ({"a": 1}, 0), ({"a": 1}, 1), ()]]
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 16 for h in hashes)
    assert content_hash("x") == content_hash("x") == "cd65ea2c2ad99e94"


# -- models -----------------------------------------------------------------------------------------------------------

CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
}
BLOCKS = (
    Block(input_1=0, input_2=1, operation_1="conv3", operation_2="conv1"),
    Block(input_1=2, input_2=0, operation_1="downsample", operation_2="conv5"),
)
SPECS = {
    "linear": HeaderSpec(),
    "mlp": HeaderSpec(kind="mlp", hidden=10),
    "cnn": HeaderSpec(kind="cnn_project", channels=6, pooling=2),
    "blocks": HeaderSpec(kind="blocks", blocks=BLOCKS, repeats=2, channels=6, pooling=2, hidden=8),
}


def make_model(spec: HeaderSpec, pruned: bool, cut: bool) -> Classifier:
    with seeded_init(0, "model", spec.kind):
        backbone = Backbone("vit", CONFIG)
        if cut:
            backbone = ElasticBackbone(backbone, "spread").extract(BackboneShape(width=0.5, depth=2))
        header = build_header(spec, backbone.feature_shape, 3)
        for parameter in [*backbone.parameters(), *header.parameters()]:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    if pruned:
        generator = named_generator(0, "kept")
        layers = prunable_layers(header)
        kept = {n: torch.rand(layer.num_neurons, generator=generator) < 0.6 for n, layer in layers.items()}
        for mask in kept.values():
            mask[0] = True
        header = extract(header, kept)
        assert not layers or any(not m.all() for m in kept.values())
    return Classifier(backbone, header)


def make_card(model: Classifier, **changed: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "device_id": "phones-1",
        "cluster": "phones",
        "family": "vit",
        "config": model.backbone.config,
        "header": model.header.spec,
        "labels": ("a", "b", "c"),
        "width": 0.5,
        "depth": 2,
        "inputs": "pixels",
        "size_bytes": 1,
        "limit_bytes": 2,
        "accuracy": None,
    }
    return ModelCard(**{**fields, **changed})


def written(tmp_path: Path, model: Classifier, card: ModelCard | None = None) -> Path:
    with RunFolder(tmp_path / "run", Job()) as folder:
        folder.write_device(model, card or make_card(model))
    return tmp_path / "run" / "devices" / "phones-1"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("cut", [False, True], ids=["full", "cut"])
@torch.no_grad()
def test_a_model_that_is_loaded_is_the_one_that_was_written(
    tmp_path: Path, spec: HeaderSpec, pruned: bool, cut: bool
) -> None:
    model = make_model(spec, pruned, cut).eval()
    folder = written(tmp_path, model)
    loaded = load_model(str(folder))
    inputs = torch.randn(5, 1, 8, 8, generator=named_generator(0, "inputs"))
    assert not loaded.training
    assert torch.equal(loaded(inputs), model(inputs))
    assert loaded(inputs[:0]).shape == (0, 3)
    state: dict[str, Tensor] = loaded.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert read_card(folder) == make_card(model)
    size = (folder / "model.safetensors").stat().st_size
    assert size < 4 * sum(t.numel() for t in state.values()) + 10_000


def test_the_card_comes_after_the_tensors_that_it_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = artifacts.write_atomically, []

    def write(path: Path, content: bytes | str) -> None:
        seen.append(path.name)
        real(path, content)

    monkeypatch.setattr(artifacts, "write_atomically", write)
    written(tmp_path, make_model(SPECS["linear"], False, False))
    assert seen == ["job.toml", "model.safetensors", "model.json"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path, make_model(SPECS["linear"], False, False))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_model(folder)
    (folder / "model.json").unlink()
    for nothing in (folder, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"is no device folder: .*model\.json is missing") as error:
            load_model(nothing)
        assert str(nothing) in str(error.value)


def edited(folder: Path, **changed: Any) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format": 2}, r"model\.json has format 2, this fleetfit reads 1"),
        ({"surprise": 1}, r"model\.json is not a model card: surprise"),
        ({"labels": 3}, r"model\.json is not a model card: labels"),
        ({"header": {"kind": "wide"}}, r"model\.json is not a model card: header\.kind"),
        ({"family": "swin"}, r"model\.safetensors does not fit .*model\.json: model\.family must be one of"),
        ({"config": {**CONFIG, "num_hidden_layers": 2}}, r"model\.safetensors does not fit"),
        ({"config": {**CONFIG, "hidden_size": 32}}, r"model\.safetensors does not fit"),
        ({"config": {**CONFIG, "hiden_size": 32}}, "did you mean 'hidden_size'"),
        ({"config": {**CONFIG, "num_attention_heads": 0}}, r"model\.safetensors does not fit"),
        ({"config": {**CONFIG, "hidden_act": "nope"}}, r"model\.safetensors does not fit"),
        ({"labels": ["a", "b"]}, r"model\.safetensors does not fit .*last\.weight must have shape \(2,"),
        ({"header": {"kind": "linear"}}, r"model\.safetensors does not fit .*is unexpected"),
        ({"header": {"kind": "mlp", "hidden": 4}}, r"model\.safetensors does not fit"),
    ],
)
def test_a_card_that_is_wrong_or_another_models(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    folder = written(tmp_path, make_model(SPECS["mlp"], False, False))
    with pytest.raises(ValueError, match=says) as error:
        load_model(edited(folder, **changed))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"", b"\xff", b"{" * 2000])
def test_a_card_that_is_none(tmp_path: Path, content: bytes) -> None:
    folder = written(tmp_path, make_model(SPECS["linear"], False, False))
    (folder / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.json is not a model card"):
        load_model(folder)


def test_tensors_of_another_model_or_of_none(tmp_path: Path) -> None:
    model = make_model(SPECS["mlp"], True, False)
    folder = written(tmp_path, model)
    path, state = folder / "model.safetensors", model.state_dict()
    name = "header.classifier.first.weight"
    for other in (
        {n: t for n, t in state.items() if n != name},
        {**state, name: state[name][:, :-1].clone()},
        {**state, "header.more": torch.zeros(1)},
        {**state, "backbone.more": torch.zeros(1)},
        {n.replace("header", "footer"): t for n, t in state.items()},
        {},
    ):
        safetensors.torch.save_file(other, path)
        with pytest.raises(ValueError, match=r"model\.safetensors does not fit .*model\.json"):
            load_model(folder)
    whole = safetensors.torch.save(dict(state))
    for blob in (b"", whole[:-1], whole[:100], b"\xff" * 100):
        path.write_bytes(blob)
        with pytest.raises(ValueError, match=r"model\.safetensors is corrupt"):
            load_model(folder)
    # A dtype that no model has, in the place of a tensor that this one has.
    bias = "header.classifier.last.bias"
    whole = safetensors.torch.save({n: t for n, t in state.items() if n != bias})
    length = int.from_bytes(whole[:8], "little")
    end = len(whole) - 8 - length
    entries = json.loads(whole[8 : 8 + length])
    for dtype, size in (("F4", 2), ("F8_E8M0", 4), ("C64", 32), ("BOOL", 4)):
        header = json.dumps(
            {**entries, bias: {"dtype": dtype, "shape": [4], "data_offsets": [end, end + size]}}
        ).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :] + b"\1" * size)
        with pytest.raises(ValueError, match=r"model\.safetensors (does not fit|is corrupt)"):
            load_model(folder)
