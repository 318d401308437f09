"""Reading a kit: what is missing, damaged or another's is told with what to do."""

import stat
from pathlib import Path

import pytest

from fleetfit.engines.deployment.kit import hold, read_kit, running, write_secret
from fleetfit.engines.deployment.kit_file import KIT_FORMAT, kit_toml


def change(folder: Path, old: str, new: str) -> None:
    path = folder / "kit.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_what_is_written_is_read(made_kits: Path) -> None:
    for folder in made_kits.glob("*/kit.toml"):
        kit = read_kit(folder.parent)
        assert kit_toml(kit.file) == folder.read_text()
        assert kit.file.name == folder.parent.name


def test_a_folder_that_is_no_kit_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no kit: .*kit\.toml is missing; `fleetfit provision` makes kits"):
        read_kit(tmp_path)


def test_the_kit_of_another_role_is_told(made_kits: Path) -> None:
    with pytest.raises(ValueError, match=r"small-1 is the kit of a device; the kit of a cloud is needed"):
        read_kit(made_kits / "small-1", "cloud")
    with pytest.raises(ValueError, match=r"cloud is the kit of a cloud; the kit of an edge or a device is needed"):
        read_kit(made_kits / "cloud", "edge", "device")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (f"format = {KIT_FORMAT}", "format = 99", f"has format 99, this fleetfit reads {KIT_FORMAT}; provision again"),
        ('role = "device"', 'role = "edge"', "server must be given with role 'edge'"),
        ("[upstream]", "[upstreams]", "upstreams is an unknown key; did you mean 'upstream'?"),
        ("port = ", "port = -", "upstream.port must be >= 1"),
        ('cut = "given"', 'cut = "half"', "data.cut must be one of 'given', 'own', got 'half'"),
        ('name = "small-1"', "name = small-1", "is not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_told(kits: Path, old: str, new: str, told: str) -> None:
    change(kits / "small-1", old, new)
    with pytest.raises(ValueError, match=r"kit\.toml") as error:
        read_kit(kits / "small-1")
    assert told in str(error.value)


@pytest.mark.parametrize("name", ["ca.pem", "node.key", "task.json"])
def test_a_file_that_is_missing_is_told(kits: Path, name: str) -> None:
    (kits / "small-1" / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing: the kit is not complete; copy it again"):
        read_kit(kits / "small-1")


def test_data_are_looked_for_in_the_kit_first(kits: Path) -> None:
    assert read_kit(kits / "small-1").data_source == str(kits / "small-1" / "data")
    change(kits / "small-1", 'source = "data"', 'source = "someone/photos"')
    assert read_kit(kits / "small-1").data_source == "someone/photos"


@pytest.mark.parametrize("run", ["", "../../etc", "A" * 16, "0" * 15, "0" * 17, "0" * 15 + "/", "0" * 16 + "\n"])
def test_a_run_is_no_path(made_kits: Path, run: str) -> None:
    with pytest.raises(ValueError, match="a run's id must be 16 hexadecimal digits"):
        read_kit(made_kits / "small-1").of_run(run)


def test_a_kit_is_held_by_one(kits: Path) -> None:
    folder = kits / "small-1"
    assert not running(folder)
    with hold(folder):
        assert running(folder)
        with pytest.raises(ValueError, match="small-1 is started already"):
            hold(folder)
    assert not running(folder)


def test_a_secret_is_its_owners_from_the_first_byte_and_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_secret(path, b"one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_secret(path, b"two")
    assert path.read_bytes() == b"one"


def test_a_kit_brings_no_code_onto_a_machine_that_does_not_allow_it() -> None:
    from fleetfit.engines.deployment.start import check_code

    with pytest.raises(ValueError, match=r"'os:getcwd', a function of Python, .* start with --allow-code"):
        check_code("os:getcwd", allow_code=False)
    check_code("os:getcwd", allow_code=True)
    for source in ("data", "data/train.csv", "../x", "C:\\new\\train", "a:b/c", "owner/name"):
        check_code(source, allow_code=False)
