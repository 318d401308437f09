"""Keys and certificates of one fleet: its own authority, server certificates, and the keys that members prove.

Keys are of the curve P-384, as Flower's nodes want them. Files are PEM; a member's private key is in OpenSSH's format.
"""

import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SLACK = timedelta(hours=1)  # a clock that is late must not find a certificate that is not yet valid
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Authority:
    """Who signs the certificates of one fleet.

    Attributes:
        key: Its private key; whoever has it can pass for any server of the fleet.
        certificate: What all members trust.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as a file."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key as a file."""
        return _key_pem(self.key)


def make_authority(fleet: str, days: int) -> Authority:
    """An authority for one fleet, valid for so many days."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"fleetfit fleet {fleet}")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return Authority(key, certificate)


def read_authority(folder: Path) -> Authority:
    """An authority from its folder.

    Raises:
        ValueError: its key or certificate is damaged, or they do not belong together.
        OSError: they cannot be read.
    """
    certificate = read_certificate(folder / "ca.pem")
    try:
        key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except ValueError as error:
        raise ValueError(f"{folder / 'ca.key'} is no private key that can be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError(f"{folder / 'ca.key'} is not the key of ca.pem beside it")
    return Authority(key, certificate)


def make_server(authority: Authority, name: str, addresses: Sequence[str], days: int) -> tuple[bytes, bytes]:
    """A server's certificate and private key, as files.

    Args:
        authority: Who signs.
        name: The participant's.
        addresses: Host names and IP addresses that it is reached by; those of its own machine are added.
        days: How long it is valid; never longer than the authority.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    names = x509.SubjectAlternativeName([_general_name(a) for a in dict.fromkeys((*addresses, *LOCAL_NAMES))])
    certificate = (
        _builder(_name(name), authority.certificate.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
        .sign(authority.key, hashes.SHA384())
    )
    return certificate.public_bytes(Encoding.PEM), _key_pem(key)


def make_member_key() -> tuple[bytes, str]:
    """A member's private key as a file in OpenSSH's format, and its public key as one line."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def read_member_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A member's private key.

    Raises:
        ValueError: the file is no such key.
        OSError: it cannot be read.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except ValueError as error:
        raise ValueError(f"{path} is no private key that can be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError(f"{path} must be an ECDSA key of the curve P-384")
    return key


def public_line(key: ec.EllipticCurvePrivateKey) -> str:
    """The public key of a private one, as one line."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def public_pem(line: str) -> bytes:
    """A public key as Flower registers it, from its line.

    Raises:
        ValueError: the line is no such key.
    """
    return _public(line).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """A member's signature."""
    return key.sign(content, ec.ECDSA(hashes.SHA384()))


def is_signed(line: str, signature: bytes, content: bytes) -> bool:
    """Whether the owner of a public key signed this."""
    try:
        _public(line).verify(signature, content, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate.

    Raises:
        ValueError: the file is none.
        OSError: it cannot be read.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no certificate that can be read: {error}") from None


def client_context(ca_file: Path) -> ssl.SSLContext:
    """TLS that trusts one authority and nobody else.

    Raises:
        ValueError: the file holds no certificate.
        OSError: it cannot be read.
    """
    read_certificate(ca_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=ca_file)
    return context


def _public(line: str) -> ec.EllipticCurvePublicKey:
    try:
        key = load_ssh_public_key(line.encode())
    except ValueError as error:
        raise ValueError(f"{line[:40]!r} is no public key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(f"{line[:40]!r} must be an ECDSA key")
    return key


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
