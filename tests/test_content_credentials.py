"""C2PA manifests of a file: the whole chain, what fails of it, and nothing fetched."""

import datetime
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image
from protoleak.forensics.content_credentials import tell_store, validity_in_words
from protoleak.forensics.provenance import read_provenance, summarise_provenance

from .test_provenance import SOURCE_TYPE, encoded


def make_certificate(valid: float) -> tuple[bytes, bytes]:
    """Certificate chain and private key as c2pa asks for them; the signer's is valid for so many seconds."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root_name, name = (
        x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, n)]) for n in ("Test CA", "Test Signer")
    )
    others = (
        "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
        "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    usage = x509.KeyUsage(digital_signature=True, **dict.fromkeys(others, False))
    now = datetime.datetime.now(datetime.UTC)

    def certificate(subject, public_key, seconds):
        builder = x509.CertificateBuilder(root_name, subject, public_key, x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        return builder.not_valid_after(now + datetime.timedelta(seconds=seconds))

    root = certificate(root_name, root_key.public_key(), 1e6)
    root = root.add_extension(x509.BasicConstraints(True, None), True).sign(root_key, hashes.SHA256())
    own = certificate(name, key.public_key(), valid)
    for extension, critical in (
        (x509.BasicConstraints(False, None), True),
        (usage, True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), True),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), False),
    ):
        own = own.add_extension(extension, critical)
    pem = serialization.Encoding.PEM
    chain = own.sign(root_key, hashes.SHA256()).public_bytes(pem) + root.public_bytes(pem)
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return chain, key.private_bytes(pem, *plain)


@pytest.fixture(scope="module")
def sign():
    """Signs a JPEG file: actions, and the file that they were done to."""
    c2pa = pytest.importorskip("c2pa")

    def sign(actions, parent: bytes | None = None, valid: float = 3600, remote: str | None = None) -> bytes:
        chain, key = make_certificate(valid)
        manifest = {
            "claim_generator_info": [{"name": "An Editor" if parent else "A Generator"}],
            "title": "made",
            "assertions": [{"label": "c2pa.actions", "data": {"actions": actions}}],
        }
        builder = c2pa.Builder(json.dumps(manifest))
        if parent:
            ingredient = {"title": "first", "relationship": "parentOf", "label": "parent"}
            builder.add_ingredient(json.dumps(ingredient), "image/jpeg", io.BytesIO(parent))
        if remote:
            builder.set_remote_url(remote)
            builder.set_no_embed()
        signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", chain, key, None))
        plain, signed = io.BytesIO(encoded(Image.effect_noise((64, 64), 50), "JPEG")), io.BytesIO()
        builder.sign(signer, "image/jpeg", plain, signed)
        return signed.getvalue()

    return sign


CREATED = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": "A Model"}
EDITED = [
    {"action": "c2pa.opened", "parameters": {"ingredientIds": ["parent"]}},
    {"action": "c2pa.converted"},
]


@pytest.fixture(scope="module")
def signed(sign) -> bytes:
    return sign([CREATED])


def test_the_chain_is_walked_to_the_creation_by_a_model(sign, signed):
    """The active manifest says that a file was opened and converted; the model stands in its ingredient."""
    claims = read_provenance(sign(EDITED, parent=sign(EDITED, parent=signed)))
    manifests = claims["c2pa"]["manifests"]
    assert [manifest["actions"] for manifest in manifests] == [["opened", "converted"]] * 2 + [["created"]]
    assert [manifest["relationship"] for manifest in manifests] == [None, "parentOf", "parentOf"]
    assert manifests[2]["agents"] == ["A Model"]
    assert claims["source_types"] == ["trainedAlgorithmicMedia"]
    assert claims["claim"]["origin"] == "generated"
    assert "of an ingredient), C2PA signed by Test Signer" in claims["claim"]["words"]
    assert len([line for line in summarise_provenance(claims) if line.startswith("C2PA manifest")]) == 3


def changed(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_it_is_said_which_kind_of_invalid(sign, signed):
    expired = sign([CREATED], valid=1)

    def validity(content: bytes) -> str:
        return validity_in_words(read_provenance(content)["c2pa"])

    assert validity(signed) == "content and signature hold, but issuer not trusted"
    assert validity(changed(signed, len(signed) - 40)).startswith("content changed after signing")
    assert validity(changed(signed, signed.index(b"trainedAlg"))).startswith("manifest changed after signing")
    signature = signed.rindex(b"\xf6\x58\x40")  # 64 bytes in CBOR, after a payload that is null
    assert "signature broken" in validity(changed(signed, signature + 20))
    until = time.monotonic() + 20
    while "expired" not in validity(expired) and time.monotonic() < until:
        time.sleep(0.2)
    assert validity(expired) == "content and signature hold, but certificate expired and issuer not trusted"


def test_a_code_that_is_not_known_is_told_as_it_is():
    store = {
        "active_manifest": "a",
        "manifests": {"a": {"ingredients": [{"active_manifest": "a"}, {"active_manifest": "gone"}, {}]}},
        "validation_status": [{"code": "signingCredential.untrusted"}, {"code": "something.new"}],
    }
    told = tell_store(store)
    assert len(told["manifests"]) == 1
    assert validity_in_words(told) == "something.new and issuer not trusted"


def test_a_manifest_elsewhere_is_not_fetched(sign):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802 (http.server's name)
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        content = sign([CREATED], remote=f"http://127.0.0.1:{server.server_port}/manifest.c2pa")
        claims = read_provenance(content)
    finally:
        server.shutdown()
    assert asked == []
    assert "kept elsewhere and was not fetched" in claims["c2pa"]["note"]
    assert "/manifest.c2pa" in claims["xmp"]["provenance"]


def test_a_broken_manifest_does_no_harm(signed):
    start = signed.index(b"jumb")
    for at in range(start, start + 300, 13):
        claims = read_provenance(changed(signed, at))["c2pa"]
        assert claims is None or "note" in claims or claims["problems"]
