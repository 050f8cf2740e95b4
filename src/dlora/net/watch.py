"""What time and the federation file do to a network that runs: certificates that end, members that
were struck off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dlora.identity.certificates import NEW, concern, validity
from dlora.identity.federation import Federation
from dlora.identity.keys import Identity


class Watch:
    """Looks at certificates and at who is listed; ``tell`` hears in one line of each thing, once
    for each stage of it.
    """

    def __init__(self, identity: Identity, tell: Callable[[str], object]) -> None:
        self._identity, self._tell = identity, tell
        self._told: dict[str, int] = {}  # whose -> the stage told last

    def look(self, federation: Federation, neighbours: Iterable[str]) -> None:
        """Once; to be called again and again."""
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
        """What may be the matter when somebody whom we dial hangs up before a word: TLS tells a
        caller no more than that.
        """
        _, begin, end, here = validity(self._identity.certificate_pem.decode())
        return (
            "it hangs up in the handshake: its federation file lists another certificate for"
            f" {self._identity.name}, or one of the two clocks is wrong: here it is {here}, our"
            f" certificate is valid from {begin} until {end}"
        )

    def _judge(self, name: str, certificates: Iterable[str], whose: str, advice: str) -> None:
        """Report the state of a member's certificates; among several the best one counts."""
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
