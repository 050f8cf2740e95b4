"""With whom there may be a link now, and with which certificates."""

from __future__ import annotations

from collections.abc import Sequence

from dlora.identity.federation import FederationFile
from dlora.identity.keys import Identity


class Partners:
    """The members that this participant links with, as its federation file now lists them.

    ``neighbours`` are dialled where they have an address; None makes a cloud, which dials nobody
    and lets in whoever has the role device.
    """

    def __init__(
        self, identity: Identity, federation: FederationFile, neighbours: Sequence[str] | None
    ) -> None:
        self.identity, self.federation = identity, federation
        self.is_cloud, self.dialled = neighbours is None, tuple(neighbours or ())

    @property
    def names(self) -> tuple[str, ...]:
        """With whom there can be a link now."""
        members = self.federation.current.members.values() if self.is_cloud else ()
        return self.dialled + tuple(member.name for member in members if member.role == "device")

    def trusted(self, name: str) -> bytes:
        """The certificates of whom a link may be with; nothing for others."""
        federation = self.federation.current
        member = federation.members.get(name)
        if member is None or (self.is_cloud and member.role != "device"):
            return b""
        return federation.trusted([name])

    def roots(self) -> bytes:
        """The certificates of all. Never empty, which gRPC refuses: our own certificate lets nobody
        in, because we are not our neighbour.
        """
        return b"".join(map(self.trusted, self.names)) or self.identity.certificate_pem

    def refusal(self, name: str, certificate_der: bytes) -> str | None:
        """Why whoever shows this certificate in this name gets no link; None where it gets one."""
        own = self.identity.name
        if name not in self.names:
            wanted = "device in the federation file" if self.is_cloud else "neighbour"
            return f"{name!r} is not a {wanted} of {own}"
        if not self.federation.current.is_listed(name, certificate_der):
            return f"not a certificate that {own}'s federation file lists for {name}"
        return None
