"""The tokens of a `tokenizer.json` or a `tokenizer.model`, each with what is added to them.

Both have the same methods. An *added* token is found in a text before the rest of it is split. The
name of one that is special is found only if `encode` is told that it is `spelled`. All this runs in
a process of its own (`support/worker.py`), to which `weights/tokenizer.py` talks.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers

from weights.folder import find, plain, shown
from weights.names import EDGE, PLACES, Names, with_places
from weights.pieces import (FIRST_SPACE, byte_level, is_byte_level, is_sentence_piece, joined,
                            sentence_piece, steps_of, windowed)
from weights.token_settings import CONTROL, TokenSettings, read_settings

MOST_PIECE = 2**12  # characters of a token
MOST_STREAMS = 64  # texts that can go on


def read_tokens(folder: str):
    """ValueError if `folder` holds no tokenizer, or one that cannot be read."""
    folder = Path(folder)
    settings = read_settings(folder)
    if path := find(folder, "tokenizer.json"):
        return HuggingFaceTokens(path, settings)
    return SentencePieceTokens(find(folder, "tokenizer.model"), settings)


class Tokens:
    """What both kinds share. Each sets `added` (id -> token), `around` (the ids that are put before
    and after each text) and `token_of`, and has `find(text, spelled)` and `stream(before)`."""

    def __init__(self):
        self.streams, self.n_streams = {}, 0

    def about(self) -> dict:
        return {"added": {index: token.__getstate__() for index, token in self.added.items()},
                "around": self.around}

    def make_special(self, contents: dict, unknown: int | None):
        """Have `encode` guard these tokens, id -> content, but for the unknown one."""
        contents = {int(index): content for index, content in contents.items()}
        added = {index: tokenizers.AddedToken(content) for index, content in contents.items()}
        self.added = added | self.added
        self.guarded = [self.added[index] for index in contents]
        self.names, self.special = Names(self.guarded), contents.keys() - {unknown}
        others = map(tokenizers.AddedToken, EDGE + PLACES)
        self.to_replace = Names([*self.guarded, *others])

    def tokens_of(self, indices: list[int]) -> list[str | None]:
        return list(map(self.token_of, indices))

    def names_in(self, text: str) -> list[str]:
        """The names of guarded tokens in a text."""
        return [name for _, name in self.names.find(text)]

    def split(self, text: str) -> list[str]:
        """The text in parts: every second one is the name of a guarded token."""
        return self.names.split(text)

    def with_places(self, text: str) -> tuple[str, list[str]]:
        """The text with a placeholder for each name of a guarded token, and these names."""
        return with_places(text, self.to_replace)

    def encode(self, text: str, spelled: bool) -> list[int]:
        """Token ids of a text. Unless `spelled`, none of them is special.

        Where a model finds the name of a special token among its own pieces, also of text that it
        normalises, the name is encoded in halves. ValueError if a single character becomes one of
        control.
        """
        ids = self.find(text, spelled)
        if spelled or self.special.isdisjoint(ids):
            return ids
        if len(text) < 2:
            if any(CONTROL.match(self.added[i].content) for i in self.special.intersection(ids)):
                raise ValueError(f"{shown(text)} in a text becomes a special token")
            return ids  # a word or a full stop that is named for padding, for example
        parts = [part for part in self.names.split(text) if part]
        half = len(text) // 2
        parts = parts if len(parts) > 1 else [text[:half], text[half:]]
        return [index for part in parts for index in self.encode(part, False)]

    def begin(self, before: list[int]) -> list[int]:
        """Begin a text that goes on from these ids. Returns what `piece` knows it by. Only the
        latest texts can go on."""
        self.n_streams += 1
        self.streams.pop(self.n_streams - MOST_STREAMS, None)
        self.streams[self.n_streams] = self.stream(before)
        return [os.getpid(), self.n_streams]

    def piece(self, number: list, index: int) -> str:
        """The text that a token adds to one that was begun."""
        process, n = number
        if process != os.getpid() or n not in self.streams:
            raise ValueError("it was stopped in the middle of a text")
        return checked(self.streams[n](index))

    def pieces(self, ids: list[int]) -> list[str]:
        """Those of a whole text."""
        stream = self.stream(())
        return [checked(stream(index)) for index in ids]


class HuggingFaceTokens(Tokens):
    """The tokens of a `tokenizer.json`."""

    def __init__(self, path: Path, settings: TokenSettings):
        super().__init__()
        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.model.no_truncation()  # which a file may have been saved with
        self.model.no_padding()
        for index in range(self.model.get_vocab_size()):
            checked(self.model.id_to_token(index) or "")
        self.token_of, self.id_of = self.model.id_to_token, self.model.token_to_id
        self.add_tokens(settings)
        self.added = self.model.get_added_tokens_decoder()
        self.around = self.around_a_text()
        decoder = self.model.decoder
        steps = steps_of(json.loads(decoder.__getstate__()) if decoder else None)
        self.bytes_of = (self.byte_level if is_byte_level(steps) else
                         self.sentence_piece if is_sentence_piece(steps) else None)
        self.strips = FIRST_SPACE in steps

    def add_tokens(self, settings: TokenSettings):
        """Those that the files beside it add, and those of its vocabulary that they name."""
        known = {token.content for token in self.model.get_added_tokens_decoder().values()}
        new = {index: token for index, token in sorted(settings.added.items())
               if token.content not in known | {""}}
        self.model.add_tokens([*new.values()])
        for index, token in new.items():
            if (own := self.id_of(token.content)) != index:
                raise ValueError(f"the added token {plain(token.content)} has id {index}, and"
                                 f" {shown(own)} after those of tokenizer.json")
        self.model.add_special_tokens([token for token in settings.special_in(self.id_of)
                                       if token.content not in known])

    def around_a_text(self) -> tuple[list, list]:
        """The ids that are put before and after each text. Flags beside `tokenizer.json` change
        nothing in it, as in transformers."""
        encoded = self.model.encode("a")
        mask = encoded.special_tokens_mask  # 1 for those
        n = mask.index(0) if 0 in mask else len(mask)
        n_after = mask[::-1].index(0) if 0 in mask else 0
        return encoded.ids[:n], encoded.ids[len(mask) - n_after :]

    def make_special(self, contents: dict, unknown: int | None):
        super().make_special(contents, unknown)
        tokens = [token for token in self.guarded if not token.special]
        for token in tokens:
            token.special = True
        self.model.add_special_tokens(tokens)

    def find(self, text: str, spelled: bool) -> list[int]:
        self.model.encode_special_tokens = not spelled
        return self.model.encode(text, add_special_tokens=False).ids

    def stream(self, before: Sequence[int]) -> Callable[[int], str]:
        if self.bytes_of:
            return joined(self.bytes_of, self.strips and not before)
        return windowed(self.decode, before)

    def byte_level(self, index: int) -> bytes:
        if index in self.added:
            return self.added[index].content.encode()
        return byte_level(self.token_of(index) or "")

    def sentence_piece(self, index: int) -> bytes:
        return sentence_piece(self.token_of(index) or "")

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


class SentencePieceTokens(Tokens):
    """The tokens of a Llama 2 style `tokenizer.model`."""

    def __init__(self, path: Path, settings: TokenSettings):
        import sentencepiece  # takes as long as all other imports here

        super().__init__()
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        pieces = list(map(checked, map(self.model.id_to_piece, range(len(self.model)))))
        ids = dict(zip(pieces, range(len(pieces))))
        control = set(filter(self.model.is_control, range(len(pieces))))
        self.added = {index: tokenizers.AddedToken(pieces[index]) for index in control}
        self.added |= {ids[token.content]: token for token in settings.special_in(ids.get)}
        self.added |= settings.added
        for index in control:
            self.added[index].special = True
        self.texts = dict(enumerate(pieces)) | {i: t.content for i, t in self.added.items()}
        self.token_of = self.texts.get
        self.id_of = (ids | {token.content: index for index, token in self.added.items()}).get
        self.around = self.around_a_text(settings)
        # Whether it puts a space before each text.
        self.strips = "".join(self.model.encode("a", out_type=str)).startswith("▁")

    def around_a_text(self, settings: TokenSettings) -> tuple[list, list]:
        """The ids before and after each text, as the flags say it; without any, BOS alone."""
        own = {"bos_token": self.model.bos_id(), "eos_token": self.model.eos_id()}
        around = []
        for name, usual in (("bos_token", own["bos_token"] >= 0), ("eos_token", False)):
            token = settings.named.get(name)
            index = own[name] if token is None else self.id_of(token.content, own[name])
            wanted = settings.flags.get(f"add_{name}", usual) and index >= 0
            around.append([index] if wanted else [])
        return tuple(around)

    def make_special(self, contents: dict, unknown: int | None):
        super().make_special(contents, unknown)
        # The library does not look for added tokens and those of control, which templates write.
        self.all_names = Names(self.added.values())
        self.others = Names(token for token in self.added.values()
                            if token.content not in contents.values())

    def find(self, text: str, spelled: bool) -> list[int]:
        encoded = []
        for i, part in enumerate((self.all_names if spelled else self.others).split(text)):
            encoded += [self.id_of(part)] if i % 2 else self.model.encode(part)
        return encoded

    def stream(self, before: Sequence[int]) -> Callable[[int], str]:
        return joined(self.bytes_of, self.strips and not before)

    def bytes_of(self, index: int) -> bytes:
        return sentence_piece(self.token_of(index) or "")


def checked(text: str) -> str:
    """ValueError for a token that would make a long text of a few ids."""
    if len(text) > MOST_PIECE:
        raise ValueError(f"a token has {len(text)} characters, at most {MOST_PIECE} are read")
    return text
