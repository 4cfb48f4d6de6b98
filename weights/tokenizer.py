"""Text to token ids and back: both tokenizer formats, the chat template, the stop tokens."""

import codecs
import json
import re
from collections.abc import Callable
from datetime import datetime
from itertools import cycle
from pathlib import Path

import sentencepiece
import tokenizers

from weights.folder import check, find, one_line, read_optional, shown, text_of
from weights.template import render


# A placeholder is a number in characters that are never assigned, as 16 digits between two edges.
EDGE, PLACES = "\ufde0", "".join(map(chr, range(0xFDD0, 0xFDE0)))
DIGITS = "0123456789abcdef"
TO_PLACE, FROM_PLACE = str.maketrans(DIGITS, PLACES), str.maketrans(PLACES, DIGITS)
PLACE = re.compile(f"{EDGE}([{PLACES}]+){EDGE}")
ANSWER = "⟪answer⟫"  # in place of one, to see what a template puts after it


class HuggingFaceTokens:
    """The tokens of a `tokenizer.json`."""

    def __init__(self, path: Path):
        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.model.no_truncation()  # which a file may have been saved with
        self.model.no_padding()
        added = self.model.get_added_tokens_decoder()
        self.special = {index for index, token in added.items() if token.special}
        self.added = {index: token.content for index, token in added.items()}
        # A special token can take the white space around it.
        space = r"\s*"
        self.patterns = [
            space * token.lstrip + re.escape(token.content) + space * token.rstrip
            for token in added.values() if token.special and token.content]
        self.token_of = self.model.id_to_token
        self.byte_of = byte_alphabet() if "ByteLevel" in repr(self.model.decoder) else None

    def encode(self, text: str, add_bos: bool, spelled: bool = True) -> list[int]:
        self.model.encode_special_tokens = not spelled
        return self.model.encode(text, add_special_tokens=add_bos).ids


class SentencePieceTokens:
    """The tokens of a Llama 2 style `tokenizer.model`."""

    def __init__(self, path: Path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.pieces = dict(enumerate(map(self.model.id_to_piece, range(len(self.model)))))
        added = read_optional(path.parent, "added_tokens.json")
        check(added, dict.fromkeys(added, (0, 2**24)), "added_tokens.json")
        self.pieces |= {index: token for token, index in added.items()}
        self.special = {*filter(self.model.is_control, range(len(self.model))), *added.values()}
        self.added = {}
        self.patterns = [re.escape(self.pieces[i]) for i in self.special if self.pieces[i]]
        self.token_of = self.pieces.get
        self.byte_of = None

    def encode(self, text: str, add_bos: bool, spelled: bool = True) -> list[int]:
        # The library does not look for `<s>` and `</s>` in text, where chat templates put them.
        ids = {self.pieces[i]: i for i in self.special if spelled and self.pieces[i]}
        parts = re.split(f"({'|'.join(map(re.escape, ids))})", text) if ids else [text]
        encoded = [self.model.bos_id()] if add_bos and self.model.bos_id() >= 0 else []
        for part in filter(None, parts):
            encoded += [ids[part]] if part in ids else self.model.encode(part)
        return encoded


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes every byte as a printable character: which one stands for which.

    >>> byte_alphabet()["A"], byte_alphabet()["Ġ"]  # Ġ is a space, the 33rd unprintable byte
    (65, 32)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Text to token ids and back, and the model's chat template.

    Special tokens that are spelled in a prompt, like `<|im_end|>`, are ordinary text, unless
    `spelled` is true: otherwise a document could end the user's turn. Those of the template stay.
    """

    def __init__(self, folder: Path, spelled: bool = False):
        """Raises ValueError if `folder` holds no tokenizer, or one that cannot be read."""
        self.folder, self.now, self.spelled = folder, datetime.now(), spelled
        try:
            self.load(folder)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # one of the two libraries raises it when it panics
            raise ValueError(f"no tokenizer in {folder}: {one_line(error)}") from None

    def load(self, folder: Path):
        if path := find(folder, "tokenizer.json"):
            self.tokens = HuggingFaceTokens(path)
        elif path := find(folder, "tokenizer.model"):
            self.tokens = SentencePieceTokens(path)
        else:
            raise ValueError("neither tokenizer.json nor tokenizer.model is there")
        self.encode = self.tokens.encode
        self.special = self.tokens.special
        longest_first = sorted(self.tokens.patterns, key=len, reverse=True)
        self.special_names = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self.to_guard = re.compile(f"{self.special_names.pattern}|[{EDGE}{PLACES}]")
        settings = read_optional(folder, "tokenizer_config.json")
        # A token is a string here or, in older files, a dict with its content.
        self.special_strings = {
            key: value.get("content", value) if isinstance(value, dict) else value
            for key, value in settings.items() if key.endswith("_token") and value}
        check(self.special_strings, dict.fromkeys(self.special_strings, str),
              "tokenizer_config.json")
        self.chat_template = settings.get("chat_template")
        if isinstance(self.chat_template, list):  # several, by name
            self.chat_template = {item["name"]: item["template"]
                                  for item in self.chat_template}.get("default")
        if path := find(folder, "chat_template.jinja"):
            self.chat_template = text_of(path)
        check({"chat_template": self.chat_template}, {"chat_template": str},
              "tokenizer_config.json")

    def render_chat(self, *turns: str) -> str:
        """The turns of user and model, and the beginning of the model's next. ValueError if it
        fails."""
        values = {
            "messages": [{"role": role, "content": turn}
                         for role, turn in zip(cycle(("user", "assistant")), turns)],
            "add_generation_prompt": True, "tools": None, "documents": None,
            **self.special_strings}
        return render(self.chat_template, json.dumps(values), self.now.isoformat())

    def prompt_ids(self, text: str, raw: bool = False, prefix: str = "") -> list[int]:
        """Token ids of the prompt, and of a `prefix`, the beginning of the model's answer.

        The text goes through the chat template. Without one, and with `raw`, it is encoded as it
        is, with BOS before it. ValueError if no token comes of it.
        """
        if raw or self.chat_template is None:
            text = f"{text} {prefix}" if prefix else text
            ids = self.encode(text, add_bos=True, spelled=self.spelled)
        else:
            text, names = self.guarded(text)
            ids = self.rendered_ids(self.render_chat(text) + prefix, names)
        if not ids:
            raise ValueError("the prompt has no tokens")
        return ids

    def turn_ids(self, question: str) -> list[int]:
        """What comes between an answer and the next: its end, the user's turn, the beginning of the
        model's. ValueError without a chat template that can do it."""
        if self.chat_template is None:
            raise ValueError(f"{self.folder} has no chat template: there can be no second question")
        question, names = self.guarded(question)
        before, answer, after = self.render_chat("?", ANSWER, question).partition(ANSWER)
        if not answer:
            raise ValueError("the model's chat template leaves out its answers")
        return self.rendered_ids(after, names)

    def guarded(self, text: str) -> tuple[str, list]:
        """The text with a placeholder for each special token that it spells, and their names."""
        names = []

        def place(found):
            names.append(found[0])
            return f"{EDGE}{len(names) - 1:x}{EDGE}".translate(TO_PLACE)

        return (text if self.spelled else self.to_guard.sub(place, text)), names

    def rendered_ids(self, text: str, names: list) -> list[int]:
        """Token ids of a template's text. A name that has a placeholder is ordinary text."""
        if not names:
            return self.encode(text, add_bos=False)
        ids = []
        for i, part in enumerate(self.special_names.split(text)):  # every second is the template's
            part = PLACE.sub(lambda found: names[int(found[1].translate(FROM_PLACE), 16)], part)
            ids += self.encode(part, add_bos=False, spelled=i % 2 == 1) if part else []
        return ids

    def stop_tokens(self) -> set[int]:
        """The ids that end an answer, wherever the folder's files name them."""
        name = self.special_strings.get("eos_token")
        stop = {index for index in self.special if self.tokens.token_of(index) == name}
        for file in ("config.json", "generation_config.json"):
            ids = read_optional(self.folder, file).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(type(index) is int for index in ids):
                raise ValueError(f"{self.folder / file}: eos_token_id {shown(ids)} is not an"
                                 " integer or a list of integers")
            stop |= set(ids)
        return stop

    def token_bytes(self, index: int) -> bytes:
        token = self.tokens.added.get(index) or self.tokens.token_of(index) or ""
        if self.tokens.byte_of and index not in self.tokens.added:
            return bytes(self.tokens.byte_of[character] for character in token)
        if byte := re.fullmatch("<0x(..)>", token):  # how sentencepiece spells a lone byte
            return bytes.fromhex(byte[1])
        return token.replace("▁", " ").encode()

    def detokenizer(self) -> Callable[[int], str]:
        """A function from one token id after another to its piece, the text that it adds.

        A token that only begins a character adds nothing; the one that ends it adds it whole. A
        special token reads as a paragraph break, so that no sentence crosses it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def piece(index: int) -> str:
            return "\n\n" if index in self.special else decoder.decode(self.token_bytes(index))

        return piece

    def pieces(self, ids: list[int]) -> list[str]:
        return list(map(self.detokenizer(), ids))
