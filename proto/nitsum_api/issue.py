"""X.509 for nitsum's parts: one CA, short-lived leaf certificates that carry a role."""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nitsum_api.security import Identity, dns_name


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def new_ca(now: datetime | None = None, days: int = 3650) -> dict[str, bytes]:
    """`{"tls.crt", "tls.key"}` of a fresh CA."""
    now = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name("nitsum CA"))
        .issuer_name(_name("nitsum CA"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return {"tls.crt": certificate.public_bytes(serialization.Encoding.PEM), "tls.key": _pem(key)}


def issue(
    ca: dict[str, bytes], who: Identity, extra_dns: tuple[str, ...] = (), now: datetime | None = None, hours: float = 24 * 30
) -> dict[str, bytes]:
    """`{"ca.crt", "tls.crt", "tls.key"}` for one process. Valid from five minutes ago, for clocks that differ."""
    assert not [n for n in extra_dns if n.endswith(".nitsum.internal") or "/" in n], f"{extra_dns} would prove another role"
    now = now or datetime.now(UTC)
    ca_certificate = x509.load_pem_x509_certificate(ca["tls.crt"])
    ca_key = serialization.load_pem_private_key(ca["tls.key"], None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.DNSName(n) for n in (dns_name(who.role), *extra_dns)]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(f"{who.role}/{who.name}"))
        .issuer_name(ca_certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + timedelta(hours=hours)) - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=hours))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([*names, x509.UniformResourceIdentifier(who.uri)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return {"ca.crt": ca["tls.crt"], "tls.crt": certificate.public_bytes(serialization.Encoding.PEM), "tls.key": _pem(key)}


def expires_at(certificate_pem: bytes) -> datetime:
    return x509.load_pem_x509_certificate(certificate_pem).not_valid_after_utc
