"""The published alternatives, as caches with the protocol of `model.FullCache`, on the same keys.

They show what a method keeps, not how fast it could be: nothing here is offloaded or tuned.

A budget is the number of tokens that a KV head attends to, everything included. It is strict
while writing too, where the papers let SnapKV, L2-norm, PyramidKV and ChunkKV grow: every new
token takes the place of the prompt's least important one, until the prompt has half of the budget
left, and then of the oldest of the latest. Grouped query heads share one choice (the mean of
their scores), as in `sentencekv`, and every layer has the same budget (but PyramidKV's, and that of
`quest_dense`), where the paper of L2-norm leaves the first two layers whole.

Shapes as in `cache.py`: H query heads, H_kv KV heads, T prompt tokens, D channels.
"""

import copy
import math
from contextlib import nullcontext
from functools import lru_cache

import torch

import benchmarks.scores  # noqa: F401  registers the scores that a method can name
import generate
from cache import SentenceKVCache, SentenceTable
from model import FullCache, apply_rope, rope_table
from sentencekv import SentenceKVConfig, token_importance

WINDOW = 32  # SnapKV's observation window: the last queries of the prompt, always kept


class Recording:
    """Remembers what every layer computed while reading a prompt, for any number of caches."""

    stage = nullcontext

    def __init__(self):
        self.layers, self.num_tokens = [], 0

    def prefill(self, layer, q, k, v):
        self.layers.append((q, k, v))
        return k, v

    def advance(self, n_tokens):
        self.num_tokens += n_tokens

    def replay(self, cache):
        """Tell `cache` of the prompt as `Llama.prefill` would have. Returns it."""
        for layer, (q, k, v) in enumerate(self.layers):
            cache.prefill(layer, q, k, v)
        cache.advance(self.num_tokens)
        return cache

    def document_and_last_queries(self, n_document: int) -> "Recording":
        """What a method is shown that chooses what to keep of a document for a question after it:
        the document's tokens, and the question's last ones as the observation window."""
        shown = Recording()
        parts = [*range(n_document), *range(self.num_tokens - WINDOW, self.num_tokens)]
        shown.layers = [tuple(x[:, parts] for x in tensors) for tensors in self.layers]
        shown.num_tokens = n_document
        return shown


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
        """The prompt, or a text after it, which attends to what is kept and makes no choice."""
        kv = torch.stack((k, v), dim=2)  # (H_kv, T, 2, D)
        if self.num_tokens > 0:
            self.recent[layer] = torch.cat((self.recent[layer], kv), dim=1)
            return torch.cat((self.kept[layer], self.recent[layer]), dim=1).unbind(dim=2)
        n_earlier = max(k.shape[1] - self.window, 0)
        scores = self.importance(layer, q, k)[:, :n_earlier]
        room = max(self.layer_budget(layer) - self.window, 0)
        chosen = scores.argsort(dim=-1, descending=True, stable=True)[:, :room]
        self.kept_at[layer] = chosen
        self.kept[layer] = kv[torch.arange(len(k))[:, None], chosen]
        self.recent[layer] = kv[:, n_earlier:]
        return k, v

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


    def forget_window(self):
        """Only what was chosen stays."""
        self.recent = [recent[:, :0] for recent in self.recent]

    def fork(self):
        """A copy that can go on by itself. Tensors are replaced, never changed."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(other, name, list(value))
        return other


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


# What many budgets ask of the same prompt is computed once: the tensors of a recording stay alive.
shared = lru_cache(maxsize=64)


@shared
def window_attention(q, k, window: int, pool: int):
    return token_importance(q[:, -window:], k, pool)


class SnapKV(Evicting):
    """Attention received from the prompt's last 32 queries, pooled over 7 tokens. 2404.14469."""

    def importance(self, layer, q, k):
        return window_attention(q, k, self.window, 7)


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
            scores = window_attention(q, k, self.window, 1).sum(dim=0)  # (T - W,)
            chunks = torch.nn.functional.pad(scores, (0, -len(scores) % self.chunk))
            sums = chunks.view(-1, self.chunk).sum(dim=-1)
            self.scores = sums.repeat_interleave(self.chunk)[: len(scores)].expand(len(k), -1)
        return self.scores


@shared
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
        return k, v

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


class Paged(Evicting):
    """Pages of tokens, chosen anew for every token; nothing is forgotten. The page being filled is
    always read. A page is known by `summary`, in place of its keys."""

    page, dense_layers = 16, 0  # tokens; the first layers of which everything is read

    def __init__(self, model_config, budget):
        super().__init__(model_config, budget)
        self.pages = [None] * self.n_layers  # (H_kv, P, page, 2, D), the full ones
        self.summaries = [None] * self.n_layers  # (n, H_kv, P, D)

    def summary(self, keys):
        """Of keys (H_kv, P, page, D) -> (n, H_kv, P, D)"""
        raise NotImplementedError

    def scores(self, layer, q):
        """Of each page, q (H_kv, G, D) -> (H_kv, P)"""
        raise NotImplementedError

    def prefill(self, layer, q, k, v):
        """The prompt, or a text after it, which attends to everything."""
        kv = torch.stack((k, v), dim=2)  # (H_kv, T, 2, D)
        if self.num_tokens > 0:
            kv = torch.cat((self.pages[layer].flatten(1, 2), self.recent[layer], kv), dim=1)
        n_full = kv.shape[1] // self.page
        self.recent[layer] = kv[:, n_full * self.page :]
        self.pages[layer] = kv[:, : n_full * self.page].unflatten(1, (n_full, self.page))
        self.summaries[layer] = self.summary(self.pages[layer][:, :, :, 0])
        return kv.unbind(dim=2)

    def decode(self, layer, q, k, v):
        recent = self.recent[layer]
        if recent.shape[1] == self.page:
            page, recent = recent.unsqueeze(1), recent[:, :0]
            self.pages[layer] = torch.cat((self.pages[layer], page), dim=1)
            summary = self.summary(page[:, :, :, 0])
            self.summaries[layer] = torch.cat((self.summaries[layer], summary), dim=2)
        self.recent[layer] = torch.cat((recent, torch.stack((k, v), dim=2)), dim=1)
        chosen = self.pages[layer]  # (H_kv, P, page, 2, D)
        if layer >= self.dense_layers:
            room = max(self.budget - self.recent[layer].shape[1], 0) // self.page
            scores = self.scores(layer, q.view(len(k), -1, q.shape[-1]))
            best = scores.argsort(dim=-1, descending=True, stable=True)[:, :room]
            chosen = chosen[torch.arange(len(k))[:, None], best]
        return *torch.cat((chosen.flatten(1, 2), self.recent[layer]), dim=1).unbind(dim=2), None


class Quest(Paged):
    """Pages of 16 tokens. 2406.10774. A page's score is the most that q · k can be for keys between
    its channels' smallest and largest values."""

    def summary(self, keys):
        return torch.stack(keys.aminmax(dim=2))

    def scores(self, layer, q):
        bounds = (q[:, :, None] * self.summaries[layer][:, :, None]).amax(dim=0)  # (H_kv, G, P, D)
        return bounds.sum(dim=-1).mean(dim=1)


class QuestDense(Quest):
    """Quest as in its paper: in the first two layers everything is read, whatever the budget."""

    dense_layers = 2


class ShadowKV(Paged):
    """Chunks of 8 tokens by their mean key, the *landmark*. 2410.21465, the choice of chunks alone.

    Departures: keys are not of low rank; the local chunks are the latest, not the prompt's.

    Always read are the local chunks, the last 4, and the outliers, with a key that is least like
    the landmark: 24 for 1,024 tokens of the budget (in the CPU variant of the authors' code). Both
    are counted in the budget. The score of another chunk is its share of the softmax over these
    others, the most of the group's heads.
    """

    page, local_chunks = 8, 4

    def summary(self, keys):
        return keys.mean(dim=2).unsqueeze(0)

    def prefill(self, layer, q, k, v):
        everything = super().prefill(layer, q, k, v)
        if self.num_tokens > 0:
            return everything
        keys, landmarks = self.pages[layer][:, :, :, 0], self.summaries[layer][0]
        likeness = torch.cosine_similarity(keys, landmarks.unsqueeze(2), dim=-1).amin(dim=-1)
        n_outliers = round(self.budget * 24 / 1024)
        earlier = likeness[:, : -self.local_chunks]
        outliers = earlier.argsort(dim=-1, stable=True)[:, :n_outliers]
        if layer == 0:
            self.outliers = []  # for each layer (H_kv, n)
        self.outliers.append(outliers)
        return everything

    def scores(self, layer, q):
        logits = q @ self.summaries[layer][0].mT / math.sqrt(q.shape[-1])  # (H_kv, G, P)
        always = torch.zeros_like(logits[:, 0], dtype=torch.bool)
        always.scatter_(-1, self.outliers[layer], True)[:, -self.local_chunks :] = True
        shares = logits.masked_fill(always.unsqueeze(1), -math.inf).softmax(dim=-1).amax(dim=1)
        return shares.masked_fill(always, math.inf)


@shared
def expected_attention(q, k, config, ahead: int = 512):
    """What the next tokens pay to each token but the first 4, if their queries are Gaussian before
    RoPE, (H_kv, T - 4).

    Mean and covariance are those of the prompt's queries, without the first 4. Both are turned by
    the mean rotation of the next `ahead` positions.
    """
    dim, n_tokens = q.shape[-1], q.shape[1]
    cos, sin = rope_table(config, torch.arange(n_tokens + ahead), q.dtype)
    unturned = apply_rope(q, cos[:n_tokens], -sin[:n_tokens])[:, 4:]  # (H, T - 4, D)
    mean = unturned.mean(dim=1, keepdim=True)
    covariance = (unturned - mean).mT @ (unturned - mean) / unturned.shape[1]  # (H, D, D)
    later = cos[n_tokens:].mean(dim=0), sin[n_tokens:].mean(dim=0)
    mean = apply_rope(mean, *later)
    covariance = apply_rope(apply_rope(covariance, *later).mT, *later)  # R Σ Rᵀ
    keys = k[:, 4:].repeat_interleave(len(q) // len(k), dim=0)  # (H, T - 4, D)
    logits = (mean @ keys.mT).squeeze(1) / math.sqrt(dim)
    logits += ((keys @ covariance) * keys).sum(dim=-1) / (2 * dim)
    return logits.softmax(dim=-1).unflatten(0, (len(k), -1)).mean(dim=1)


class ExpectedAttention(Evicting):
    """The attention that later tokens are expected to pay, times the length of the value, and the
    first 4 tokens. 2510.00636. Departure: the last 32 stay."""

    def __init__(self, model_config, budget):
        super().__init__(model_config, budget)
        self.model_config = model_config

    def prefill(self, layer, q, k, v):
        self.values = v
        return super().prefill(layer, q, k, v)

    def importance(self, layer, q, k):
        scores = expected_attention(q, k, self.model_config) * self.values[:, 4:].norm(dim=-1)
        return torch.nn.functional.pad(scores, (4, 0), value=math.inf)


class BestTokens(FullCache):
    """The ceiling of attention for a choice of tokens: those that this very token attends to most.

    It looks at every key, which no method may.
    """

    def __init__(self, model_config, max_tokens, budget):
        super().__init__(model_config, max_tokens, "cpu", torch.float32)
        self.budget = budget

    def decode(self, layer, q, k, v):
        keys, values, _ = super().decode(layer, q, k, v)
        logits = q.view(len(k), -1, q.shape[-1]) @ keys.mT / math.sqrt(q.shape[-1])  # (H_kv, G, n)
        attention = logits.softmax(dim=-1).mean(dim=1)
        best = attention.topk(min(self.budget, keys.shape[1]), dim=-1).indices
        heads = torch.arange(len(k))[:, None]
        return keys[heads, best], values[heads, best], None


class TwoVectors(SentenceKVCache):
    """SentenceKV with a second vector a sentence: its key k* that is farthest from the mean.

    The attention that the sentence receives is taken for (n - 1) exp(Gaussian) + exp(q · k*), of n
    keys; the score is again that of one token. Sentences that are alike differ in a token or two.
    Mean and variance are still those of all n keys.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.farthest = list(torch.zeros_like(self.table.vectors))  # of each layer (H_kv, S, D)
        self.table.put = self.put

    def put(self, layer, keys, bounds):
        SentenceTable.put(self.table, layer, keys, bounds)
        first = self.table.n_sentences
        new = slice(first, first + bounds.shape[-1] - 1)
        stored = self.stored(layer)
        stored[:, new] = self.choose(keys, bounds, self.table.vectors[layer, :, new])
        self.farthest[layer] = stored

    def stored(self, layer):
        """The second vectors, as many as the table has places."""
        more = self.table.capacity - self.farthest[layer].shape[1]
        return torch.nn.functional.pad(self.farthest[layer], (0, 0, 0, more))

    @staticmethod
    def choose(keys, bounds, vectors):
        """keys (H_kv, N, D), bounds (H_kv, S + 1), vectors (H_kv, S, D) -> (H_kv, S, D)"""
        rows = torch.arange(keys.shape[1]).expand(len(keys), -1).contiguous()
        sentence = torch.searchsorted(bounds.contiguous(), rows, right=True)  # from 1; 0: none
        means = torch.nn.functional.pad(vectors, (0, 0, 1, 0))
        distances = (keys - means.gather(1, sentence[..., None].expand_as(keys))).norm(dim=-1)
        order = distances.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, sentence.gather(-1, order).argsort(dim=-1, stable=True))
        first = order.gather(-1, bounds[:, :-1].clamp(max=keys.shape[1] - 1))  # farthest of each
        return keys.gather(1, first[..., None].expand_as(vectors))

    def score(self, layer, q):
        table = self.table
        lengths, q = table.lengths[layer].unsqueeze(1), q / math.sqrt(q.shape[-1])
        squared_norms = q.square().sum(dim=-1, keepdim=True)
        others = q @ table.vectors[layer].mT + squared_norms * table.variances[layer, :, None] / 2
        farthest = (q @ self.stored(layer).mT).masked_fill(lengths == 0, -math.inf)
        attention = torch.logaddexp(others + (lengths - 1).clamp(min=0).log(), farthest).softmax(-1)
        return attention.sum(dim=1) / table.lengths[layer].clamp(min=1)


class BestSentences(SentenceKVCache):
    """The ceiling: sentences ranked by the attention that this very token pays to a row of them.

    It looks at every key, which no method may; a choice of whole sentences can hardly do better.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = {}  # layer -> keys (H_kv, N, D), side by side: reading them is faster

    def keys(self, layer):
        if layer not in self.seen or self.seen[layer].shape[1] != self.table.n_rows:
            keys = self.host.read(layer, 0, self.table.n_rows)[:, :, 0]
            self.seen[layer] = self.known(layer, keys).contiguous()
        return self.seen[layer]

    def known(self, layer, keys):
        """What is known of all keys (H_kv, N, D): here everything."""
        return keys

    def restore(self, snapshot, release=None):
        super().restore(snapshot, release)
        self.seen = {}

    def score(self, layer, q):
        """What a retrievable row of each sentence receives from one token's queries, the mean."""
        logits = (q @ self.keys(layer).mT).float() / math.sqrt(q.shape[-1])  # (H_kv, G, N)
        total = torch.nn.functional.pad(logits.softmax(-1).mean(dim=1).double().cumsum(-1), (1, 0))
        starts, lengths = self.table.starts[layer], self.table.n_retrievable[layer]
        received = total.gather(-1, starts + lengths) - total.gather(-1, starts)
        return (received / lengths.clamp(min=1)).float()


class TwoBitKeys(BestSentences):
    """SentenceKV that knows every key at 2 bits a channel, in place of a vector a sentence.

    A sentence's score is the attention that its rows would receive. It shows what a vector gives
    away. These keys take an eighth of those of 16 bits.
    """

    # The four levels that lose least of a Gaussian channel, and where they meet, in deviations.
    levels, edges = torch.tensor([-1.51, -0.453, 0.453, 1.51]), torch.tensor([-0.982, 0.0, 0.982])

    def prefill(self, layer, q, k, v):
        if self.num_tokens == 0:
            if layer == 0:
                self.channels = []  # for each layer mean and deviation (H_kv, 1, D)
            self.channels.append((k.mean(dim=1, keepdim=True), k.std(dim=1, keepdim=True)))
        return super().prefill(layer, q, k, v)

    def known(self, layer, keys):
        mean, deviation = self.channels[layer]
        level = torch.bucketize(((keys - mean) / deviation).contiguous(), self.edges)
        return mean + deviation * self.levels[level]


BASELINES = {
    "streamingllm": StreamingLLM, "l2norm": L2Norm, "h2o": H2O, "snapkv": SnapKV,
    "pyramidkv": PyramidKV, "chunkkv": ChunkKV, "expected_attention": ExpectedAttention,
    "quest": Quest, "quest_dense": QuestDense, "shadowkv": ShadowKV,
}
SENTENCE_METHODS = {
    "sentencekv": SentenceKVCache, "published": SentenceKVCache, "plain": SentenceKVCache,
    "two_vectors": TwoVectors, "two_bit_keys": TwoBitKeys, "best_sentences": BestSentences,
}
METHODS = ("full", *BASELINES, *SENTENCE_METHODS, "best_tokens")

# What some names set, and `sentencekv` does not. `published` has the settings of the paper, where
# keep_factor was 2 to 5; `plain` has the Gaussian score, and keeps everything.
PLAIN = {"query_decay": 1.0, "secondary_sinks": 0, "sentence_limit": 128}
SETTINGS = {"plain": PLAIN, "best_sentences": {"query_decay": 0.0}, "published": PLAIN | {
    "score": "mean_query", "sink_tokens": 32, "keep_factor": 2.0}}


def settings_of(spec: str) -> dict:
    """The settings of `method:name=value,name=value`, and those that the name itself sets: fields
    of `SentenceKVConfig`, `unit`, and `sees`."""
    method, _, pairs = spec.partition(":")
    settings = dict(SETTINGS.get(method, {}))
    for pair in filter(None, pairs.split(",")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"method {spec!r}: settings are name=value,name=value")
        text = name in ("unit", "sees")
        if not text and name not in SentenceKVConfig.__dataclass_fields__:
            raise ValueError(f"method {spec!r}: there is no setting {name!r}")
        kind = str if text else type(getattr(SentenceKVConfig, name))
        settings[name] = kind(value)
    return settings


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
    if "score" in settings and SENTENCE_METHODS[method] is not SentenceKVCache:
        raise ValueError(f"method {method!r} has a score of its own")
    if method == "full":
        return generate.make_cache("full", None, model_config, spans, max_new_tokens, "cpu", dtype)
    if method in BASELINES:
        return BASELINES[method](model_config, budget)
    if method == "best_tokens":
        return BestTokens(model_config, spans[-1][1] + max_new_tokens, budget)
    if method not in SENTENCE_METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    config = SentenceKVConfig(token_budget=budget, **settings)
    return SENTENCE_METHODS[method](config, model_config, spans, max_new_tokens, "cpu", dtype)
