"""Which of the rival's processes one is. Imports neither JAX nor torch."""

import socket
from typing import NamedTuple


class Place(NamedTuple):
    """A process among those that run the rival together, one for each GPU, and the port at which they meet."""

    rank: int
    ranks: int
    port: int

    @classmethod
    def alone(cls) -> "Place":
        """That of the only process."""
        return cls(0, 1, free_port())

    @classmethod
    def all_of(cls, ranks: int) -> "list[Place]":
        """Those of a group."""
        port = free_port()
        return [cls(rank, ranks, port) for rank in range(ranks)]

    @classmethod
    def parse(cls, text: str) -> "Place":
        """A place from its text."""
        return cls(*map(int, text.split(",")))

    def __str__(self) -> str:
        return f"{self.rank},{self.ranks},{self.port}"


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
