"""The corpus: the language reference that comes with every Python installation, as symbol ids."""

import dataclasses

import numpy as np

# Fixed rather than collected from the text, so that a checkpoint still fits when another Python brings other topics.
VOCABULARY = "\n" + "".join(chr(code) for code in range(32, 127))

# The few typographic characters of the topics; whatever else is not in the vocabulary becomes "?".
_TO_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})
_INDEX = {character: index for index, character in enumerate(VOCABULARY)}


class TextError(ValueError):
    """The text cannot be used: no corpus in this installation, or a character that the vocabulary lacks."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Symbol ids, int32[N] each: what the model is trained on, and what it is measured on and never sees before."""

    train: np.ndarray
    held_out: np.ndarray


def encode(text: str) -> np.ndarray:
    """Symbol ids int32[len(text)] of a text; `TextError` names the first character outside the vocabulary."""
    for position, character in enumerate(text):
        if character not in _INDEX:
            raise TextError(
                f"The text has {character!r} at position {position}, and the model knows only newline and printable "
                f"ASCII: leave it out or spell it in ASCII."
            )
    return np.array([_INDEX[character] for character in text], np.int32)


def decode(ids: np.ndarray) -> str:
    """The text of symbol ids int[N], each in [0, len(VOCABULARY))."""
    return "".join(VOCABULARY[int(index)] for index in ids)


def load_corpus(held_out_fraction: float = 0.1) -> Corpus:
    """Reads the topics of `pydoc` and splits off the last part; `TextError` where the installation has none."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError(
            "This Python has no pydoc_data.topics, which the demo reads: install the full standard library."
        ) from error
    # Many topics quote whole passages of others, some indented or wrapped otherwise. Each paragraph is kept once, or
    # the held-out part would largely be text that was trained on, and its bits per character would measure memory.
    paragraphs: dict[str, str] = {}
    for paragraph in "\n\n".join(topics.values()).split("\n\n"):
        words = " ".join(paragraph.split())
        if words:
            paragraphs.setdefault(words, paragraph.strip("\n"))
    text = "\n\n".join(paragraphs.values()).translate(_TO_ASCII)
    ids = encode("".join(character if character in _INDEX else "?" for character in text))
    split = len(ids) - int(len(ids) * held_out_fraction)
    return Corpus(train=ids[:split], held_out=ids[split:])
