"""Keys and certificates with gRPC itself: who gets a link and who does not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dlora.identity.federation import Federation, federation_text
from dlora.identity.keys import Identity
from kit.identities import certificate_of, renew, write


class Answers(grpc.GenericRpcHandler):
    """Every call is answered with the certificate that the caller presented."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: context.auth_context()["x509_pem_cert"][0]
        )


def serve(own: Identity, federation: Federation, names: list[str]) -> tuple[grpc.Server, int]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Answers()])
    pair = [(own.key_pem, own.certificate_pem)]
    credentials = grpc.ssl_server_credentials(
        pair, federation.trusted(names), require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return server, port


@pytest.fixture
def bob_listens(work: Path) -> Iterator[tuple[int, Federation]]:
    """The port of bob, who trusts the old and the new certificate of anna, and that federation."""
    with pytest.warns(UserWarning):
        text = federation_text(["federation.yaml", renew()])
    federation = Federation.load(write("both.yaml", text))
    server, port = serve(Identity.load("bob", "bob.key", federation), federation, ["anna"])
    yield port, federation
    server.stop(None).wait()


def ask(port: int, key: str, certificate: str, roots: bytes, target: str) -> str:
    """The certificate that the one at ``port`` saw, when ``target`` is proved to be there."""
    credentials = grpc.ssl_channel_credentials(roots, key.encode(), certificate.encode())
    options = [("grpc.ssl_target_name_override", target)]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/a/b")
        return ask(b"", timeout=10).decode()


@pytest.mark.parametrize("key", ["anna.key", "new/anna.key"])
def test_grpc_takes_the_old_and_the_new_key_both_ways(
    key: str, bob_listens: tuple[int, Federation]
) -> None:
    port, federation = bob_listens
    anna = Identity.load("anna", key, federation)
    proof = anna.key_pem.decode(), anna.certificate_pem.decode()
    assert ask(port, *proof, federation.trusted(["bob"]), "bob") == proof[1]
    server, port_of_anna = serve(anna, federation, ["bob"])
    bob = Identity.load("bob", "bob.key", federation)
    ask(
        port_of_anna,
        bob.key_pem.decode(),
        bob.certificate_pem.decode(),
        federation.trusted(["anna"]),
        "anna",
    )
    server.stop(None).wait()


def test_grpc_refuses_strangers_and_other_names(
    bob_listens: tuple[int, Federation], made: dict[str, tuple[str, str]]
) -> None:
    port, federation = bob_listens
    anna = Identity.load("anna", "anna.key", federation)
    proof = anna.key_pem.decode(), anna.certificate_pem.decode()
    for key, certificate, trusted, target in (
        (made["dave"][0], certificate_of(made["dave"][1]), "bob", "bob"),  # a stranger dials
        # a member that is no neighbour dials
        (made["carol"][0], certificate_of(made["carol"][1]), "bob", "bob"),
        (*proof, "carol", "carol"),  # who listens is not who was meant
        (*proof, "bob", "carol"),
        (*signed_by_anna(made), "bob", "bob"),  # a neighbour signs in another's name
    ):
        with pytest.raises(grpc.RpcError) as caught:
            ask(port, key, certificate, federation.trusted([trusted]), target)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert ask(port, *proof, federation.trusted(["bob"]), "bob")  # and bob still serves


def signed_by_anna(made: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """A fresh key, and a certificate in bob's name that anna's key signed, with anna's behind
    it.
    """
    signer = serialization.load_pem_private_key(made["anna"][0].encode(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    issuer, subject = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("anna", "bob")
    )
    number, end = x509.random_serial_number(), now + timedelta(days=1)
    builder = x509.CertificateBuilder(
        issuer, subject, key.public_key(), number, now - timedelta(days=1), end
    )
    signed = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("bob")]), False).sign(
        signer, hashes.SHA256()
    )
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    chain = signed.public_bytes(serialization.Encoding.PEM).decode() + certificate_of(
        made["anna"][1]
    )
    return key.private_bytes(serialization.Encoding.PEM, *plain).decode(), chain
