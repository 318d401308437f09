"""Kits: who gets which secret, certificates that verify, the very same data as the local engine, and bad input."""

import ssl
import stat
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fleetfit.cloud.clusters import fleet_of
from fleetfit.data.partition import Split, share_out
from fleetfit.data.sources import load_samples
from fleetfit.engines.deployment.certificates import public_line, read_certificate, read_member_key
from fleetfit.engines.deployment.kit import hold, read_kit
from fleetfit.engines.deployment.provision import provision
from fleetfit.engines.deployment.start import load_data

NAMES = {"cloud", "small", "large", "small-1", "small-2", "large-1"}
SECRETS = {"server.key", "node.key", "ca.key"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_each_participant_has_a_folder_and_only_its_own_secrets(made_kits: Path) -> None:
    assert {p.name for p in made_kits.iterdir()} == NAMES | {"ca", "fleet.id"}
    found = {p.relative_to(made_kits).as_posix() for p in made_kits.rglob("*") if p.name in SECRETS}
    servers = {f"{name}/server.key" for name in ("cloud", "small", "large")}
    assert found == {"ca/ca.key"} | servers | {f"{name}/node.key" for name in NAMES - {"cloud"}}
    assert all(mode(made_kits / path) == 0o600 for path in found)
    assert all(mode(made_kits / name) == 0o700 for name in NAMES | {"ca"})


def test_no_private_key_is_in_any_other_file_and_no_two_are_alike(made_kits: Path) -> None:
    keys = [p.read_bytes() for p in made_kits.rglob("*") if p.name in SECRETS]
    assert len(set(keys)) == len(keys)
    others = [p for p in made_kits.rglob("*") if p.is_file() and p.name not in SECRETS]
    assert others
    for path in others:
        assert b"PRIVATE KEY" not in path.read_bytes(), path


def test_certificates_verify_against_the_authority_and_name_their_address(made_kits: Path) -> None:
    ca = read_certificate(made_kits / "ca" / "ca.pem")
    for name in ("cloud", "small", "large"):
        kit = read_kit(made_kits / name)
        certificate = read_certificate(kit.server_certificate)
        certificate.verify_directly_issued_by(ca)
        assert kit.ca.read_bytes() == (made_kits / "ca" / "ca.pem").read_bytes()
        private = load_pem_private_key(kit.server_key.read_bytes(), None)
        assert private.public_key() == certificate.public_key()
        assert 364 < (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 366
    # What TLS itself says: a handshake in memory.
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cafile=made_kits / "small-1" / "ca.pem")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made_kits / "small" / "server.pem", made_kits / "small" / "server.key")
    shake(client, server, "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake(client, server, "10.0.0.1")


def shake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname=name)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    open_sides = [one, other]
    while open_sides:
        for side in list(open_sides):
            try:
                side.do_handshake()
                open_sides.remove(side)
            except ssl.SSLWantReadError:
                continue


def test_those_above_know_the_keys_of_those_below_and_no_others(made_kits: Path) -> None:
    below = {"cloud": ["small", "large"], "small": ["small-1", "small-2"], "large": ["large-1"]}
    for name, members in below.items():
        known = {m.name: m.public_key for m in read_kit(made_kits / name).file.members}
        assert list(known) == members
        for member in members:
            assert known[member] == public_line(read_member_key(made_kits / member / "node.key"))
            assert read_kit(made_kits / member).upstream.name == name
            assert read_kit(made_kits / member).upstream.port == read_kit(made_kits / name).server.port


def test_what_all_must_agree_on_is_the_same_in_all(made_kits: Path) -> None:
    kits = [read_kit(made_kits / name) for name in NAMES]
    assert len({k.file.fleet for k in kits}) == len({k.job_hash for k in kits}) == len({k.task for k in kits}) == 1
    assert kits[0].file.fleet == (made_kits / "fleet.id").read_text().strip()


def test_the_data_are_those_of_the_local_engine_in_the_same_order(made_kits: Path) -> None:
    job = read_kit(made_kits / "cloud").job
    fleet = fleet_of(job)
    names = {c: [d.device_id for d in members] for c, members in fleet.items()}
    whole = share_out(load_samples(job), job.data, names, job.seed)
    expected: dict[str, Split] = {"cloud": whole.public, **whole.edges, **whole.devices}
    assert set(expected) == NAMES
    for name, split in expected.items():
        found = load_data(read_kit(made_kits / name), 0.3, ("device", name))
        for part in ("train", "validation", "test"):
            ours, theirs = getattr(split, part), getattr(found, part)
            assert torch.equal(ours.labels, theirs.labels), (name, part)
            assert torch.equal(ours.inputs[:], theirs.inputs[:]), (name, part)
            assert ours.label_names == theirs.label_names


def test_attributes_are_those_of_the_local_engine(made_kits: Path) -> None:
    for members in fleet_of(read_kit(made_kits / "cloud").job).values():
        for device in members:
            assert read_kit(made_kits / device.device_id).attributes(0) == device


def test_made_again_everything_is_new_but_what_is_not_ours_stays(
    kits: Path, tmp_path: Path, tiny: dict[str, Any], fleet: dict[str, Any], write: Any
) -> None:
    before = (kits / "fleet.id").read_text()
    key = (kits / "small-1" / "node.key").read_bytes()
    made = provision(write(tmp_path, tiny, fleet), kits, split_data=True, anew=True)
    assert made.fleet == (kits / "fleet.id").read_text().strip() != before.strip()
    assert (kits / "small-1" / "node.key").read_bytes() != key
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not made by this command"):
        provision(tmp_path / "FLEET.toml", tmp_path / "mine", split_data=True)
    assert (tmp_path / "mine" / "letter.txt").exists()


def test_kits_that_are_at_work_are_not_replaced(
    kits: Path, tmp_path: Path, tiny: dict[str, Any], fleet: Any, write: Any
) -> None:
    path = write(tmp_path, tiny, fleet)
    with hold(kits / "small-2"), pytest.raises(ValueError, match="small-2 is running; stop it"):
        provision(path, kits, split_data=True, anew=True)


def test_data_are_named_or_split_but_not_both(tmp_path: Path, tiny: dict[str, Any], fleet: Any, write: Any) -> None:
    path = write(tmp_path, tiny, fleet)
    with pytest.raises(ValueError, match=r"cloud\.data must be given: .*--split-data"):
        provision(path, tmp_path / "kits")
    path = write(tmp_path, tiny, fleet | {"cloud": {"data": "x"}})
    with pytest.raises(ValueError, match=r"cloud\.data must be left out with --split-data"):
        provision(path, tmp_path / "kits", split_data=True)
    assert not (tmp_path / "kits").exists()


def photos(kit: Path, folder: Path) -> None:
    """A kit's digits as pictures that a person would have: white is 255."""
    from datasets import Dataset
    from PIL import Image

    folder.mkdir()
    for path in (kit / "data").glob("*.parquet"):
        rows = Dataset.from_parquet(str(path))
        images = [Image.fromarray(np.asarray(image) * 15) for image in rows["image"]]
        data = {"image": images, "label": rows["label"]}
        Dataset.from_dict(data, features=rows.features).to_parquet(str(folder / path.name))


def test_each_may_name_its_own_data(kits: Path, tmp_path: Path, tiny: dict[str, Any], write: Any) -> None:
    photos(kits / "cloud", tmp_path / "public")
    fields = {
        "job": "job.toml",
        "cloud": {"data": "public"},
        "edges": [{"name": "large", "data": "/srv/shared", "devices": [{"name": "large-1", "data": "photos"}]}],
    }
    provision(write(tmp_path, tiny, fields), tmp_path / "own")
    sources = {n: tomllib.loads((tmp_path / "own" / n / "kit.toml").read_text())["data"] for n in ("cloud", "large")}
    assert sources["cloud"] == {"source": str(tmp_path / "public"), "cut": "own"}
    assert sources["large"] == {"source": "/srv/shared", "cut": "own"}
    assert read_kit(tmp_path / "own" / "large-1").data_source == "photos"
    assert not (tmp_path / "own" / "large-1" / "data").exists()
    photos(kits / "large-1", tmp_path / "own" / "large-1" / "photos")
    kit = read_kit(tmp_path / "own" / "large-1")
    data = load_data(kit, 0.3, ("device", "large-1"))
    assert min(len(data.train), len(data.validation), len(data.test)) > 0


def test_insecure_is_for_this_machine_only(tmp_path: Path, tiny: dict[str, Any], write: Any) -> None:
    far = {"job": "job.toml", "edges": [{"name": "large", "address": "10.0.0.2"}]}
    with pytest.raises(ValueError, match=r"edges\.0\.address must be a loopback address with --insecure"):
        provision(write(tmp_path, tiny, far), tmp_path / "kits", split_data=True, insecure=True)
    near = {"job": "job.toml", "edges": [{"name": "large"}]}
    provision(write(tmp_path, tiny, near), tmp_path / "kits", split_data=True, insecure=True)
    kit = read_kit(tmp_path / "kits" / "large")
    assert kit.file.insecure
    assert not kit.server_key.exists()
