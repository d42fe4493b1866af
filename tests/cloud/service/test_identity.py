"""The certificate authority, the signing key, and files with secrets."""

from __future__ import annotations

import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from service_harness import signing_request
from wearfleet_cloud.fleet.identity import DEVICE_DAYS, Authority, device_id_for, key_hash
from wearfleet_cloud.fleet.private_files import read_private, write_private
from wearfleet_cloud.fleet.signing import SigningKeys
from wearfleet_protos.errors import ConfigError, IntegrityError
from wearfleet_protos.topics import check_name

NOW = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)


def leaf_of(chain_pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificates(chain_pem)[0]


def test_a_device_certificate_names_the_device_and_its_tenant_and_nothing_of_the_request(tmp_path):
    authority = Authority(tmp_path)
    csr = signing_request(ec.generate_private_key(ec.SECP256R1()), "wearfleet-service")
    issued = authority.issue(csr, "anna-0001", "default", NOW)
    leaf = leaf_of(issued.chain_pem)
    names = {part.oid._name: part.value for part in leaf.subject}
    assert names == {"commonName": "anna-0001", "organizationName": "default"}
    assert leaf.not_valid_after_utc - NOW == dt.timedelta(days=DEVICE_DAYS)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    leaf.verify_directly_issued_by(x509.load_der_x509_certificate(authority.ca_der))


def test_the_authority_is_the_same_after_a_restart_and_its_keys_are_private(tmp_path):
    first = Authority(tmp_path)
    assert Authority(tmp_path).ca_der == first.ca_der
    first.server_files((), NOW)
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_the_server_certificate_is_kept_until_hosts_change_or_it_runs_out(tmp_path):
    authority = Authority(tmp_path)
    files = authority.server_files(("fleet.example",), NOW)
    first = files.certificate.read_bytes()
    authority.server_files(("fleet.example",), NOW + dt.timedelta(days=100))
    assert files.certificate.read_bytes() == first
    authority.server_files(("other.example", "10.0.0.7"), NOW)
    second = files.certificate.read_bytes()
    names = leaf_of(second).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "other.example" in names.get_values_for_type(x509.DNSName)
    authority.server_files(("other.example", "10.0.0.7"), NOW + dt.timedelta(days=380))
    assert files.certificate.read_bytes() != second


@pytest.mark.parametrize("csr", [b"", b"junk", b"\x30" * 9000])
def test_a_request_that_is_none_is_refused(tmp_path, csr):
    with pytest.raises(IntegrityError, match="signing request"):
        Authority(tmp_path).issue(csr, "anna-0001", "default", NOW)


def test_a_request_with_another_kind_of_key_or_a_broken_signature_is_refused(tmp_path):
    authority = Authority(tmp_path)
    with pytest.raises(IntegrityError, match="P-256"):
        authority.issue(signing_request(ec.generate_private_key(ec.SECP384R1())), "a-0001", "default", NOW)
    with pytest.raises(IntegrityError, match="P-256"):
        authority.issue(signing_request(rsa.generate_private_key(65537, 2048)), "a-0001", "default", NOW)
    good = signing_request(ec.generate_private_key(ec.SECP256R1()), "name")
    with pytest.raises(IntegrityError):
        authority.issue(good.replace(b"name", b"game"), "a-0001", "default", NOW)


def test_the_hash_of_a_key_does_not_depend_on_the_request(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    assert key_hash(signing_request(key, "a")) == key_hash(signing_request(key, "b"))
    assert key_hash(signing_request(key)) != key_hash(
        signing_request(ec.generate_private_key(ec.SECP256R1()))
    )


@pytest.mark.parametrize("name", ["anna", "a" * 59, "a-" * 29 + "a"])
def test_device_ids_are_valid_names_that_differ(name):
    ids = {device_id_for(name) for _ in range(20)}
    assert len(ids) > 1
    for device_id in ids:
        check_name(device_id, "device")


def test_a_secret_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "keys" / "secret"
    write_private(path, b"x")
    assert read_private(path) == b"x"
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_private(path)


def test_a_damaged_key_is_a_clear_error(tmp_path):
    write_private(tmp_path / "signing.key", b"not a key")
    with pytest.raises(ConfigError, match="damaged"):
        SigningKeys(tmp_path)
    Authority(tmp_path)
    write_private(tmp_path / "ca.key", b"not a key")
    with pytest.raises(ConfigError, match="damaged"):
        Authority(tmp_path)


def test_a_document_that_was_changed_or_signed_by_another_key_is_refused(tmp_path):
    keys, others = SigningKeys(tmp_path / "a"), SigningKeys(tmp_path / "b")
    document = keys.sign(b"payload", "text/x")
    assert SigningKeys(tmp_path / "a").verify(document, "text/x") == b"payload"
    with pytest.raises(IntegrityError, match="changed"):
        keys.verify(document.replace(b"payload", b"pay1oad"), "text/x")
    with pytest.raises(IntegrityError, match="unknown key"):
        others.verify(document, "text/x")
    with pytest.raises(IntegrityError, match="type"):
        keys.verify(document, "text/y")
