"""Command ``agentcluster credentials``: a CA and the certificates of a cluster's processes, as files in a folder."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agentcluster.errors import ConfigError
from agentcluster.security import ROLES, written_aside

#: Days for which the CA's certificate is valid, at least.
CA_DAYS = 3650

AFTER = """
{folder} is for this machine and its clusters: AgentCluster(security={folder!r}).
A host with agents needs ca.pem, worker.pem and worker.key (dask-agent --credentials DIR), one with `dask scheduler`
ca.pem, scheduler.pem and scheduler.key. ca.key makes certificates: it stays here, and --renew needs it.
"""


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False))
@click.option("--days", default=365, show_default=True, type=click.IntRange(1, CA_DAYS), help="Validity in days.")
@click.option("--renew", is_flag=True, help="Make new certificates from the CA that is in the folder.")
def credentials(folder: str, days: int, renew: bool) -> None:
    """Write a CA and certificates for scheduler, agents and clients to the folder DIR.

    All files have mode 0600. Processes that have a certificate of one CA trust each other alone.
    """
    try:
        if not folder.strip():
            raise ConfigError(f"DIR {folder!r} is the name of no folder; give one, such as ./certificates")
        written = write(Path(folder), days, renew=renew)
    except (ConfigError, OSError) as error:
        click.echo(f"agentcluster credentials: {error}", err=True)
        sys.exit(2)
    for path, expiry in written.items():
        click.echo(f"{click.format_filename(path)}  expires {expiry:%Y-%m-%d}")
    click.echo(AFTER.format(folder=click.format_filename(folder)), nl=False)


def write(folder: Path, days: int, *, renew: bool = False, now: datetime | None = None) -> Mapping[Path, datetime]:
    """Write a CA, and a certificate and its key for each role.

    Parameters
    ----------
    folder
        Folder of the files; made with mode 0700 where there is none.
    days
        Validity of the certificates, in days.
    renew
        Take the CA that is there, whose own certificate is made anew only when it would expire too early.
    now
        Begin of the validity; default is the current time.

    Returns
    -------
    dict
        Path of a certificate -> its expiry.

    Raises
    ------
    ConfigError
        When there are credentials already, or with `renew` no CA.
    OSError
        When the files cannot be written.
    """
    now = now or datetime.now(UTC)
    ends = now + timedelta(days=days)
    ca_file, key_file = folder / "ca.pem", folder / "ca.key"
    if not renew and any((folder / name).exists() for name in ("ca.pem", "ca.key", *_files())):
        raise ConfigError(f"{folder} has credentials already; --renew makes new certificates from their CA")
    if renew and not (ca_file.exists() and key_file.exists()):
        raise ConfigError(
            f"{folder} has no CA (ca.pem and ca.key) to renew certificates from; make one without --renew"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if renew:
        key, ca = _load(key_file, ca_file)
        if ca.not_valid_after_utc < ends:
            ca = _certificate(ca.subject, key, None, key, now, now + timedelta(days=max(days, CA_DAYS)))
            _put(ca_file, ca.public_bytes(serialization.Encoding.PEM))
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"agentcluster CA {secrets.token_hex(4)}")  # two CAs are told from each other
        ca = _certificate(name, key, None, key, now, now + timedelta(days=max(days, CA_DAYS)))
        _put(key_file, _pem(key))
        _put(ca_file, ca.public_bytes(serialization.Encoding.PEM))
    written = {ca_file: ca.not_valid_after_utc}
    for role in ROLES:
        own = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(_name(f"agentcluster {role}"), own, ca, key, now, ends)
        _put(folder / f"{role}.key", _pem(own))
        _put(folder / f"{role}.pem", certificate.public_bytes(serialization.Encoding.PEM))
        written[folder / f"{role}.pem"] = ends
    return written


def _files() -> list[str]:
    return [f"{role}.{kind}" for role in ROLES for kind in ("pem", "key")]


def _load(key_file: Path, ca_file: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Read a CA."""
    try:
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        ca = x509.load_pem_x509_certificate(ca_file.read_bytes())
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the CA in {ca_file.parent} cannot be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise ConfigError(f"the CA in {ca_file.parent} is not one of this command's: ca.key does not belong to ca.pem")
    return key, ca


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate | None,
    ca_key: ec.EllipticCurvePrivateKey,
    begins: datetime,
    ends: datetime,
) -> x509.Certificate:
    """Make a certificate; that of the CA itself without `ca`."""
    usage = dict.fromkeys(
        ("content_commitment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if ca is None else ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - timedelta(minutes=5))  # clocks differ
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=0 if ca is None else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                **usage,
                digital_signature=ca is not None,
                key_encipherment=False,
                key_cert_sign=ca is None,
                crl_sign=ca is None,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    if ca is not None:  # a process of dask both listens and connects
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(both), critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _put(path: Path, data: bytes) -> None:
    with written_aside(path, data) as aside:
        aside.replace(path)
