"""The published alternatives, as caches with the protocol of `model.FullCache`, on the same keys.

They show what a method keeps, not how fast it could be: nothing here is offloaded or tuned.

A budget is the number of tokens that a KV head attends to, everything included. It is strict
while writing too, where the papers let SnapKV, L2-norm, PyramidKV and ChunkKV grow: every new
token takes the place of the prompt's least important one, until the prompt has half of the budget
left, and then of the oldest of the latest. Grouped query heads share one choice (the mean of
their scores), as in `sentencekv`, and every layer has the same budget (but PyramidKV's), where
the papers of L2-norm and Quest leave the first two layers whole.

Shapes as in `cache.py`: H query heads, H_kv KV heads, T prompt tokens, D channels.
"""

import math
from contextlib import nullcontext
from functools import lru_cache

import torch

import benchmarks.scores  # noqa: F401  registers the scores that a method can name
import generate
from cache import SentenceKVCache
from sentencekv import SentenceKVConfig, token_importance

WINDOW = 32  # SnapKV's observation window: the last queries of the prompt, always kept


class Recording:
    """Remembers what every layer computed while reading a prompt, for any number of caches."""

    stage = nullcontext

    def __init__(self):
        self.layers, self.num_tokens = [], 0

    def prefill(self, layer, q, k, v):
        self.layers.append((q, k, v))

    def advance(self, n_tokens):
        self.num_tokens += n_tokens

    def replay(self, cache):
        """Tell `cache` of the prompt as `Llama.prefill` would have. Returns it."""
        for layer, (q, k, v) in enumerate(self.layers):
            cache.prefill(layer, q, k, v)
        cache.advance(self.num_tokens)
        return cache


class Evicting:
    """Keeps the prompt's most important tokens and its last ones, and forgets the others."""

    stage = nullcontext
    window = WINDOW

    def __init__(self, model_config, budget: int):
        self.n_layers = model_config.num_hidden_layers
        self.budget, self.num_tokens = budget, 0
        self.kept = [None] * self.n_layers  # (H_kv, n, 2, D), the most important first
        self.recent = [None] * self.n_layers  # (H_kv, n, 2, D), the oldest first
        self.kept_at = [None] * self.n_layers  # (H_kv, n) positions of the kept

    def importance(self, layer, q, k):
        """(H_kv, T), or fewer columns if the last tokens need no score."""
        raise NotImplementedError

    def layer_budget(self, layer):
        return self.budget

    def least_kept(self, layer):
        """So many of the prompt's tokens stay, however much is written."""
        return self.layer_budget(layer) // 2

    def prefill(self, layer, q, k, v):
        kv = torch.stack((k, v), dim=2)  # (H_kv, T, 2, D)
        n_earlier = max(k.shape[1] - self.window, 0)
        scores = self.importance(layer, q, k)[:, :n_earlier]
        room = max(self.layer_budget(layer) - self.window, 0)
        chosen = scores.argsort(dim=-1, descending=True, stable=True)[:, :room]
        self.kept_at[layer] = chosen
        self.kept[layer] = kv[torch.arange(len(k))[:, None], chosen]
        self.recent[layer] = kv[:, n_earlier:]

    def decode(self, layer, q, k, v):
        budget = self.layer_budget(layer)
        latest = max(self.window, budget - min(self.least_kept(layer), self.kept[layer].shape[1]))
        recent = torch.cat((self.recent[layer], torch.stack((k, v), dim=2)), dim=1)[:, -latest:]
        self.recent[layer] = recent
        room = max(budget - recent.shape[1], 0)
        return *torch.cat((self.kept[layer][:, :room], recent), dim=1).unbind(dim=2), None

    def advance(self, n_tokens):
        self.num_tokens += n_tokens

    def seal(self, length):
        """Nothing to do: these methods know no sentences."""


class StreamingLLM(Evicting):
    """The first 4 tokens and the latest. 2309.17453; positions are not renumbered here."""

    def importance(self, layer, q, k):
        position = torch.arange(k.shape[1], dtype=torch.float32)
        position[:4] = math.inf
        return position.expand(len(k), -1)

    def least_kept(self, layer):
        return 4


class L2Norm(Evicting):
    """The keys of smallest norm. 2406.11430."""

    def importance(self, layer, q, k):
        return -k.float().norm(dim=-1)


class SnapKV(Evicting):
    """Attention received from the prompt's last 32 queries, pooled over 7 tokens. 2404.14469."""

    def importance(self, layer, q, k):
        return token_importance(q[:, -self.window :], k)


class PyramidKV(SnapKV):
    """SnapKV with a budget that shrinks from layer to layer, the same in total. 2406.02069."""

    def layer_budget(self, layer):
        room = self.budget - self.window
        last = room // 20  # the paper's β
        step = (2 * room - 2 * last) / max(self.n_layers - 1, 1)
        return self.window + round(2 * room - last - step * layer)


class ChunkKV(Evicting):
    """Chunks of 10 tokens by the sum of SnapKV's scores over tokens and heads. 2502.00299.

    The choice is made in every second layer and used again in the next.
    """

    chunk, reuse = 10, 2

    def importance(self, layer, q, k):
        if layer % self.reuse == 0:
            scores = token_importance(q[:, -self.window :], k, pool=1).sum(dim=0)  # (T - W,)
            chunks = torch.nn.functional.pad(scores, (0, -len(scores) % self.chunk))
            sums = chunks.view(-1, self.chunk).sum(dim=-1)
            self.scores = sums.repeat_interleave(self.chunk)[: len(scores)].expand(len(k), -1)
        return self.scores


@lru_cache(maxsize=64)
def attention_received(q, k):
    """Attention that all queries of the prompt pay to each token, float32 (H_kv, T)."""
    (heads, n_tokens, dim), received = q.shape, torch.zeros(k.shape[:2])
    grouped = q.view(len(k), -1, n_tokens, dim)  # (H_kv, G, T, D)
    for start in range(0, n_tokens, 512):
        end = min(start + 512, n_tokens)
        logits = grouped[:, :, start:end] @ k[:, None, :end].mT / math.sqrt(dim)
        future = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
        received[:, :end] += logits.masked_fill_(future, -math.inf).softmax(-1).sum((1, 2)).cpu()
    return received * len(k) / heads


class H2O(Evicting):
    """Attention received from all queries so far; half of the budget is the latest. 2306.14048."""

    def __init__(self, model_config, budget):
        super().__init__(model_config, budget)
        self.window = budget // 2
        self.received = [None] * self.n_layers  # (H_kv, n) of kept and recent tokens

    def importance(self, layer, q, k):
        return attention_received(q, k)

    def prefill(self, layer, q, k, v):
        super().prefill(layer, q, k, v)
        received, n_earlier = attention_received(q, k), max(k.shape[1] - self.window, 0)
        self.received[layer] = torch.cat(
            (received.gather(-1, self.kept_at[layer]), received[:, n_earlier:]), dim=-1)
        self.kept[layer] = torch.cat((self.kept[layer], self.recent[layer]), dim=1)
        self.recent[layer] = None  # one list, the latest last

    def decode(self, layer, q, k, v):
        kv, received = self.make_room(self.kept[layer], self.received[layer])
        kv = torch.cat((kv, torch.stack((k, v), dim=2)), dim=1)
        keys, values = kv.unbind(dim=2)
        grouped = q.view(len(k), -1, q.shape[-1])  # (H_kv, G, D)
        attention = (grouped @ keys.mT / math.sqrt(q.shape[-1])).float().softmax(dim=-1)
        received = torch.nn.functional.pad(received, (0, 1)) + attention.mean(dim=1)
        self.kept[layer], self.received[layer] = kv, received
        return keys, values, None

    def make_room(self, kv, received):
        """Forget each head's least attended token that is not among the latest."""
        n_tokens = kv.shape[1]
        if n_tokens < self.budget:
            return kv, received
        victim = received[:, : n_tokens + 1 - self.window].argmin(dim=-1, keepdim=True)
        left = torch.arange(n_tokens - 1).expand(len(kv), -1)
        left = left + (left >= victim)
        return kv[torch.arange(len(kv))[:, None], left], received.gather(-1, left)


class Quest(Evicting):
    """Pages of 16 tokens, chosen anew at every step; nothing is forgotten. 2406.10774.

    A page's score is the most that q · k can be for keys between its channels' smallest and
    largest values. The page being filled is always read.
    """

    page = 16

    def __init__(self, model_config, budget):
        super().__init__(model_config, budget)
        self.pages = [None] * self.n_layers  # (H_kv, P, 16, 2, D), the full ones
        self.bounds = [None] * self.n_layers  # (2, H_kv, 1, P, D), their keys' least and most

    def prefill(self, layer, q, k, v):
        kv = torch.stack((k, v), dim=2)  # (H_kv, T, 2, D)
        n_full = k.shape[1] // self.page
        self.recent[layer] = kv[:, n_full * self.page :]
        self.pages[layer] = kv[:, : n_full * self.page].unflatten(1, (n_full, self.page))
        self.bounds[layer] = self.bounds_of(self.pages[layer])

    def bounds_of(self, pages):
        return torch.stack(pages[:, :, :, 0].aminmax(dim=2)).unsqueeze(2)

    def decode(self, layer, q, k, v):
        recent = self.recent[layer]
        if recent.shape[1] == self.page:
            page, recent = recent.unsqueeze(1), recent[:, :0]
            self.pages[layer] = torch.cat((self.pages[layer], page), dim=1)
            self.bounds[layer] = torch.cat((self.bounds[layer], self.bounds_of(page)), dim=3)
        recent = torch.cat((recent, torch.stack((k, v), dim=2)), dim=1)
        self.recent[layer] = recent
        grouped = q.view(len(k), -1, 1, q.shape[-1])  # (H_kv, G, 1, D)
        bound = (grouped * self.bounds[layer]).amax(dim=0).sum(dim=-1)  # (H_kv, G, P)
        room = (self.budget - recent.shape[1]) // self.page
        best = bound.mean(dim=1).argsort(dim=-1, descending=True, stable=True)[:, :room]
        chosen = self.pages[layer][torch.arange(len(k))[:, None], best].flatten(1, 2)
        return *torch.cat((chosen, recent), dim=1).unbind(dim=2), None


class LastQuery(SentenceKVCache):
    """SentenceKV by the newest query alone, and not by the sentence being written."""

    def add_scores(self, layer, q):
        self.table.scores[layer].zero_()
        super().add_scores(layer, q)


class BestSentences(SentenceKVCache):
    """The ceiling: sentences ranked by the attention that this very token pays to a row of them.

    It looks at every key, which no method may; a choice of whole sentences can hardly do better.
    """

    def add_scores(self, layer, q):
        keys = self.host.kv[layer, : self.table.n_rows, :, 0].transpose(0, 1)  # (H_kv, N, D)
        logits = (q @ keys.mT).float() / math.sqrt(q.shape[-1])  # (H_kv, G, N)
        attention = logits.softmax(dim=-1).mean(dim=1).double()
        total = torch.nn.functional.pad(attention.cumsum(dim=-1), (1, 0))
        bounds = self.table.bounds[layer]
        per_row = total.gather(-1, bounds).diff(dim=-1) / bounds.diff(dim=-1).clamp(min=1)
        self.table.scores[layer] = per_row


BASELINES = {
    "streamingllm": StreamingLLM, "l2norm": L2Norm, "h2o": H2O, "snapkv": SnapKV,
    "pyramidkv": PyramidKV, "chunkkv": ChunkKV, "quest": Quest,
}
SENTENCE_METHODS = {
    "sentencekv": SentenceKVCache, "last_query": LastQuery, "best_sentences": BestSentences,
}
METHODS = ("full", *BASELINES, *SENTENCE_METHODS)


def device_bytes(cache) -> int:
    """What the cache holds on the device, by its own report or by its tensors."""
    if hasattr(cache, "report"):
        return cache.report()["device_kv_bytes"]
    held = [x for value in vars(cache).values() if isinstance(value, list) for x in value]
    return sum(x.nbytes for x in held if isinstance(x, torch.Tensor))


def make_cache(method: str, model_config, budget: int, spans: list, max_new_tokens: int,
               dtype=torch.float32, **settings):
    """An empty cache for a prompt of these sentences, on the CPU.

    `settings` go to `SentenceKVConfig`. ValueError for an unknown method, or one without settings.
    """
    if settings and method not in SENTENCE_METHODS:
        raise ValueError(f"method {method!r} has no settings")
    if method == "full":
        return generate.make_cache("full", None, model_config, spans, max_new_tokens, "cpu", dtype)
    if method in BASELINES:
        return BASELINES[method](model_config, budget)
    if method not in SENTENCE_METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    config = SentenceKVConfig(token_budget=budget, **settings)
    return SENTENCE_METHODS[method](config, model_config, spans, max_new_tokens, "cpu", dtype)
