"""Ready profiles: complete, with their source, derived by the rule that they state; files; what is no profile."""

import tomllib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fleetfit.config.profiles import (
    SHARE_OF_PEAK,
    Profile,
    PublishedDevice,
    find_profile,
    profile_toml,
    read_profile,
    ready_profiles,
    vit_operations,
)
from fleetfit.core.records import BackboneShape, EnergyModel
from fleetfit.method.energy import energy_joules
from fleetfit.models.elastic import Backbone

NAMES = list(ready_profiles())
OWN = Profile(
    name="kitchen",
    hardware='a "board"',
    source="guessed",
    power_watts=2,
    power_slope_watts=3,
    patch_power_watts=5,
    latency_seconds=7,
    latency_slope_seconds=11,
)


# -- the ready ones ---------------------------------------------------------------------------------------------------


def test_there_are_a_dozen_and_the_papers() -> None:
    assert len(NAMES) >= 13
    paper = ready_profiles()["paper"]
    assert paper.energy == EnergyModel(
        power_watts=100,
        power_slope_watts=10,
        patch_power_watts=50,
        latency_seconds=1,
        latency_slope_seconds=0.1,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_ready_profile_says_its_source_and_costs_energy(name: str) -> None:
    profile = ready_profiles()[name]
    assert profile.name == name
    assert profile.source.startswith(("Published: ", "Measured ", "Like the paper's "))
    assert ("Derived, not measured" in profile.source) == profile.source.startswith("Published: ")
    small, large = (BackboneShape(width=w, depth=d) for w, d in ((0.25, 1), (1.0, 12)))
    assert 0 < energy_joules(small, profile.energy, 196, 1) < energy_joules(large, profile.energy, 196, 1)
    assert find_profile(name) is profile


def test_time_is_derived_by_the_stated_rule() -> None:
    # 300 GFLOP/s at 30 % are 90; ViT-B/16 has 35.1 GFLOP an image: 0.390 s each, of which embedding is 0.231 / 35.1.
    profile = PublishedDevice(hardware="x", published="y.", watts=9, gigaflops=300).profile("z")
    assert SHARE_OF_PEAK == 0.3
    assert profile.latency_seconds + 12 * profile.latency_slope_seconds == pytest.approx(390.3, rel=1e-3)
    assert profile.latency_seconds == pytest.approx(2.569, rel=1e-3)
    assert profile.energy.power_watts == 9
    assert profile.source == (
        "Published: y. Derived, not measured: constant power of 9 W; time of a ViT-B/16 on 1,000 images at 30% of "
        "300 GFLOP/s."
    )


@pytest.mark.parametrize(
    ("hidden_size", "neurons", "heads", "image_size", "patch_size"), [(768, 3072, 12, 224, 16), (64, 128, 4, 8, 2)]
)
def test_operations_are_those_that_pytorch_counts(
    hidden_size: int, neurons: int, heads: int, image_size: int, patch_size: int
) -> None:
    config = {"hidden_size": hidden_size, "intermediate_size": neurons, "num_attention_heads": heads, "num_channels": 3}
    config |= {"image_size": image_size, "patch_size": patch_size}
    counted = []
    for layers in (1, 3):
        with torch.device("meta"):
            backbone = Backbone("vit", config | {"num_hidden_layers": layers})
            image = torch.empty(1, 3, image_size, image_size)
        with FlopCounterMode(display=False) as counter:
            backbone(image)
        counted.append(counter.get_total_flops())
    embedding, layer = vit_operations(hidden_size, neurons, (image_size // patch_size) ** 2, 3 * patch_size**2, 1)
    assert [embedding + layer, embedding + 3 * layer] == counted


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "kitchen.toml"
    path.write_text(profile_toml(OWN, ("a note", "", 'another = "1"')), encoding="utf-8")
    assert read_profile(path) == OWN
    assert find_profile(str(path)) == OWN
    assert path.read_text().splitlines()[:3] == ["# a note", "#", '# another = "1"']


def test_the_constants_alone_are_what_a_device_tells() -> None:
    assert type(OWN.energy) is EnergyModel
    assert OWN.energy.model_dump() == {
        "power_watts": 2,
        "power_slope_watts": 3,
        "patch_power_watts": 5,
        "latency_seconds": 7,
        "latency_slope_seconds": 11,
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"latency_seconds": None}, "latency_seconds: Field required"),
        ({"power_watts": -1}, "power_watts: Input should be greater than or equal to 0"),
        ({"power_watts": True}, "power_watts: Input should be a valid number"),
        ({"power_watts": float("nan")}, "power_watts: Input should be a finite number"),
        ({"watts": 3}, "watts: Extra inputs are not permitted"),
        ({"source": ""}, "source: String should have at least 1 character"),
        ({"name": "../x"}, "name: String should match"),
        ({"name": 3, "watts": 3}, "name: Input should be a valid string, and 1 more"),
        ({"latency_seconds": 0, "latency_slope_seconds": 0}, "must not both be 0"),
        ({"power_watts": 0, "power_slope_watts": 0, "patch_power_watts": 0}, "must not all be 0"),
    ],
)
def test_what_is_no_profile_is_refused_with_file_and_key(
    tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    import tomli_w

    path = tmp_path / "x.toml"
    fields = {key: value for key, value in (OWN.model_dump() | change).items() if value is not None}
    path.write_text(tomli_w.dumps(fields))
    with pytest.raises(ValueError, match=r"x\.toml is no device profile: ") as caught:
        read_profile(path)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"name = = 1", b"\xff\xfe"])
def test_what_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.toml is not TOML: "):
        read_profile(tmp_path / "x.toml")


def test_an_unknown_name_is_told_with_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match="got 'nvidia-t5'; did you mean 'nvidia-t4'") as caught:
        find_profile("nvidia-t5")
    assert all(name in str(caught.value) for name in NAMES)
    with pytest.raises(ValueError, match="got 'zzz'; ready profiles: paper, "):
        find_profile("zzz")


def test_the_data_file_holds_facts_and_no_derived_numbers() -> None:
    import fleetfit

    tables = tomllib.loads((Path(fleetfit.__file__).parent / "config" / "profiles.toml").read_text(encoding="utf-8"))
    for name, table in tables.items():
        kinds = {"published", "watts", "gigaflops"}, {"source", *EnergyModel.model_fields}
        assert set(table) - {"hardware"} in kinds, name
