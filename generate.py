"""Answer a prompt of several thousand tokens: `python generate.py --prompt file.txt`.

The loop comes first: `prefill`, then `generate`, which decodes token by token. Then a session: it
reads texts and writes answers. `main` joins the other files. This file does not know how a cache
chooses what it keeps. Options, questions, tables and saved documents are in `support/`.
"""

from support import environment  # first of all: torch reads the variables that it sets

if __name__ == "__main__":
    environment.end_at_interrupt()  # Ctrl-C during the imports shows no traceback

import math
import sys
from contextlib import nullcontext
from functools import partial

import torch

from cache import SentenceKVCache
from model import FullCache, LlamaConfig
from segment import SentenceStream, token_spans
from sentencekv import SCORES, SentenceKVConfig
from support import compiled, finite, options, process, questions, report
from support.document import Document, SavedDocument, read_text
from support.prompts import Prompts, check_prompt, split_at_sentences
from support.ranks import RANK, RANKS, join_ranks, leave_ranks
from support.timer import StageTimer, watch_stages
from support.trace import Trace
from weights.checkpoint import fingerprint, load_model, pick_device, pick_dtype
from weights.config import load_config
from weights.models import model_folder
from weights.tokenizer import Tokenizer


def prefill(model, cache, ids: list[int], sample, timer=nullcontext, progress=iter, part_ends=()):
    """Read a text into the cache. Returns the first token after it, which `sample` chooses.

    `part_ends` are those of `Llama.prefill`. `timer` and `progress` do not change the result.
    """
    ids = torch.tensor(ids, device=model.embed_tokens.weight.device)
    with timer("prefill"):
        states = model.prefill(ids, cache, progress, part_ends)  # (T, hidden)
        return sample(model.logits(states[-1:])[0])  # the last state alone predicts the next token


def generate(model, cache, token: int, detokenize, sample, stop: set, max_new_tokens: int,
             sentence_limit: int, timer=nullcontext, decode=None):
    """Yield (token id, piece of text), from the first token to the one that ends the answer.

    `token` comes from `prefill`. `detokenize` is a `Tokenizer.detokenizer()`: the piece is the text
    that a token adds. `sample` is a `sampler(...)`, and `stop` has the tokens that end an answer.
    `decode` can take the place of `model.decode`, as a CUDA graph does.
    """
    sentences = SentenceStream(sentence_limit)
    for count in range(1, max_new_tokens + 1):
        piece = detokenize(token)
        yield token, piece
        if token in stop or count == max_new_tokens:
            return
        with timer("decode"):
            token = sample(next_logits(model, cache, sentences, token, piece, decode))


def next_logits(model, cache, sentences, token: int, piece: str, decode=None) -> torch.Tensor:
    """Seal what ended before the token, then decode it. Returns the logits (V,) of the next one."""
    seal_finished(cache, sentences, piece)
    ids = torch.tensor([token], device=model.embed_tokens.weight.device)
    return model.logits((decode or model.decode)(ids, cache))[0]


def seal_finished(cache, sentences: SentenceStream, piece: str):
    """Seal the sentences that ended before `piece`, whose token is decoded next."""
    for length in sentences.push(piece):
        cache.seal(length)


def make_cache(name: str, config: SentenceKVConfig, model_config: LlamaConfig, max_tokens: int,
               device, dtype):
    """An empty cache with room for `max_tokens`: a FullCache if `name` is "full"."""
    if name == "full":
        return FullCache(model_config, max_tokens, device, dtype)
    return SentenceKVCache(config, model_config, max_tokens, device, dtype)


def sampler(temperature: float, top_p: float, seed: int, device):
    """A function from logits (V,) to a token id: the most likely one, or a sample. It raises
    FloatingPointError if the greatest logit is not finite: `max` returns NaN if there is one."""
    generator = torch.Generator(device).manual_seed(seed)

    def sample(logits) -> int:
        greatest, token = (x.item() for x in logits.max(dim=-1))
        if not math.isfinite(greatest):
            raise FloatingPointError
        if temperature == 0:
            return token
        logits = (logits.float() - greatest) / temperature  # at most 0: none is too large
        probabilities, order = logits.softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities  # of all more likely tokens together
        probabilities[1:][before[1:] >= top_p] = 0  # the most likely one always stays
        return order[probabilities.multinomial(1, generator=generator)].item()

    return sample


class Session:
    """A model and the cache of what it has read: it reads texts, and writes answers after them.

    The first text is a prompt, or a document about which questions are asked. Each question is a
    later text. `args` are the options of the command line, `max_tokens` the most that the cache has
    to hold: all texts and answers.
    """

    def __init__(self, model, tokenizer, config: SentenceKVConfig, args, max_tokens: int):
        self.model, self.tokenizer, self.config, self.args = model, tokenizer, config, args
        self.device, self.dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
        self.cache = make_cache(args.cache, config, model.config, max_tokens, self.device,
                                self.dtype)
        self.max_tokens, self.stop = max_tokens, tokenizer.stop_tokens()
        self.trace = None
        if args.trace or args.show_sentences:
            self.trace = Trace(self.cache, model, FullCache)
        self.timer = StageTimer(self.device)
        watch_stages(self.timer, model, self.cache, decode=not (args.cuda_graph or args.compile))
        self.decode, self.time_step = compiled.step(model, self.cache, args, self.timer)
        self.start_after(Document())

    def start_after(self, document: Document):
        """Note that this document was read, and nothing written yet. The cache is not changed."""
        self.ids, self.spans = document.ids, document.spans  # all tokens; the texts' sentences
        self.written = []  # the tokens of the answer
        self.sample = sampler(self.args.temperature, self.args.top_p, self.args.seed, self.device)

    def read(self, ids: list[int]) -> int:
        """Read a text, the first or a later one. Returns the first token after it."""
        # After the answer A B C the cache holds A B: the model has not read C. It is read before
        # this text, unless it is a stop token, which the chat template adds itself.
        decoded, last = self.written[:-1], self.written[-1:]
        to_read = [token for token in last if token not in self.stop] + ids
        n_before = self.cache.num_tokens
        check_prompt(to_read, n_before, n_new=1, model_config=self.model.config)
        with self.timer("segment"):
            spans = token_spans(self.tokenizer.pieces(to_read), self.config.sentence_limit)
            self.cache.expect(spans)
        # New lists, not `+=`: a `Document` still uses the old ones.
        self.spans = self.spans + [(start + n_before, end + n_before) for start, end in spans]
        self.ids, self.written = self.ids + decoded + to_read, []
        part_ends = split_at_sentences(spans, self.args.prefill_chunk)
        return prefill(self.model, self.cache, to_read, self.choose_token, self.timer,
                       report.progress, part_ends)

    def write(self, first: int, stopped) -> str:
        """Print an answer from its first token on, add its tokens to `self.written`, and return its
        text. `stopped()` is 0, or the signal that ends it."""
        n_most = min(self.args.max_new_tokens, self.max_tokens - len(self.ids))
        # With --raw the answer goes on from the prompt: a space before its first word stays.
        detokenize = self.tokenizer.detokenizer(self.ids[-1:] if self.args.raw else ())
        pairs = generate(
            self.model, self.cache, first, detokenize, self.choose_token,
            self.stop, n_most, self.config.sentence_limit, self.time_step, self.decode)
        if self.trace:
            pairs = self.trace.watch(pairs)
        return report.printed(pairs, self.written, self.tokenizer.special, stopped, self.args.json)

    def choose_token(self, logits) -> int:
        """Sample. If the logits are not finite, all tokens are read again to find the first layer
        where that is so, and ValueError names it."""
        try:
            return self.sample(logits)
        except FloatingPointError:
            raise finite.error(self.model, self.ids + self.written, FullCache) from None


def parse(arguments: list[str]):
    """Options as a namespace. ValueError for what is refused."""
    return options.parse(arguments, __doc__, SentenceKVConfig, SCORES, RANKS)


@process.with_exit_status
def main(arguments: list[str]) -> int:
    """Answer as the command line asks, and return the exit status. Ctrl-C ends an answer: what was
    written and its report are still printed."""
    args = parse(arguments)
    config = SentenceKVConfig(**args.settings)
    # Where to compute. Ranks are processes that share a model, each with a device of its own.
    device = pick_device(join_ranks(args.device) if RANKS > 1 else args.device)
    compiled.check(args, device)
    # Which model, and what to read: a prompt, or a document that was read before and saved.
    folder, dtype = model_folder(args.model, args.outputs), pick_dtype(args.dtype, device)
    tokenizer, model_config = Tokenizer(folder, args.special_tokens), load_config(folder)
    saved = SavedDocument(args, partial(fingerprint, folder), config, model_config, device, dtype)
    prompts = Prompts(tokenizer, saved.document or read_text(args.prompt), args)
    # Prompts that do not fit are refused before the weights are read, which takes longest.
    # `max_tokens` is the most that the cache will have to hold.
    max_tokens = prompts.check(args.max_new_tokens, args.chat, model_config)
    model = load_model(folder, device, dtype)
    session = Session(model, tokenizer, config, args, max_tokens)
    if args.ask or args.chat or args.save or args.load:  # read or load a document, then answer
        return questions.answer_all(session, prompts, saved)
    with session.timer("tokenize"):
        ids = prompts.ids()
    first = session.read(ids)
    with questions.interrupts() as stopped:
        text = session.write(first, stopped)
        return report.finish(report.describe(session, text, stopped()), session, stopped)


if __name__ == "__main__":
    process.run(main, RANK, leave_ranks if RANKS > 1 else sys.exit)
