"""Text to token ids and back: the prompt in the chat template, special tokens, stop tokens."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import cycle
from pathlib import Path

from weights.folder import find, plain, read_optional, shown
from weights.template import render
from weights.token_settings import CONTROL, MOST_ID, read_settings
from weights.vocabulary import HuggingFaceTokens, SentencePieceTokens, names_in, one_line_for


# A placeholder is a number in characters that are never assigned, as 16 digits between two edges.
EDGE, PLACES = "\ufde0", "".join(map(chr, range(0xFDD0, 0xFDE0)))
DIGITS = "0123456789abcdef"
TO_PLACE, FROM_PLACE = str.maketrans(DIGITS, PLACES), str.maketrans(PLACES, DIGITS)
PLACE = re.compile(f"{EDGE}([{PLACES}]+){EDGE}")
ANSWER = "⟪answer⟫"  # in place of one, to see what a template puts after it


class Tokenizer:
    """Text to token ids and back, and the model's chat template.

    Special tokens that are spelled in a prompt, like `<|im_end|>`, are ordinary text, unless
    `spelled` is true: otherwise a document could end the user's turn. Those of the template stay.
    """

    def __init__(self, folder: Path, spelled: bool = False):
        """Raises ValueError if `folder` holds no tokenizer, or one that cannot be read."""
        self.folder, self.now, self.spelled = folder, datetime.now(), spelled
        with one_line_for(f"no tokenizer in {folder}"):
            self.load(folder)
        self.find_special()

    def load(self, folder: Path):
        self.settings = read_settings(folder)
        self.chat_template = self.settings.template
        if path := find(folder, "tokenizer.json"):
            self.tokens = HuggingFaceTokens(path, self.settings)
        elif path := find(folder, "tokenizer.model"):
            self.tokens = SentencePieceTokens(path, self.settings)
        else:
            raise ValueError("neither tokenizer.json nor tokenizer.model is there")

    def find_special(self):
        """Which added tokens are special: those that are marked so, those that the settings name or
        number, and those of control that the template writes."""
        added, names = self.tokens.added, {token.content for token in self.settings.special}
        self.special = {index for index, token in added.items()
                        if token.special or token.content in names}
        self.special |= {i for i in self.stop_ids() if i in added or 0 <= i < MOST_ID
                         and CONTROL.match(self.tokens.token_of(i) or "")}
        others = {index: token.content for index, token in added.items()
                  if index not in self.special and CONTROL.match(token.content)}
        written, source = self.written() if others else ("", "")
        self.special |= {index for index, name in others.items() if name in written}
        # What the template writes elsewhere is guarded as well, but in an answer it is text.
        guards = self.special & added.keys() | {i for i, name in others.items() if name in source}
        self.tokens.make_special(guards)
        self.special_names = names_in(added[index] for index in guards)
        self.to_guard = re.compile(f"{self.special_names.pattern}|[{EDGE}{PLACES}]")
        unknown = self.settings.named.get("unk_token")  # which any text may have
        self.guards = guards - {unknown and self.tokens.id_of(unknown.content)}

    def written(self) -> tuple[str, str]:
        """What the template writes of a conversation, and all of the template."""
        source = self.chat_template if isinstance(self.chat_template, str) else ""
        for turns in [("?", ANSWER, "?"), ("?",)] if source else []:
            with suppress(ValueError):  # some templates have one turn only
                return self.render_chat(*turns), source
        return "", source

    def encode(self, text: str, add_bos: bool, spelled: bool = True) -> list[int]:
        """Token ids of a text. Unless `spelled`, the names of special tokens in it are text."""
        ids = self.tokens.encode(text, spelled) if spelled else self.plain_ids(text)
        before, after = self.tokens.around
        return [*before, *ids, *after] if add_bos else ids

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of text, whatever it spells. Where a model finds the name of a special token
        among its own pieces, also of text that it normalises, the name is encoded in halves."""
        ids = self.tokens.encode(text, spelled=False)
        if self.guards.isdisjoint(ids) or len(text) < 2:
            return ids
        parts = [part for part in self.special_names.split(text) if part]
        half = len(text) // 2
        parts = parts if len(parts) > 1 else [text[:half], text[half:]]
        return [index for part in parts for index in self.plain_ids(part)]

    def render_chat(self, *turns: str) -> str:
        """The turns of user and model, and the beginning of the model's next. ValueError if it
        fails."""
        if isinstance(self.chat_template, dict):
            raise ValueError(f"{self.folder} has chat templates for"
                             f" {', '.join(map(plain, self.chat_template))}, and no default one:"
                             " --raw reads the text without")
        values = {
            "messages": [{"role": role, "content": turn}
                         for role, turn in zip(cycle(("user", "assistant")), turns)],
            "add_generation_prompt": True, "tools": None, "documents": None,
            **{name: token.content for name, token in self.settings.named.items()}}
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
        ids = [] if names else self.encode(text, add_bos=False)
        # A tokenizer that normalises text can find more than the template wrote.
        if ids and sum(i in self.guards for i in ids) <= len(self.special_names.findall(text)):
            return ids
        if len(PLACE.findall(text)) < len(names):
            raise ValueError("the model's chat template changes the special tokens that the text"
                             f" spells, such as {shown(names[0])}")
        ids = []
        for i, part in enumerate(self.special_names.split(text)):  # every second is the template's
            part = PLACE.sub(lambda found: names[int(found[1].translate(FROM_PLACE), 16)], part)
            ids += self.encode(part, add_bos=False, spelled=i % 2 == 1) if part else []
        return ids

    def stop_tokens(self) -> set[int]:
        """The ids that end an answer, wherever the folder's files name them."""
        eos = self.settings.named.get("eos_token")
        index = self.tokens.id_of(eos.content) if eos else None
        return self.stop_ids() | ({index} - {None})

    def stop_ids(self) -> set[int]:
        """Those that the files name by number."""
        stop = set()
        for file in ("config.json", "generation_config.json"):
            ids = read_optional(self.folder, file).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(type(index) is int for index in ids):
                raise ValueError(f"{self.folder / file}: eos_token_id {shown(ids)} is not an"
                                 " integer or a list of integers")
            stop |= set(ids)
        return stop

    def detokenizer(self, before: Sequence[int] = ()) -> Callable[[int], str]:
        """A function from one token id after another to its piece, the text that it adds.

        A token that only begins a character adds nothing; the one that ends it adds it whole. A
        special token reads as a paragraph break, so that no sentence crosses it. `before` are ids
        that the text goes on from: without any, it has no space before its first word.
        """
        stream = self.tokens.stream([index for index in before if index not in self.special])

        def piece(index: int) -> str:
            nonlocal stream
            if index in self.special:
                stream = self.tokens.stream(())
                return "\n\n"
            return stream(index)

        return piece

    def pieces(self, ids: list[int]) -> list[str]:
        return list(map(self.detokenizer(), ids))
