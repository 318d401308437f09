"""Every family, and a pre-trained start, through a whole job or its phases: from data to models on devices."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import fleetfit
from fleetfit.cloud.elastic_training import train_elastic
from fleetfit.cloud.importance import reorder_by, taylor_importance
from fleetfit.config.families import FAMILIES as FACTS
from fleetfit.config.job import make_job
from fleetfit.config.sections import BackboneConfig, HeaderConfig, ModelConfig, RefineConfig
from fleetfit.core.encoding import Message, decode, encode, put
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import BackboneShape, DeviceAttributes, EnergyModel, HeaderSpec, Way
from fleetfit.data.augmentation import Augmentation
from fleetfit.data.partition import Split, share_out
from fleetfit.data.samples import Inputs, Samples
from fleetfit.data.sources import load_samples
from fleetfit.device.device import DeviceState, handle
from fleetfit.device.memory import DeviceMemory, shipped_model
from fleetfit.device.messages import AttributesRequest, CoarseModel, Finish, Propose, RefineRound
from fleetfit.edge import header as edge
from fleetfit.edge.header_search import search_header
from fleetfit.engines import local
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.families import FAMILIES
from fleetfit.models.header import build_header
from fleetfit.models.training import evaluate, fit

torch.set_num_threads(1)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
WHOLE = {**SIZES, "intermediate_size": 32, "image_size": 8, "num_channels": 1}


IMAGES = [name for name, family in FAMILIES.items() if family.kind == "image"]
TEXTS = [name for name, family in FAMILIES.items() if family.kind == "text"]


def fields(cache: Path, **model: Any) -> dict[str, Any]:
    """A job of a second or two: two clusters, two devices each."""
    return {
        "model": {"epochs": 1, **model},
        "fleet": {
            "devices": [
                {"count": 2, "cluster": "small", "storage_limit": "60 KB"},
                {"count": 2, "cluster": "large", "storage_limit": "1 MB"},
            ]
        },
        "data": {"split": "iid"},
        "backbone": {"widths": [0.3, 1.0], "steps": 2, "specialise_steps": 1, "importance_samples": 32},
        "header": {"search": "cnn_add", "budget_steps": 5, "views": 1, "keep_distilled": False},
        "refine": {"rounds": 1, "epochs": 1},
        "run": {"cache": str(cache)},
    }


def folder_of_a_vit(folder: Path, **keys: object) -> Path:
    with seeded_init(3, "pretrained"):
        ViTForImageClassification(ViTConfig(**WHOLE | keys)).save_pretrained(folder)
    return folder


def test_jobs_know_all_families() -> None:
    assert set(get_args(ModelConfig.model_fields["family"].annotation)) == set(FAMILIES) == set(FACTS)


@pytest.mark.parametrize("family", IMAGES)
def test_a_family_runs_through_a_whole_job(family: str, tmp_path: Path) -> None:
    summary = local.run(make_job(fields(tmp_path / "cache", family=family, config=SIZES)), tmp_path / "run")
    small, large = summary["clusters"]
    assert small["size_bytes"] < large["limit_bytes"]
    for device in summary["devices"]:
        model = fleetfit.load(tmp_path / "run" / "devices" / device["id"])
        assert model.backbone.family == family
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
        path = tmp_path / "run" / "devices" / device["id"] / "model.safetensors"
        assert path.stat().st_size == device["size_bytes"] <= device["limit_bytes"]


@pytest.mark.parametrize("family", IMAGES)
def test_every_family_has_a_small_model_for_digits(family: str) -> None:
    job = make_job({"model": {"family": family, "config": {"hidden_size": 32}}})
    backbone = Backbone(family, job.model.config)
    assert backbone.config["hidden_size"] == 32
    assert backbone.config["intermediate_size"] == (64 if family == "dinov2" else 128)
    assert backbone.input_shape == (1, 8, 8)


def make_texts(family: str, number: int, name: str) -> Samples:
    """Texts of 3 to 12 words in 16 places; a text of class c has two words of c, wherever they are."""
    generator, padding = named_generator(0, "texts", name), FACTS[family].small["pad_token_id"]
    labels = torch.arange(number) % 4
    tokens = torch.full((number, 16), padding)
    for i, c in enumerate(labels.tolist()):
        length = int(torch.randint(3, 13, (1,), generator=generator))
        tokens[i, :length] = torch.randint(20, 40, (length,), generator=generator)
        tokens[i, 1 + torch.randperm(length - 1, generator=generator)[:2]] = 10 + c
        tokens[i, 0], tokens[i, length - 1 if length > 5 else 0] = 2, 2
    return Samples(Inputs.of(tokens), labels, tuple("abcd"), 60)


@pytest.mark.parametrize("family", TEXTS)
def test_a_family_of_texts_runs_through_all_phases(family: str) -> None:
    train, validation = make_texts(family, 240, "train"), make_texts(family, 80, "validation")
    config = FACTS[family].small | {"vocab_size": 40, "max_position_embeddings": 18 if family == "roberta" else 16}
    with seeded_init(0, family):
        backbone = Backbone(family, config)
        model = Classifier(backbone, build_header(HeaderSpec(), backbone.feature_shape, 4))

    def learn(model: Classifier, steps: int) -> float:
        fit(
            lambda rows: torch.nn.functional.cross_entropy(model(train.inputs[rows]), train.labels[rows]),
            model.parameters(),
            len(train),
            steps=steps,
            batch_size=32,
            learning_rate=3e-3,
            generator=named_generator(0, "reference"),
        )
        return evaluate(lambda rows: model(validation.inputs[rows]), validation.labels).accuracy

    assert learn(model, 150) > 0.8

    # The cloud: importance does not depend on how long the other texts are, and small sub-networks learn.
    elastic, header = ElasticBackbone(backbone), model.header
    taylor, alone = (taylor_importance(elastic, header, train, batch_size=size) for size in (64, 1))
    for one, other in zip((*taylor.heads, *taylor.neurons), (*alone.heads, *alone.neurons), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    reorder_by(elastic, taylor)
    small = BackboneShape(width=0.25, depth=2)
    settings = BackboneConfig(widths=(0.25, 1.0), steps=60, batch_size=32, learning_rate=3e-3, distillation="joint")
    train_elastic(elastic, header, train, settings, (2, 4), Augmentation(), seed=0)
    cut = elastic.extract(small).eval()
    result = evaluate(lambda rows: header(cut(validation.inputs[rows])), validation.labels)
    assert result.accuracy > 0.5

    # The edge: features are kept with their masks, and a header that reads all tokens is found.
    cached = edge.cached_features(cut, train)
    mask = train.inputs[:] != config["pad_token_id"]
    assert cached.cached.mask is not None
    assert torch.equal(cached.cached.mask, mask)
    assert torch.equal(cached.features(torch.tensor([5, 3])).mask, mask[[5, 3]])
    found = search_header(
        "cnn_add",
        cached,
        edge.cached_features(cut, validation),
        HeaderConfig(budget_steps=60, channels=8),
        cut.feature_shape,
        4,
        10**6,
        0,
    )

    # The device: so does its memory, also when it has been saved.
    data = Split(make_texts(family, 32, "own"), make_texts(family, 12, "chosen on"), make_texts(family, 12, "test"))
    attributes = DeviceAttributes(device_id="d", storage_limit_bytes=10**6, energy=EnergyModel(), num_samples=56)
    state = DeviceState(attributes, data, DeviceMemory())
    coarse = CoarseModel(
        step=1,
        family=family,
        config=cut.config,
        labels=tuple("abcd"),
        header=found.header.spec,
        refine=RefineConfig(rounds=1, epochs=2),
        seed=0,
        class_shares=(0.25,) * 4,
        tensors=put("backbone", dict(cut.model.state_dict())) | put("header", dict(found.header.state_dict())),
    )
    steps: list[Message] = [
        AttributesRequest(step=0),
        coarse,
        RefineRound(step=2, round=1),
        Propose(step=3),
        Finish(step=4, way=Way(header="refined")),
    ]
    for message in steps:
        state, reply = handle(state, message)
        memory = decode(encode(state.memory), DeviceMemory)
        state = DeviceState(attributes, data, memory)
    assert memory.tensors["features.train.mask"].dtype == torch.bool
    assert torch.equal(memory.tensors["features.train.mask"], data.train.inputs[:] != config["pad_token_id"])
    shipped = shipped_model(memory)
    whole = evaluate(lambda rows: shipped(data.test.inputs[rows]), data.test.labels)
    assert reply.report.accuracy == pytest.approx(whole.accuracy)
    assert reply.report.accuracy_coarse == pytest.approx(
        evaluate(lambda rows: found.header(cut(data.test.inputs[rows])), data.test.labels).accuracy
    )
    assert whole.accuracy > 0.5


def test_a_pretrained_model_runs_through_a_whole_job(tmp_path: Path) -> None:
    pretrained = folder_of_a_vit(tmp_path / "vit")
    job = make_job(fields(tmp_path / "cache", pretrained=str(pretrained), learning_rate=1e-9))
    assert job.model.config == {}
    summary = local.run(job, tmp_path / "run")
    assert len(summary["devices"]) == 4

    # With a learning rate of next to nothing the reference still is what was loaded.
    from fleetfit.cloud.reference import Reference, classifier_of
    from fleetfit.core.checkpoints import Ledger, StepFolder

    def not_again() -> Reference:
        raise AssertionError

    reference = StepFolder(tmp_path / "run" / "steps", Ledger()).step("reference/cloud", Reference, not_again)
    found = classifier_of(job, reference, 10).backbone.model.state_dict()
    expected = ViTForImageClassification.from_pretrained(pretrained).vit.state_dict()
    assert all(torch.allclose(found[n], expected[n], atol=1e-4) for n in found)

    # The finished run is read back, though the folder is gone.
    (pretrained / "model.safetensors").unlink()
    assert local.run(job, tmp_path / "run")["devices"] == summary["devices"]


def test_other_weights_in_the_same_folder_are_another_reference(tmp_path: Path) -> None:
    from fleetfit.cloud.run import reference_key

    job = make_job(fields(tmp_path, pretrained=str(folder_of_a_vit(tmp_path / "vit"))))
    public = share_out(load_samples(job), job.data, {"all": ["all-1"]}, 0).public
    before = reference_key(job, public)
    assert reference_key(job, public) == before
    folder_of_a_vit(tmp_path / "vit", hidden_size=32)
    assert reference_key(job, public) != before


@pytest.mark.parametrize(
    ("keys", "takes"),
    [({"num_channels": 3}, "3 x 8 x 8"), ({"image_size": 16}, "1 x 16 x 16")],
    ids=["channels", "size"],
)
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "pretrained"])
def test_a_model_that_does_not_take_the_data_is_told_before_training(
    family: str, keys: dict[str, object], takes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "pretrained":
        model: dict[str, Any] = {"pretrained": str(folder_of_a_vit(tmp_path / "vit", **keys))}
    else:
        model = {"family": family, "config": SIZES | keys}
    monkeypatch.setattr("fleetfit.cloud.reference.fit", lambda *args, **kwargs: pytest.fail("it was trained"))
    said = rf"takes inputs of {takes} \(channels x rows x columns\), but data\.source = 'digits' has 1 x 8 x 8"
    with pytest.raises(ValueError, match=said):
        local.run(make_job(fields(tmp_path / "cache", **model)), tmp_path / "run")


def test_a_depth_that_a_pretrained_model_does_not_have_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fields(tmp_path / "cache", pretrained=str(folder_of_a_vit(tmp_path / "vit")))
    job["backbone"]["depths"] = [1, 3]
    monkeypatch.setattr("fleetfit.cloud.reference.fit", lambda *args, **kwargs: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=r"backbone\.depths must be <= the reference's 2 layers, got 3"):
        local.run(make_job(job), tmp_path / "run")
