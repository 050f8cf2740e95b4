"""Reports certificates that expire and members that leave the federation file during a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dlora.identity.certificates import NEW, concern, validity
from dlora.identity.federation import Federation
from dlora.identity.keys import Identity


class Watch:
    """Checks certificates and the list of members.

    ``tell`` is called with one line when a member's state becomes worse, once for each stage.
    """

    def __init__(self, identity: Identity, tell: Callable[[str], object]) -> None:
        self._identity, self._tell = identity, tell
        self._told: dict[str, int] = {}  # name of the member -> the stage reported last

    def look(self, federation: Federation, neighbours: Iterable[str]) -> None:
        """Check once. Call it regularly."""
        own = self._identity.name
        ours = self._identity.certificate_pem.decode()
        self._judge(
            own,
            [ours],
            f"our certificate, of {own},",
            f"{NEW} {own}, and the others take up its member file",
        )
        for name in neighbours:
            member = federation.members.get(name)
            if member is None:
                self._say(
                    name,
                    100,
                    f"{name} is not in {federation.source} any more: no link with it is made",
                )
            else:
                advice = (
                    f"{name} makes a new one with: dlora identity new {name}; put its member file"
                    f" into {federation.source}"
                )
                self._judge(name, member.certificates, f"the certificate of {name}", advice)

    def hung_up(self) -> str:
        """A text for the case that the other end closes the connection during the TLS handshake.

        TLS gives the caller no reason, so the text names the likely ones.
        """
        _, begin, end, here = validity(self._identity.certificate_pem.decode())
        return (
            "it hangs up in the handshake: its federation file lists another certificate for"
            f" {self._identity.name}, or one of the two clocks is wrong: here it is {here}, our"
            f" certificate is valid from {begin} until {end}"
        )

    def _judge(self, name: str, certificates: Iterable[str], whose: str, advice: str) -> None:
        """Report the state of a member's certificates; the best of them counts."""
        worries = [concern(pem) for pem in certificates]
        if None in worries:
            self._told.pop(name, None)
            return
        stage, text = min(
            (worry for worry in worries if worry is not None), key=lambda worry: abs(worry[0])
        )
        self._say(name, stage, f"{whose} {text}" + (f"; {advice}" if stage > 0 else ""))

    def _say(self, name: str, stage: int, text: str) -> None:
        if self._told.get(name) != stage:
            self._told[name] = stage
            self._tell(text)
