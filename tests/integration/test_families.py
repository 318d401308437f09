"""Every family, and a pre-trained start, through a whole job: from digits to models on devices."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import fleetfit
from fleetfit.config import SMALL_CONFIGS, ModelConfig, make_job
from fleetfit.data.partition import share_out
from fleetfit.data.sources import load_samples
from fleetfit.engines import local
from fleetfit.models.elastic import Backbone
from fleetfit.models.families import FAMILIES
from fleetfit.randomness import seeded_init

torch.set_num_threads(1)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
WHOLE = {**SIZES, "intermediate_size": 32, "image_size": 8, "num_channels": 1}


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
    assert set(get_args(ModelConfig.model_fields["family"].annotation)) == set(FAMILIES) == set(SMALL_CONFIGS)


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_small_model_for_digits(family: str) -> None:
    job = make_job({"model": {"family": family, "config": {"hidden_size": 32}}})
    backbone = Backbone(family, job.model.config)
    assert backbone.config["hidden_size"] == 32
    assert backbone.config["intermediate_size"] == (64 if family == "dinov2" else 128)
    assert backbone.input_shape == (1, 8, 8)


def test_a_pretrained_model_runs_through_a_whole_job(tmp_path: Path) -> None:
    pretrained = folder_of_a_vit(tmp_path / "vit")
    job = make_job(fields(tmp_path / "cache", pretrained=str(pretrained), learning_rate=1e-9))
    assert job.model.config == {}
    summary = local.run(job, tmp_path / "run")
    assert len(summary["devices"]) == 4

    # With a learning rate of next to nothing the reference still is what was loaded.
    from fleetfit.artifacts import Ledger, StepFolder
    from fleetfit.cloud import Reference, classifier_of

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
    from fleetfit.pipeline import _reference_key

    job = make_job(fields(tmp_path, pretrained=str(folder_of_a_vit(tmp_path / "vit"))))
    public = share_out(load_samples(job), job.data, {"all": ["all-1"]}, 0).public
    before = _reference_key(job, public)
    assert _reference_key(job, public) == before
    folder_of_a_vit(tmp_path / "vit", hidden_size=32)
    assert _reference_key(job, public) != before


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
    monkeypatch.setattr("fleetfit.cloud.fit", lambda *args, **kwargs: pytest.fail("it was trained"))
    said = rf"takes inputs of {takes} \(channels x rows x columns\), but data\.source = 'digits' has 1 x 8 x 8"
    with pytest.raises(ValueError, match=said):
        local.run(make_job(fields(tmp_path / "cache", **model)), tmp_path / "run")


def test_a_depth_that_a_pretrained_model_does_not_have_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fields(tmp_path / "cache", pretrained=str(folder_of_a_vit(tmp_path / "vit")))
    job["backbone"]["depths"] = [1, 3]
    monkeypatch.setattr("fleetfit.cloud.fit", lambda *args, **kwargs: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=r"backbone\.depths must be <= the reference's 2 layers, got 3"):
        local.run(make_job(job), tmp_path / "run")
