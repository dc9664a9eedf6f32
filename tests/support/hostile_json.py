"""Checkpoint files that mean harm to whoever parses their JSON: as many small things as there is room for."""

import itertools
import string
from collections.abc import Callable, Iterator

_LETTERS = string.ascii_letters + string.digits + "!#$%&'()*+,-./:;<=>?@[]^_`{|}~"
EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def _names() -> Iterator[str]:
    """Short ones, all different."""
    return map("".join, itertools.chain.from_iterable(itertools.product(_LETTERS, repeat=n) for n in range(1, 9)))


def _filled(size: int, pieces: Iterator[str]) -> str:
    """An object of so many of these entries as fit into so many bytes."""
    held, left = [], size - 2
    for piece in pieces:
        left -= len(piece.encode("utf-8", "surrogatepass")) + 1
        if left < 0:
            break
        held.append(piece)
    return "{" + ",".join(held) + "}"


def _stuffed(size: int, piece: str, close: str = "") -> str:
    """So many of these as fit."""
    count = (size - len(close)) // len(piece.encode("utf-8", "surrogatepass"))
    return piece * count + close


def _listed(size: int, piece: str) -> str:
    """A list of so many of these as fit."""
    return "[" + _stuffed(size - 2, piece + ",", piece) + "]"


# Of so many bytes, or a few less: what may stand for an entry's value, or for a file.
VALUES: dict[str, Callable[[int], str]] = {
    "empty lists": lambda size: _listed(size, "[]"),
    "empty objects": lambda size: _listed(size, "{}"),
    "small objects": lambda size: _listed(size, '{"":0}'),
    "numbers": lambda size: _listed(size, "1"),
    "large numbers": lambda size: _listed(size, "1" * 4000),
    "numbers too large": lambda size: _listed(size, "1" * 5000),
    "one number": lambda size: "1" * size,
    "floats": lambda size: _listed(size, "1e9"),
    "strings": lambda size: _listed(size, '"ab"'),
    "strings of other letters": lambda size: _listed(size, '"\u0416"'),
    "escapes": lambda size: _listed(size, '"\\u0000"'),
    "halves of pairs": lambda size: _listed(size, '"\\ud800"'),
    "one string": lambda size: '"' + "a" * (size - 2) + '"',
    "one string of escapes": lambda size: '"' + "\\u0416" * ((size - 2) // 6) + '"',
    "one wide string": lambda size: '"' + "a" * (size - 6) + '\U0001f600"',
    "nested lists": lambda size: "[" * (size // 2) + "]" * (size // 2),
    "nested objects": lambda size: '{"a":' * (size // 6) + "1" + "}" * (size // 6),
    "open brackets": lambda size: "[" * size,
    "spaces": lambda size: " " * (size - 2) + "{}",
    "keys": lambda size: _filled(size, (f'"{name}":0' for name in _names())),
    "one key": lambda size: _filled(size, itertools.repeat('"a":0')),
}


def _header(pieces: Callable[[int], Iterator[str]]) -> Callable[[int], str]:
    return lambda size: _filled(size, pieces(size))


# The largest objects for their text, and what keeps most: all of an entry that fits.
_SMALL = VALUES["small objects"](262_100)
_WIDE = [chr(0x1F000 + at) for at in range(200)]
_METADATA = (
    "{" + ",".join(f'"{a}{b}":"{a}"' for a, b in itertools.islice(itertools.product(_WIDE, repeat=2), 29_000)) + "}"
)
# Of entries that are too long, too, no more than one that fits is ever parsed.
_LARGE = ("empty lists", "empty objects", "small objects", "keys")


def _tensor(name: str, fields: str = EMPTY) -> str:
    return f'"{name}":{fields}'


# A header of so many bytes.
HEADERS: dict[str, Callable[[int], str]] = {
    "small tensors": _header(lambda _: map(_tensor, _names())),
    "spaced tensors": _header(lambda _: (_tensor(name) + " " * 50 for name in _names())),
    "the same tensor": _header(lambda _: itertools.repeat(_tensor("abc"))),
    "wrong tensors": _header(lambda _: (_tensor(name, "0") for name in _names())),
    "tensors without a file": _header(
        lambda _: (
            _tensor(name, f'{{"dtype":"U8","shape":[1],"data_offsets":[{at},{at + 1}]}}')
            for at, name in enumerate(_names())
        )
    ),
    "long names": _header(lambda size: (_tensor(str(at) + "n" * 100_000) for at in range(size))),
    "names of other letters": _header(lambda size: (_tensor(str(at) + "\u0416" * 10_000) for at in range(size))),
    "names of escapes": _header(lambda size: (_tensor(str(at) + "\\u0416" * 10_000) for at in range(size))),
    "experts": _header(
        lambda size: (
            _tensor(f"model.layers.{at // 3 % 9000}.mlp.experts.{at // 27000}.{('gate', 'up', 'down')[at % 3]}_proj.weight")
            for at in range(size)
        )
    ),
    "experts of one layer": _header(
        lambda size: (
            _tensor(f"model.layers.1.mlp.experts.{at // 3}.{('gate', 'up', 'down')[at % 3]}_proj.weight") for at in range(size)
        )
    ),
    "sizes": lambda size: "{" + _tensor("a", EMPTY.replace("[0]", _listed(size - 60, "1"))) + "}",
    "space": lambda size: "{" + " " * (size - 60) + _tensor("a") + "}",
    "space at the end": lambda size: "{" + _tensor("a") + "}" + " " * (size - 60),
    "space in an entry": lambda size: '{"a":' + " " * (size - 60) + EMPTY + "}",
    "metadata": lambda size: '{"__metadata__":'
    + _filled(size - 20, (f'"{name}":"x"' for name in _names()))
    + "}",
    "metadata that fits": lambda size: '{"__metadata__":'
    + _filled(min(size, 260_000) - 20, (f'"{name}":"x"' for name in _names()))
    + "}",
    **{
        f"an entry of {name}": lambda size, make=value: '{"a":' + make(min(size, 260_000) - 6) + "}"  # type: ignore[misc]
        for name, value in VALUES.items()
    },
    "large metadata": lambda _: f'{{"__metadata__":{_METADATA}}}',
    "large metadata and an entry": lambda _: f'{{"__metadata__":{_METADATA},"a":{_SMALL}}}',
    **{
        f"too long an entry of {name}": lambda size, make=VALUES[name]: '{"a":' + make(520_000) + "}"  # type: ignore[misc]
        for name in _LARGE
    },
    **VALUES,
}  # fmt: skip


def index_of(entries: str) -> str:
    return '{"metadata":{},"weight_map":' + entries + "}"


# An index of so many bytes, beside a file one.safetensors with the tensor "a".
INDICES: dict[str, Callable[[int], str]] = {
    "the same tensor": lambda size: index_of(_filled(size - 40, itertools.repeat('"a":"one.safetensors"'))),
    "tensors that are missing": lambda size: index_of(
        _filled(size - 40, (f'"{name}":"one.safetensors"' for name in _names()))
    ),
    "files that are missing": lambda size: index_of(
        _filled(size - 40, (f'"{name}":"{name}"' for name in _names() if "/" not in name))
    ),
    "maps": lambda size: _filled(size, itertools.repeat('"weight_map":{}')),
    "fields": lambda size: _filled(size, (f'"{name}":[]' for name in _names())),
    "large fields": lambda _: f'{{"y":{_SMALL},"z":{_SMALL},"weight_map":{{"a":"one.safetensors"}}}}',
    **{
        f"a large field of which {cut} is cut off": lambda _, cut=cut: '{"y":' + _SMALL + " " * (262_144 - 5 - len(_SMALL) + cut) + "}"  # type: ignore[misc]
        for cut in (0, 1)
    },
    **{
        f"too large a field of {name}": lambda _, make=VALUES[name]: '{"y":' + make(520_000) + "}"  # type: ignore[misc]
        for name in _LARGE
    },
    "a long name": lambda size: index_of('{"' + "a" * (size - 60) + '":"one.safetensors"}'),
    **VALUES,
}  # fmt: skip


def file_of(header: str, data: bytes = b"") -> bytes:
    """A safetensors file."""
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def valid(size: int) -> bytes:
    """A whole file of so many empty tensors as fit: what is kept of them counts, too."""
    return file_of(HEADERS["small tensors"](size))
