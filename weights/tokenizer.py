"""Text to token ids and back: the prompt in the chat template, special tokens, stop tokens."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import cycle, groupby
from pathlib import Path

from tokenizers import AddedToken

from weights import template
from weights.folder import one_line_for, plain, read_optional, shown
from weights.names import PLACE, without_places
from weights.token_settings import CONTROL, MOST_ID, read_settings
from weights.tokens import RemoteTokens

ANSWER = "⟪answer⟫"  # in place of one, to see what a template puts after it


class Tokenizer:
    """Text to token ids and back, and the model's chat template.

    Special tokens that are spelled in a prompt, like `<|im_end|>`, are ordinary text, unless
    `spelled` is true: otherwise a document could end the user's turn. Those of the template stay.
    """

    def __init__(self, folder: Path, spelled: bool = False):
        """Raises ValueError if `folder` holds no tokenizer, or one that cannot be read."""
        self.folder, self.now, self.spelled = folder, datetime.now(), spelled
        with one_line_for(f"cannot read the tokenizer of {folder}"):
            self.settings = read_settings(folder)
            self.chat_template = self.settings.template
            if self.chat_template:
                template.WORKER.start()  # while the tokens are read
            self.tokens = RemoteTokens(folder)
        self.find_special()

    def find_special(self):
        """Which tokens are special: added ones that are marked so, those that the settings name or
        number, and those of control that the template writes."""
        added, names = self.tokens.added, {token.content for token in self.settings.special}
        stop = self.stop_ids()
        not_added = [index for index in stop - added.keys() if 0 <= index < MOST_ID]
        for index, name in zip(not_added, self.tokens.tokens_of(not_added)):
            if CONTROL.match(name or ""):
                added[index] = AddedToken(name)
        self.special = {index for index, token in added.items()
                        if token.special or token.content in names or index in stop}
        others = {index: token.content for index, token in added.items()
                  if index not in self.special and CONTROL.match(token.content)}
        written, source = self.written() if others else ("", "")
        self.special |= {index for index, name in others.items() if name in written}
        # What the template writes elsewhere is guarded as well, but in an answer it is text.
        elsewhere = {index for index, name in others.items() if name in source}
        self.guard(self.special | elsewhere, self.unknown_id(stop, names))

    def unknown_id(self, stop: set[int], names: set[str]) -> int | None:
        """The token that stands for any text. One that also ends an answer, or that the settings
        name for something else, is guarded as these are."""
        unknown = self.settings.named.get("unk_token")
        if unknown is None or unknown.content in names:
            return None
        index = self.tokens.id_of(unknown.content)
        return None if index in stop else index

    def guard(self, indices: set[int], unknown: int | None):
        """Have no text spell these tokens, but for the unknown one."""
        tokens, self.unknown = self.tokens.added, unknown
        self.tokens.make_special({index: tokens[index].content for index in indices}, unknown)
        self.guards = {tokens[index].content: index for index in indices - {unknown}}
        self.other, _ = self.tokens.with_places("?")  # a text that spells none of them

    def written(self) -> tuple[str, str]:
        """What the template writes of a conversation, and all of the template."""
        source = self.chat_template if isinstance(self.chat_template, str) else ""
        for turns in [("?", ANSWER, "?"), ("?",)] if source else []:
            with suppress(ValueError):  # some templates have one turn only
                return self.render_chat(*turns), source
        return "", source

    def encode(self, text: str, add_bos: bool, spelled: bool = True) -> list[int]:
        """Token ids of a text. Unless `spelled`, the names of special tokens in it are text."""
        before, after = self.tokens.around
        ids = self.tokens.encode(text, spelled)
        return [*before, *ids, *after] if add_bos else ids

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
        return template.render(self.chat_template, json.dumps(values), self.now.isoformat())

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
            usual, text = (self.render_chat(turn) + prefix for turn in (self.other, text))
            ids = self.rendered_ids(text, names, usual)
        if not ids:
            raise ValueError("the prompt has no tokens")
        return ids

    def turn_ids(self, question: str) -> list[int]:
        """What comes between an answer and the next: its end, the user's turn, the beginning of the
        model's. ValueError without a chat template that can do it."""
        if self.chat_template is None:
            raise ValueError(f"{self.folder} has no chat template: there can be no second question")
        question, names = self.guarded(question)
        usual, after = (self.render_chat("?", ANSWER, turn).partition(ANSWER)[2]
                        for turn in (self.other, question))
        if not after:
            raise ValueError("the model's chat template leaves out its answers")
        return self.rendered_ids(after, names, usual)

    def guarded(self, text: str) -> tuple[str, list]:
        """The text with a placeholder for each special token that it spells, and their names."""
        return (text, []) if self.spelled else self.tokens.with_places(text)

    def rendered_ids(self, text: str, names: list, usual: str) -> list[int]:
        """Token ids of a template's text. A name that has a placeholder is ordinary text. `usual`
        is what the template makes of other words: a template can write names with a user's text."""
        written, as_usual = map(self.tokens.names_in, (text, usual))
        if written != as_usual and not self.spelled:
            raise ValueError("the model's chat template makes special tokens of this text: "
                             + shown(written))
        ids = [] if names else self.encode(text, add_bos=False)
        special, expected = {*self.guards.values()}, map(self.guards.get, written)
        # A tokenizer that normalises text can find more than the template wrote.
        if ids and [i for i in ids if i in special] == [i for i in expected if i is not None]:
            return ids
        if len(PLACE.findall(text)) < len(names):
            raise ValueError("the model's chat template changes the special tokens that the text"
                             f" spells, such as {shown(names[0])}")
        ids = []
        for i, part in enumerate(self.tokens.split(text)):
            if i % 2:  # a name that the template writes
                ids.append(self.guards.get(part, self.unknown))
            elif part:
                ids += self.encode(without_places(part, names), add_bos=False, spelled=False)
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
        """The text that each token adds."""
        pieces = []
        for special, run in groupby(ids, self.special.__contains__):
            run = list(run)
            pieces += ["\n\n"] * len(run) if special else self.tokens.pieces(run)
        return pieces
