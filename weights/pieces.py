"""Token ids to text one at a time, as the tokenizer's own decoder does it for all of them at once.

A function made here takes one id after another, and returns the text that each adds: its *piece*. A
token that only begins a character adds nothing; the one that ends it adds it whole.
"""

import codecs
import re
from collections.abc import Callable, Iterable

from weights.folder import shown

BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells a lone byte
WINDOW = 16  # tokens: more that add nothing are forgotten


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes every byte as a printable character: which one stands for which.

    >>> byte_alphabet()["A"], byte_alphabet()["Ġ"]  # Ġ is a space, the 33rd unprintable byte
    (65, 32)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = byte_alphabet()


def byte_level(token: str) -> bytes:
    """The bytes of a token of byte-level BPE. One that is not in the alphabet is text.

    >>> byte_level("Ġcat"), byte_level("two words")
    (b' cat', b'two words')
    """
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()


def sentence_piece(token: str) -> bytes:
    """The bytes of a token of SentencePiece.

    >>> sentence_piece("▁cat"), sentence_piece("<0xC3>")
    (b' cat', b'\\xc3')
    """
    if byte := BYTE.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace("▁", " ").encode()


def joined(bytes_of: Callable[[int], bytes], without_space: bool) -> Callable[[int], str]:
    """Where the text is the bytes of its tokens; `without_space`: but for a first space."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    begun = not without_space

    def piece(index: int) -> str:
        nonlocal begun
        text = decode(bytes_of(index))
        if text and not begun:
            text, begun = text.removeprefix(" "), True
        return text

    return piece


def windowed(decode: Callable[[list], str], before: Iterable[int] = ()) -> Callable[[int], str]:
    """Where a token's text depends on its neighbours: `decode` makes text of the last ids, once
    with the latest and once without. `before` are ids that the text goes on from."""
    ids, n_said = [*before], len([*before])

    def piece(index: int) -> str:
        nonlocal ids, n_said
        ids.append(index)
        text, said = decode(ids), decode(ids[:n_said]) if n_said else ""
        if text.endswith("\ufffd") and len(ids) - n_said < 4:  # a character has 4 bytes at most
            return ""
        # What is not valid UTF-8 can change what was said before.
        added = text[len(said):] if text.startswith(said) else decode(ids[n_said:])
        if added or len(ids) > WINDOW:
            ids, n_said = ids[n_said:], len(ids) - n_said
        return added

    return piece


STREAMED = ("ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "BPEDecoder",
            "WordPiece")


def steps_of(decoder: dict | None) -> list[dict]:
    """The steps of a decoder of `tokenizer.json`, those of a sequence one by one. ValueError if one
    changes the end of a text, which may have been printed."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in steps_of(part)]
    if decoder["type"] not in STREAMED or decoder.get("stop"):
        raise ValueError(f"the decoder {shown(decoder)} cannot write one token after another")
    return [decoder]


SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
FIRST_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def is_byte_level(steps: list[dict]) -> bool:
    return [step["type"] for step in steps] in (["ByteLevel"], ["ByteLevel", "Fuse"])


def is_sentence_piece(steps: list[dict]) -> bool:
    """As Llama 2 and Mistral have it; a first space may be the text's own."""
    return (steps[:1] == [SPACES] and [step["type"] for step in steps[1:3]] ==
            ["ByteFallback", "Fuse"] and steps[3:] in ([], [FIRST_SPACE]))
