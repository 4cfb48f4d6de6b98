"""The prompts of a run: one text, with each question after it; whether the model has room for them,
and the parts in which a long one is read."""


class Prompts:
    """One text, and the questions about it: a single "" if there are none."""

    def __init__(self, tokenizer, read, args):
        """`read` is the text of a file, or a Document that was read before."""
        self.tokenizer, self.text, self.raw = tokenizer, read, args.raw
        if not isinstance(read, str):
            self.text, tokenizer.now = read.text, read.now  # some chat templates print the date
        self.questions = [clean(question) for question in args.ask] or [""]

    def ids(self, question: str = "") -> list[int]:
        """Token ids of the text with a question after it, in the model's chat template."""
        text = f"{self.text}\n\n{question}" if question else self.text
        return self.tokenizer.prompt_ids(text, self.raw)

    def shared_prefix(self) -> list[int]:
        """The tokens that the prompts of all questions begin with. The prompt without a question
        begins with them too, and has at least one more: every prompt leaves a token to read."""
        without, with_question = self.ids()[:-1], self.ids("?")
        n_shared = 0
        for a, b in zip(without, with_question):
            if a != b:
                break
            n_shared += 1
        return without[:n_shared]

    def check(self, max_new_tokens: int, chat: bool, model_config) -> int:
        """The most tokens that a cache has to hold, prompt and answer. ValueError for a prompt that
        the model cannot read, and for a model that cannot hold a conversation in a `chat`."""
        if chat:
            self.tokenizer.turn_ids("?")  # raises the ValueError
        prompts = [self.ids(question) for question in self.questions]
        for ids in prompts:
            check_prompt(ids, 0, 1 if chat else max_new_tokens, model_config)
        if chat:  # it goes on for as long as there are positions
            return model_config.max_position_embeddings
        return max(map(len, prompts)) + max_new_tokens


def check_prompt(ids: list[int], n_before: int, n_new: int, model_config):
    """Raises ValueError if `n_before` tokens leave no room for the prompt and `n_new` tokens after
    it, or if a token has no embedding."""
    check_positions(n_before + len(ids), n_new, model_config)
    if max(ids) >= model_config.vocab_size:
        raise ValueError(f"the prompt has token {max(ids)}, the vocabulary of the model"
                         f" {model_config.vocab_size}")


def check_positions(n_prompt: int, n_new: int, model_config):
    """Raises ValueError if prompt and new tokens exceed the model's positions."""
    needed, positions = n_prompt + n_new, model_config.max_position_embeddings
    if needed > positions:
        raise ValueError(f"{n_prompt} prompt tokens + {n_new} new ones = {needed}, and the model"
                         f" has {positions} positions: shorten one or the other")


def clean(text: str) -> str:
    """Replace lone surrogates: a command line can hold bytes that are not UTF-8."""
    return text.encode(errors="replace").decode()


def split_at_sentences(spans: list, size: int) -> list[int]:
    """Where to split a text into parts of at most `size` tokens. A longer sentence is one part.

    >>> split_at_sentences([(0, 3), (3, 4), (4, 9), (9, 10)], size=4)
    [4, 9]
    """
    starts = [0]
    for start, end in spans:
        if end - starts[-1] > size and start > starts[-1]:
            starts.append(start)
    return starts[1:]
