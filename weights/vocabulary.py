"""The tokens of a `tokenizer.json` or a `tokenizer.model`, each with what is added to them.

Both have the same methods. An *added* token is found in a text before the rest of it is split. The
name of one that is special is found only if `encode` is told that it is `spelled`.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import sentencepiece
import tokenizers

from weights.folder import one_line, plain, shown
from weights.pieces import (FIRST_SPACE, byte_level, is_byte_level, is_sentence_piece, joined,
                            sentence_piece, steps_of, windowed)
from weights.token_settings import TokenSettings


class HuggingFaceTokens:
    """The tokens of a `tokenizer.json`."""

    def __init__(self, path: Path, settings: TokenSettings):
        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.model.no_truncation()  # which a file may have been saved with
        self.model.no_padding()
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

    def make_special(self, indices: set[int]):
        tokens = [self.added[index] for index in indices if not self.added[index].special]
        for token in tokens:
            token.special = True
        self.model.add_special_tokens(tokens)

    def encode(self, text: str, spelled: bool) -> list[int]:
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
        with one_line_for("the decoder of tokenizer.json"):
            return self.model.decode(ids, skip_special_tokens=False)


class SentencePieceTokens:
    """The tokens of a Llama 2 style `tokenizer.model`."""

    def __init__(self, path: Path, settings: TokenSettings):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        pieces = list(map(self.model.id_to_piece, range(len(self.model))))
        ids = dict(zip(pieces, range(len(pieces))))
        control = set(filter(self.model.is_control, range(len(pieces))))
        self.added = {index: tokenizers.AddedToken(pieces[index]) for index in control}
        self.added |= {ids[token.content]: token for token in settings.special_in(ids.get)}
        self.added |= settings.added
        for index in control:
            self.added[index].special = True
        self.pieces = dict(enumerate(pieces)) | {i: t.content for i, t in self.added.items()}
        self.token_of = self.pieces.get
        self.id_of = (ids | {token.content: index for index, token in self.added.items()}).get
        self.around = self.around_a_text(settings)
        # Whether it puts a space before each text.
        self.strips = "".join(self.model.encode("a", out_type=str)).startswith("▁")
        self.special = set()

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

    def make_special(self, indices: set[int]):
        self.special = indices

    def encode(self, text: str, spelled: bool) -> list[int]:
        # The library does not look for added tokens and those of control, which templates write.
        tokens = [token for index, token in self.added.items()
                  if token.content and (spelled or index not in self.special)]
        encoded = []
        for i, part in enumerate(names_in(tokens).split(text)):
            index = self.id_of(part, self.id_of(part.strip())) if i % 2 else None
            encoded += self.model.encode(part) if index is None else [index]
        return encoded

    def stream(self, before: Sequence[int]) -> Callable[[int], str]:
        return joined(self.bytes_of, self.strips and not before)

    def bytes_of(self, index: int) -> bytes:
        return sentence_piece(self.token_of(index) or "")


def names_in(tokens: Iterable) -> re.Pattern:
    """What finds them in a text. A token can take the white space around it."""
    space = r"\s*"
    patterns = [space * token.lstrip + re.escape(token.content) + space * token.rstrip
                for token in tokens if token.content]
    return re.compile(f"({'|'.join(sorted(patterns, key=len, reverse=True)) or '(?!)'})")


@contextmanager
def one_line_for(what: str):
    """What a library raises in here is a ValueError of one line, also when it panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {one_line(error)}") from None
