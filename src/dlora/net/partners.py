"""Which members may have a link with this participant now, and with which certificates."""

from __future__ import annotations

from collections.abc import Sequence

from dlora.identity.federation import FederationFile
from dlora.identity.keys import Identity


class Partners:
    """The members that may have a link with this participant, read from its federation file.

    ``neighbours`` are dialled if they have an address. None makes a cloud, which dials no one and
    accepts every member with the role device.
    """

    def __init__(
        self, identity: Identity, federation: FederationFile, neighbours: Sequence[str] | None
    ) -> None:
        self.identity, self.federation = identity, federation
        self.is_cloud, self.dialled = neighbours is None, tuple(neighbours or ())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the members that may have a link now."""
        members = self.federation.current.members.values() if self.is_cloud else ()
        return self.dialled + tuple(member.name for member in members if member.role == "device")

    def trusted(self, name: str) -> bytes:
        """The member's certificates (PEM) if it may have a link, else empty bytes."""
        federation = self.federation.current
        member = federation.members.get(name)
        if member is None or (self.is_cloud and member.role != "device"):
            return b""
        return federation.trusted([name])

    def roots(self) -> bytes:
        """The certificates (PEM) of all members that may have a link.

        gRPC refuses an empty list, so the result is then this participant's own certificate. No one
        gets a link with it, because this participant is not its own neighbour.
        """
        return b"".join(map(self.trusted, self.names)) or self.identity.certificate_pem

    def refusal(self, name: str, certificate_der: bytes) -> str | None:
        """Why a caller with this name and certificate gets no link; None if it gets one."""
        own = self.identity.name
        if name not in self.names:
            wanted = "device in the federation file" if self.is_cloud else "neighbour"
            return f"{name!r} is not a {wanted} of {own}"
        if not self.federation.current.is_listed(name, certificate_der):
            return f"not a certificate that {own}'s federation file lists for {name}"
        return None
