"""The entries of a JSON object one by one, in little memory: Python's objects for JSON take 25 times its text.

The parser is Python's own, `json.JSONDecoder.raw_decode`, on one entry at a time, so that a text means what it means to
`json.loads`. Streaming parsers that others keep, as ijson, hold a token of any length, and have their own ways with
duplicates, surrogates and large numbers.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from jax_megamoe.errors import MegaMoEError

# Of one entry, from its name to its value's end, in characters.
MAX_ENTRY = 1 << 18
# What is read at once, at most and at least. What an entry needs is never read much further: all of it may be parsed.
_PIECE_BYTES, _LEAST_BYTES = 1 << 16, 1 << 12

_SPACE = re.compile(r"[ \t\n\r]*")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")


class JsonEntries:
    """Reads an object. Raises `ValueError` for what is no JSON, and for an entry of more than `MAX_ENTRY` characters.

    Args:
      read: gives up to so many bytes, none at the end.
      encoding: "utf-8", or "utf-8-sig" where a mark may come first.
      decoder: how values are made; where its hooks refuse one, by a `MegaMoEError`, that is raised.
    """

    def __init__(
        self, read: Callable[[int], bytes], encoding: str = "utf-8", decoder: json.JSONDecoder | None = None
    ) -> None:
        self._read = read
        self._decode = codecs.getincrementaldecoder(encoding)("surrogatepass").decode  # as json.loads does
        self._scan = (decoder or json.JSONDecoder()).raw_decode
        self._text, self._at, self._is_all = "", 0, False

    def next(self) -> str:
        """The next character that is no white space, without taking it; none at the end."""
        while True:
            self._at = _end_of_space(self._text, self._at)
            if self._at < len(self._text) or self._is_all:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def entries(self, inner: str | None = None) -> Iterator[tuple[str, Any]]:
        """Names and values of the object that begins here.

        The value of an object by the name `inner` is an iterator of its entries, to be used up before the next one.
        No value is kept here when the next one is made: who does not need it should not keep it either.
        """
        if self.next() != "{":
            raise ValueError("no object")
        self._at += 1
        mark = self.next()
        if mark == "}":
            self._at += 1
        while mark != "}":
            name, value, mark = self._entry(inner)
            yield name, value
            del value
            if not mark:
                mark = self.next()
                if mark not in (",", "}"):
                    raise ValueError("no end of an entry")
                self._at += 1

    def _entry(self, inner: str | None) -> tuple[str, Any, str]:
        """Name, value, and the comma or bracket after it, which is taken, too; of `inner`, it is not."""
        while True:
            text = self._text
            try:
                name, end = self._scan(text, self._at)
                if type(name) is str and (colon := _COLON.match(text, end)) is not None:
                    at = colon.end()
                    if name == inner and text.startswith("{", at):
                        self._at = at
                        return name, self.entries(), ""
                    value, end = self._scan(text, at)
                    # What ends at the end of the text may go on: a number.
                    mark = _NEXT.match(text, end)
                    if mark is not None and end - self._at <= MAX_ENTRY:
                        self._at = mark.end()
                        return name, value, mark[1]
                    del value
            except MegaMoEError:
                raise
            except ValueError:  # Wrong, or cut off: what comes next tells.
                pass
            self._read_on()

    def check_end(self) -> None:
        """Raises `ValueError` where anything comes after the object."""
        if self.next():
            raise ValueError("more than an object")

    def _read_on(self) -> None:
        rest = self._text[self._at :]
        if self._is_all or len(rest) > MAX_ENTRY:
            raise ValueError("no entry")
        # Twice as much each time: all tries cost two.
        count = min(max(_PIECE_BYTES, len(rest)), max(_LEAST_BYTES, MAX_ENTRY - len(rest)))
        octets = self._read(count)
        self._is_all = not octets
        self._text = rest + self._decode(octets, self._is_all)
        self._at = _end_of_space(self._text, 0)


def _end_of_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()
