"""The tokens of a folder, which are read, found in texts and made text in a process of its own."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import AddedToken

from support.worker import Worker
from weights.folder import find, one_line_for, refuse_large


class RemoteTokens:
    """The `Tokens` of `weights/vocabulary.py`, by the same names."""

    def __init__(self, folder: Path):
        """Raises ValueError if `folder` holds no tokenizer, or one that cannot be read."""
        path = find(folder, "tokenizer.json") or find(folder, "tokenizer.model")
        if path is None:
            raise ValueError("neither tokenizer.json nor tokenizer.model is there")
        refuse_large(path)
        self.worker = Worker("weights.vocabulary", "read_tokens", str(folder.resolve()))
        self.made_special = None  # the arguments of `make_special`
        about = self.worker.call("about")
        self.added = {int(index): AddedToken(**token) for index, token in about["added"].items()}
        self.around = about["around"]

    def call(self, method: str, *args):
        """ValueError in one line if the tokenizer fails, or exceeds a limit."""
        with one_line_for("the model's tokenizer failed"):
            if self.made_special and not self.worker.process:  # it was stopped: a new one is asked
                self.worker.call("make_special", *self.made_special)
            return self.worker.call(method, *args)

    def make_special(self, contents: dict[int, str], unknown: int | None):
        """Have `encode` guard these tokens, id -> content, but for the unknown one."""
        self.made_special = contents, unknown
        self.call("make_special", *self.made_special)

    def id_of(self, content: str) -> int | None:
        return self.call("id_of", content)

    def tokens_of(self, indices: list[int]) -> list[str | None]:
        return self.call("tokens_of", indices)

    def names_in(self, text: str) -> list[str]:
        """The names of guarded tokens in a text."""
        return self.call("names_in", text)

    def split(self, text: str) -> list[str]:
        """The text in parts: every second one is the name of a guarded token."""
        return self.call("split", text)

    def with_places(self, text: str) -> tuple[str, list[str]]:
        """The text with a placeholder for each name of a guarded token, and these names."""
        return self.call("with_places", text)

    def encode(self, text: str, spelled: bool) -> list[int]:
        """Token ids of a text. Unless `spelled`, the names of special tokens in it are text."""
        return self.call("encode", text, spelled)

    def pieces(self, ids: list[int]) -> list[str]:
        """The text that each adds."""
        return self.call("pieces", ids)

    def stream(self, before: Sequence[int]) -> Callable[[int], str]:
        """A function from one id after another to the text that it adds, after those `before`."""
        number = self.call("begin", before)
        return lambda index: self.call("piece", number, index)
