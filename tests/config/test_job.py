"""The job: defaults, presets, TOML in and out, and what is said about each kind of mistake."""

import contextlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetfit.config.fleet import DeviceGroup
from fleetfit.config.job import Job, load_job, make_job, parse_override
from fleetfit.config.presets import PAPER
from fleetfit.config.profiles import profile_toml, ready_profiles
from fleetfit.core.units import UNITS, parse_bytes

ONE_DEVICE = {"storage_limit": "1 MB"}
PAPER_PROFILE = ready_profiles()["paper"].model_dump()


def problems(fields: dict[str, Any]) -> list[str]:
    with pytest.raises(ValueError, match=r".") as caught:
        make_job(fields)
    return str(caught.value).splitlines()


def at(key: str, value: object) -> dict[str, Any]:
    """{'a': {'b': value}} for 'a.b'."""
    first, dot, rest = key.partition(".")
    return {first: at(rest, value) if dot else value}


# -- valid jobs -------------------------------------------------------------------------------------------------------


def test_no_fields_at_all_are_a_valid_job() -> None:
    assert make_job({}) == Job()
    assert sum(group.count for group in Job().fleet.devices) == 15


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": "paper"},
        {"fleet": {"devices": [{"count": 3, "storage_limit": ["120 KB", 5], "gpu_capacity": 7}], "num_clusters": 2}},
        {"fleet": {"devices": [{"storage_limit": 5, "profile": "raspberry-pi-5"}, ONE_DEVICE]}},
        {"backbone": {"widths": [0.3, 1], "depths": [1, 2]}, "header": {"operations": ["conv1"]}},
        {"model": {"config": {"hidden_size": 32, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}}},
        {"model": {"family": "dinov2", "config": {"hidden_size": 32}}},
        {"model": {"family": "deit", "pretrained": "someone/some-model"}},
    ],
)
def test_toml_round_trip_gives_an_equal_job(fields: dict[str, Any]) -> None:
    job = make_job(fields)
    assert make_job(tomllib.loads(job.to_toml())) == job


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"quorum": 0}, "links.quorum must be > 0, got 0"),
        ({"quorum": 1.01}, "links.quorum must be <= 1, got 1.01"),
        ({"deadline_seconds": 0}, "links.deadline_seconds must be > 0, got 0"),
        ({"deadline_seconds": float("inf")}, "links.deadline_seconds must be finite, got inf"),
        ({"max_message_bytes": "many"}, "links.max_message_bytes must be bytes, as 300000 or '300 KB'"),
        ({"send_models": 2}, "links.send_models must be true or false, got 2"),
    ],
)
def test_links_have_a_quorum_a_deadline_and_a_size(field: dict[str, Any], says: str) -> None:
    (line,) = problems({"links": field})
    assert line.startswith(says)
    links = make_job({"links": {"quorum": 1, "max_message_bytes": "2 MB", "deadline_seconds": 5}}).links
    assert (links.quorum, links.max_message_bytes, links.deadline_seconds, links.send_models) == (
        1,
        2 * 10**6,
        5,
        False,
    )


def test_every_recipe_is_valid() -> None:
    recipes = [p for p in (Path(__file__).parents[2] / "recipes").glob("*.toml") if not p.name.startswith("fleet-")]
    assert recipes
    for recipe in recipes:
        assert load_job(recipe).fleet.devices


def test_a_job_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Job().seed = 3


def test_single_values_stand_for_lists() -> None:
    group = make_job({"fleet": {"devices": [{"storage_limit": 5, "gpu_capacity": 2}]}}).fleet.devices[0]
    assert (group.count, group.storage_limit, group.gpu_capacity) == (1, (5,), (2.0,))


def test_the_configuration_lies_over_the_small_model_of_its_family() -> None:
    def config(**model: object) -> dict[str, Any]:
        return make_job({"model": model}).model.config

    assert config() == Job().model.config
    assert config(config={"hidden_size": 32}) == config() | {"hidden_size": 32}
    assert config(family="deit") == config()
    assert "intermediate_size" not in config(family="dinov2")
    assert config(family="dinov2", config={"mlp_ratio": 3})["mlp_ratio"] == 3
    assert config(family="bert", config={"vocab_size": 50}).items() >= {"vocab_size": 50, "hidden_size": 64}.items()
    assert "hidden_size" not in config(family="distilbert")


def test_what_is_pretrained_is_trained_at_lower_rates_unless_the_job_says_otherwise() -> None:
    small, job = make_job({}), make_job({"model": {"pretrained": "somewhere"}})
    assert (job.model.epochs, job.model.learning_rate, job.backbone.learning_rate) == (4, 2e-4, 5e-4)
    assert job.backbone.learning_rate < small.backbone.learning_rate
    own = {"model": {"pretrained": "somewhere", "epochs": 0}, "backbone": {"learning_rate": 1e-3}, "method": "paper"}
    job = make_job(own)
    assert (job.model.epochs, job.model.learning_rate, job.backbone.learning_rate) == (0, 2e-4, 1e-3)
    assert (job.model.header, job.backbone.distillation) == ("linear", "paper")
    assert make_job(job.model_dump(exclude_none=True)) == job  # a resolved job says everything itself


@pytest.mark.parametrize("family", ["vit", "bert", "distilbert"])
def test_depths_are_those_of_the_family_whatever_it_calls_them(family: str) -> None:
    deep = problems({"model": {"family": family}, "backbone": {"depths": [7]}})
    assert deep == [f"backbone.depths must be <= the reference's {6 if family == 'vit' else 4} layers, got 7"]


def test_a_pretrained_model_has_its_own_configuration() -> None:
    assert make_job({"model": {"pretrained": "someone/some-model"}}).model.config == {}
    (line,) = problems({"model": {"pretrained": "someone/some-model", "config": {"hidden_size": 32}}})
    assert line == "model: config must be left out with pretrained, which has its own"
    # How deep it is, is not known before it is loaded.
    assert make_job({"model": {"pretrained": "x"}, "backbone": {"depths": [24]}}).backbone.depths == (24,)


# -- device profiles ------------------------------------------------------------------------------------------------


def group(**fields: object) -> DeviceGroup:
    return make_job({"fleet": {"devices": [{**ONE_DEVICE, **fields}]}}).fleet.devices[0]


def test_a_profile_stands_in_the_place_of_gpu_capacity() -> None:
    named = group(profile="raspberry-pi-5")
    assert (named.profile, named.gpu_capacity) == ((ready_profiles()["raspberry-pi-5"],), None)
    several = group(profile=["raspberry-pi-5", "jetson-nano"])
    assert [p.name for p in several.profile or ()] == ["raspberry-pi-5", "jetson-nano"]
    assert (group().profile, group().gpu_capacity) == (None, (100.0,))


def test_the_resolved_job_has_all_of_a_profile_and_needs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "kitchen.toml"
    path.write_text(profile_toml(ready_profiles()["jetson-nano"].model_copy(update={"name": "kitchen"})))
    job = make_job({"fleet": {"devices": [{**ONE_DEVICE, "profile": str(path)}]}})
    path.unlink()
    for fields in (tomllib.loads(job.to_toml()), json.loads(job.model_dump_json())):
        again = make_job(fields)
        assert again == job
        assert again.fleet.devices[0].profile == job.fleet.devices[0].profile
        assert [p.name for p in again.fleet.devices[0].profile] == ["kitchen"]
    assert str(path) not in job.to_toml()


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"profile": "rasberry-pi-5"},
            ".profile must be a ready profile or a .toml file, got 'rasberry-pi-5'; did you mean 'raspberry-pi-5'? "
            "ready profiles: paper, ",
        ),
        ({"profile": "no/such.toml"}, ".profile is a file that cannot be read: No such file"),
        ({"profile": "paper", "gpu_capacity": 5}, ": gpu_capacity must be left out with profile, which has the power"),
        ({"profile": 3}, ".profile.0 must be a table of keys, got 3"),
        (
            {"profile": PAPER_PROFILE | {"power_wats": 1}},
            ".profile.0.power_wats is an unknown key; did you mean 'power_watts'?",
        ),
        ({"profile": PAPER_PROFILE | {"power_watts": -1}}, ".profile.0.power_watts must be >= 0, got -1"),
        ({"profile": PAPER_PROFILE | {"power_watts": "1"}}, ".profile.0.power_watts must be a number, got '1'"),
        ({"profile": PAPER_PROFILE | {"source": ""}}, ".profile.0.source must not be empty, got ''"),
        ({"gpu_capacity": None}, ": gpu_capacity must be given where there is no profile"),
    ],
)
def test_a_bad_profile_names_its_place(fields: dict[str, Any], line: str) -> None:
    (told,) = problems({"fleet": {"devices": [{**ONE_DEVICE, **fields}]}})
    assert told.startswith(f"fleet.devices.0{line}")


def test_a_file_that_is_no_profile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("seed = 1")
    (told,) = problems({"fleet": {"devices": [{**ONE_DEVICE, "profile": str(path)}]}})
    assert told.startswith(f"fleet.devices.0.profile: {path} is no device profile: ")


# -- the paper's preset -----------------------------------------------------------------------------------------------

PAPER_KEYS = [(section, key) for section, keys in PAPER.items() for key in keys]


@pytest.mark.parametrize(("section", "key"), PAPER_KEYS)
def test_paper_switches_every_choice(section: str, key: str) -> None:
    paper = getattr(getattr(make_job({"method": "paper"}), section), key)
    assert paper == PAPER[section][key]


@pytest.mark.parametrize(("section", "key"), PAPER_KEYS)
def test_a_stated_key_wins_over_the_preset(section: str, key: str) -> None:
    own = getattr(getattr(Job(), section), key)
    job = make_job({"method": "paper", section: {key: own}})
    assert getattr(getattr(job, section), key) == own
    others = [(s, k) for s, k in PAPER_KEYS if (s, k) != (section, key)]
    assert all(getattr(getattr(job, s), k) == PAPER[s][k] for s, k in others)


def test_the_resolved_paper_job_keeps_its_choices_when_read_back() -> None:
    job = make_job({"method": "paper", "refine": {"guard": True}})
    assert make_job(tomllib.loads(job.to_toml())).refine == job.refine


# -- bytes ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]), st.booleans())
def test_bytes_with_units(number: int, unit: str, space: str, lower: bool) -> None:
    written = f" {number}{space}{unit.lower() if lower else unit} "
    assert parse_bytes(written) == number * UNITS[unit]
    assert parse_bytes(str(number)) == parse_bytes(number) == number


@given(st.text(max_size=12))
def test_any_text_is_bytes_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_bytes(text), int)


@pytest.mark.parametrize(("text", "expected"), [("1.5 KB", 1500), ("0.5 MiB", 2**19), ("1e3", 1000)])
def test_bytes_with_a_fraction(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("limit", ["3 XB", "KB", "", "inf KB", "nan", "1 KB 2", True, 0, -5, "-1 KB", "0.2 B"])
def test_bad_storage_limit_names_its_key(limit: object) -> None:
    (line,) = problems({"fleet": {"devices": [{"storage_limit": limit}]}})
    assert line.startswith("fleet.devices.0.storage_limit.0 must be ")
    assert line.endswith(f", got {limit!r}")


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("sed", "did you mean 'seed'?"),
        ("headr.search", "did you mean 'header'?"),
        ("header.serch", "did you mean 'search'?"),
        ("fleet.energy.epoch", "did you mean 'epochs'?"),
        ("refine.zzz", "known keys here: rounds, settle, epochs, "),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, hint: str) -> None:
    (line,) = problems(at(key, 1))
    assert line.startswith(f"{key if 'headr' not in key else 'headr'} is an unknown key; {hint}")


def test_an_unknown_key_in_a_list_of_tables_names_the_nearest() -> None:
    fields = {"fleet": {"devices": [ONE_DEVICE, {"cout": 2, **ONE_DEVICE}]}}
    assert problems(fields) == ["fleet.devices.1.cout is an unknown key; did you mean 'count'?"]


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("seed", "x", "must be an integer, got 'x'"),
        ("seed", -1, "must be >= 0, got -1"),
        ("seed", 2**0.5, "must be an integer, got 1.41"),
        ("refine.rounds", 0, "must be >= 1, got 0"),
        ("refine.rounds", True, "must be an integer, got True"),
        ("refine.rounds", "2", "must be an integer, got '2'"),
        ("refine.guard", "maybe", "must be true or false, got 'maybe'"),
        ("model.learning_rate", float("inf"), "must be finite, got inf"),
        ("model.learning_rate", float("nan"), "must be finite, got nan"),
        ("model.learning_rate", 0, "must be > 0, got 0"),
        ("model.learning_rate", "fast", "must be a number, got 'fast'"),
        ("data.public_share", 1.5, "must be <= 1, got 1.5"),
        ("data.validation_share", 0, "must be > 0, got 0"),
        ("method", "papr", "must be one of 'fleetfit', 'paper', got 'papr'"),
        ("header", 5, "must be a table of keys, got 5"),
        ("header.max_blocks", 9, "must be <= 8, got 9"),
        ("model.config", 3, "must be a table of keys, got 3"),
        ("run.cache", 3, "must be a text, got 3"),
        ("fleet.devices", [], "must have at least 1 item, got []"),
        ("fleet.devices", 3, "must be a list, got 3"),
        ("backbone.widths", 0.5, "must be a list, got 0.5"),
        ("backbone.depths", [9], "must be <= the reference's 6 layers, got 9"),
    ],
)
def test_a_bad_value_names_key_rule_and_value(key: str, value: object, rule: str) -> None:
    (line,) = problems(at(key, value))
    assert line.startswith(f"{key} {rule}")


@pytest.mark.parametrize("key", ["backbone.widths", "header.operations", "backbone.depths"])
def test_a_bad_item_names_its_place(key: str) -> None:
    good = {"backbone.widths": 0.5, "header.operations": "conv1", "backbone.depths": 1}[key]
    (line,) = problems(at(key, [good, -7]))
    assert line.startswith(f"{key}.1 must be ")
    assert line.endswith(", got -7")


def test_all_values_of_a_choice_are_in_one_line() -> None:
    (line,) = problems({"header": {"search": "hlving"}})
    assert "'halving'" in line
    assert "'mlp_mixer'" in line
    assert line.endswith("got 'hlving'")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".hidden", "[red]"])
def test_a_cluster_is_named_so_that_it_can_name_folders(name: str) -> None:
    (line,) = problems({"fleet": {"devices": [{"cluster": name, **ONE_DEVICE}]}})
    assert line.startswith("fleet.devices.0.cluster must be letters, digits")


def test_rules_between_keys() -> None:
    (line,) = problems({"data": {"public_share": 0.9}})
    assert line == "data: public_share + test_share + edge_share must be < 1, got 1.08"
    devices = [{"cluster": "a", **ONE_DEVICE}, ONE_DEVICE]
    assert "must be given for all groups or for none" in problems({"fleet": {"devices": devices}})[0]
    (line,) = problems({"fleet": {"devices": [ONE_DEVICE], "num_clusters": 2}})
    assert "num_clusters must be <= the number of devices (1), got 2" in line
    assert "num_clusters must be left out" in problems({"fleet": {"num_clusters": 2}})[0]


def test_all_problems_are_reported_at_once() -> None:
    lines = problems({"sed": 1, "refine": {"rounds": 0, "epochs": "x"}, "fleet": {"devices": [{}]}})
    keys = {line.split()[0] for line in lines}
    assert keys == {"sed", "refine.rounds", "refine.epochs", "fleet.devices.0.storage_limit"}
    assert len(lines) == 4


# -- files and --set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", {"seed": 3}),
        (" header.search = enas", {"header": {"search": "enas"}}),
        ("header.search='enas'", {"header": {"search": "enas"}}),
        ("backbone.widths=[0.5, 1.0]", {"backbone": {"widths": [0.5, 1.0]}}),
        ("refine.guard=false", {"refine": {"guard": False}}),
        ("run.cache=a=b", {"run": {"cache": "a=b"}}),
        ("data.split=", {"data": {"split": ""}}),
        ("fleet.devices=[{count=2}]", {"fleet": {"devices": [{"count": 2}]}}),
    ],
)
def test_overrides(text: str, expected: dict[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["seed", "=3", " =3", ""])
def test_an_override_is_key_and_value(text: str) -> None:
    with pytest.raises(ValueError, match="--set must be KEY=VALUE, got"):
        parse_override(text)


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("seed = 1\n[refine]\nrounds = 4\n")
    job = load_job(path, ("seed=2", "seed=5", "refine.epochs=7"))
    assert (job.seed, job.refine.rounds, job.refine.epochs) == (5, 4, 7)


def test_an_override_can_choose_the_method(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[header]\nviews = 2\n")
    job = load_job(path, ("method=paper",))
    assert (job.header.search, job.header.views) == ("enas", 2)


def test_arrays_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('[[fleet.devices]]\nstorage_limit = "1 KB"\n[[fleet.devices]]\ncount = 2\nstorage_limit = [1, 2]\n')
    assert [(g.count, g.storage_limit) for g in load_job(path).fleet.devices] == [(1, (1000,)), (2, (1, 2))]


@pytest.mark.parametrize("content", [b"seed = = 1", b"\xff\xfe", b"seed = 1\nseed = 2", b'{"seed": 1}'])
def test_what_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"job\.toml is not TOML: "):
        load_job(path)


def test_problems_come_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("sed = 1")
    with pytest.raises(ValueError, match=r"job\.toml:\nsed is an unknown key"):
        load_job(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_job(tmp_path / "job.toml")
