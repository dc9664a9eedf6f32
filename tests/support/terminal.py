"""A stream that says that it is a terminal."""

import io


class Terminal(io.StringIO):
    """Keeps what is written to it."""

    def isatty(self) -> bool:
        """As those say whose lines are redrawn."""
        return True

    def last_drawn(self) -> str:
        """The line as it stands at the end."""
        return self.getvalue().rstrip("\n").split("\r")[-1]
