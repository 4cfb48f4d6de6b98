"""What the methods share: one prefill for all, what each costs, and two kinds of cache.

A KV method is a unit, a score, a budget, and what happens to the rest: the docstring of each class
names the four. Most classes compute them in the hooks of one of two kinds of cache:

    Evicting     keeps the most important tokens of the prompt, and drops the rest
    Paged        reads pages of tokens, chosen anew for every token, and drops nothing
    MethodCache  is under both, for methods of neither kind

They show what a method keeps, not how fast it could be: nothing is offloaded or tuned. Prefill is
exact, also where a paper approximates it.

Shapes as in `cache.py`: H query heads, H_kv KV heads, G query heads that share one, T prompt
tokens, D channels. `kv` is keys and values side by side (H_kv, n, 2, D).
"""

import copy
import inspect
import math
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import FullCache
from sentencekv import token_importance

WINDOW = 32  # SnapKV's observation window: the last queries of the prompt, always kept
WHOLE = 2**31  # a budget for everything


class Cost(NamedTuple):
    """In tokens of 16 bits a channel, the mean of all KV heads and layers."""

    held: float  # for attention: this is the budget
    elsewhere: float  # what else is kept, on the host or to choose by; copies count
    read: float  # to write one token
    device: float  # must be on the device to write a token: what is attended to, an index, scores


class PerLayer(list):
    """`name: PerLayer` in a `MethodCache` declares a list with an entry a layer, at first None."""


class NumberedLayer:
    """One layer, as a model wants it, of a cache whose methods take the layer's number."""

    def __init__(self, cache, number: int):
        self.cache, self.number = cache, number

    def prefill(self, q, k, v):
        return self.cache.prefill(self.number, q, k, v)

    def keep(self):
        """Nothing to do: a method keeps what it likes in `prefill`."""

    def decode(self, q, k, v):
        return self.cache.decode(self.number, q, k, v)


class Recording:
    """Remembers what every layer computed while reading a prompt, for any number of caches."""

    def __init__(self):
        self.qkv, self.num_tokens = [], 0  # (q, k, v) of each layer

    @property
    def layers(self):
        """One after another, as many as the model has."""
        return (NumberedLayer(self, number) for number in count())

    def prefill(self, layer, q, k, v):
        self.qkv.append((q, k, v))
        return k, v

    def advance(self, n_tokens):
        self.num_tokens += n_tokens

    def replay(self, cache):
        """Tell `cache` of the prompt as `Llama.prefill` would have. Returns it."""
        for layer, (q, k, v) in zip(cache.layers, self.qkv):
            layer.prefill(q, k, v)
            layer.keep()
        cache.advance(self.num_tokens)
        return cache

    def document_and_last_queries(self, n_document: int) -> "Recording":
        """The document, and as its observation window the last 32 tokens of a question after it."""
        shown = Recording()
        parts = [*range(n_document), *range(self.num_tokens - WINDOW, self.num_tokens)]
        shown.qkv = [tuple(x[:, parts] for x in tensors) for tensors in self.qkv]
        shown.num_tokens = n_document
        return shown


SHARED = []  # functions that remember their results


def shared(function):
    """Compute once for all methods and budgets. The arguments are a recording's own tensors: a
    slice would be another object."""
    SHARED.append(lru_cache(maxsize=64)(function))
    return SHARED[-1]


def forget_shared():
    """Before another prompt: what is remembered keeps the old one's tensors."""
    for function in SHARED:
        function.cache_clear()


@shared
def window_attention(q, k, window: int, pool: int):
    """SnapKV's score of the tokens before the window, (H_kv, T - W)."""
    if k.shape[1] <= window:
        return k.new_zeros(len(k), 0)
    return token_importance(q[:, -window:], k, pool)


@shared
def attention_received(q, k):
    """Attention that all queries of the prompt pay to each token, float32 (H_kv, T)."""
    (heads, n_tokens, dim), received = q.shape, torch.zeros(k.shape[:2])
    grouped = (q / math.sqrt(dim)).unflatten(0, (len(k), -1))  # (H_kv, G, T, D)
    for start in range(0, n_tokens, 64):  # so few that the processor's cache holds their logits
        end = min(start + 64, n_tokens)
        part = grouped[:, :, start:end].flatten(1, 2)
        logits = (part @ k[:, :end].mT).view(len(k), -1, end - start, end)
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        logits[..., start:].masked_fill_(future, -math.inf)
        received[:, :end] += logits.softmax(dim=-1).sum(dim=(1, 2))
    return received * len(k) / heads


def group_logits(q, keys):
    """q (H, n, D) of the same n tokens, keys (H_kv, m, D) -> float32 (H_kv, G, n, m)"""
    logits = q.reshape(len(keys), -1, q.shape[-1]) @ keys.mT / math.sqrt(q.shape[-1])
    return logits.float().unflatten(1, (-1, q.shape[1]))


def token_attention(q, keys):
    """What one token pays to each key, the mean of the group: q (H, 1, D) -> (H_kv, m)"""
    return group_logits(q, keys).softmax(dim=-1).mean(dim=(1, 2))


def latest_attention(q, k, n: int):
    """What each of the prompt's last `n` tokens pays to all of it, float32 (H_kv, G, n, T)."""
    n_tokens = k.shape[1]
    first = max(n_tokens - n, 0)
    future = torch.arange(n_tokens) > torch.arange(first, n_tokens)[:, None]
    return group_logits(q[:, first:], k).masked_fill(future, -math.inf).softmax(dim=-1)


def take(x, index):
    """x (H_kv, n, ...), index (H_kv, m) into n, each head's own -> (H_kv, m, ...)"""
    return x[torch.arange(len(x))[:, None], index]


def append(kv, k, v):
    """kv (H_kv, n, 2, D) with the tokens k, v (H_kv, m, D) after it."""
    return torch.cat((kv, torch.stack((k, v), dim=2)), dim=1)


def sums(x, group, n_groups):
    """Of x (H_kv, n, m) by group (H_kv, n), the number of each row's -> (H_kv, n_groups, m)"""
    out = x.new_zeros(len(x), n_groups, x.shape[-1])
    return out.scatter_add_(1, group.unsqueeze(-1).expand_as(x), x)


def best(scores, n):
    """Indices of the n highest of each head, the highest first; ties in order. (H_kv, n)"""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :n]


class Full(FullCache):
    """Everything is attended to."""

    name, label = "full", "full cache"
    budgeted, reads_on = False, True

    def __init__(self, model_config, budget: int, spans: list, max_new_tokens: int):
        super().__init__(model_config, spans[-1][1] + max_new_tokens, "cpu", torch.float32)

    def cost(self) -> Cost:
        return Cost(self.num_tokens, 0, self.num_tokens, self.num_tokens)


class MethodCache:
    """A cache with the protocol of `model.FullCache` that tells what it costs.

    Class attributes are settings: `--methods quest:page=32` runs a class with another one.
    """

    budgeted = True  # False: what is held follows from the text, and no budget is asked for
    reads_on = True  # False: it cannot read a second text, which would attend without its mask
    keeps_all = False  # True: tokens that are not held are kept elsewhere
    dense_layers = 0  # of so many first layers everything is attended to

    def __init__(self, model_config, budget: int, spans: list, max_new_tokens: int, **settings):
        """`spans` are the sentences of the prompt, (start, end) in tokens. At most `max_new_tokens`
        will follow. Settings replace class attributes."""
        vars(self).update(settings)
        self.model_config, self.spans = model_config, spans
        self.n_layers, self.n_kv_heads, _ = model_config.kv_shape
        self.budget, self.num_tokens = budget, 0
        self.attended = [0.0] * self.n_layers  # tokens of a KV head, the mean
        for kind in type(self).__mro__:
            for name, declared in inspect.get_annotations(kind).items():
                if declared is PerLayer:
                    setattr(self, name, [None] * self.n_layers)
        self.prepare()

    def prepare(self):
        """Compute what follows from the budget and the settings."""

    @property
    def layers(self) -> list:
        return [NumberedLayer(self, number) for number in range(self.n_layers)]

    def layer_budget(self, layer) -> int:
        """Tokens of a KV head, everything included."""
        return WHOLE if layer < self.dense_layers else self.budget

    def decode(self, layer, q, k, v):
        keys, values, mask = self.attend_to(layer, q, k, v)
        n_tokens = keys.shape[1]
        if mask is not None:
            seen = mask if mask.dtype == torch.bool else mask > -math.inf
            n_tokens = seen.any(dim=1).sum(dim=-1).float().mean().item()
        self.attended[layer] = n_tokens
        return keys, values, mask

    def attend_to(self, layer, q, k, v):
        """As `decode`. The mask may be float: logarithms of what each key counts for, as so many
        equal keys."""
        raise NotImplementedError

    def advance(self, n_tokens):
        self.num_tokens += n_tokens

    def expect(self, spans):
        """Nothing to do: of the sentences of texts, a method can know the prompt's."""

    def seal(self, length):
        """Nothing to do: no method here uses the sentences that are written."""

    def held(self) -> float:
        return sum(self.attended) / self.n_layers

    def index(self) -> list:
        """Tensors that are read in order to choose, of all layers."""
        return []

    def bookkeeping(self) -> list:
        """Other tensors on the device, of all layers: 32 bits a number."""
        return []

    def cost(self) -> Cost:
        """After the last token. All that is held is read, and the index."""
        held = self.held()
        token = self.n_layers * self.n_kv_heads * 2 * self.model_config.head_dim  # its numbers
        index, state = (sum(x.numel() for x in tensors) / token
                        for tensors in (self.index(), self.bookkeeping()))
        return Cost(held, index + self.keeps_all * (self.num_tokens - held), held + index,
                    held + index + 2 * state)

    def fork(self):
        """A copy that can go on by itself. Tensors are replaced, never changed."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(other, name, list(value))
        return other


class Evicting(MethodCache):
    """Keeps the prompt's most important tokens and its last 32, and forgets the others.

    Budgets are strict while writing too, where papers let a cache grow: a new token replaces the
    least important token of the prompt, and when only half of the budget is left for the prompt,
    the oldest of the recent tokens. Grouped query heads share one choice, by the mean of their
    scores.
    """

    window = WINDOW
    sees = "question"  # or "nothing": whose queries are the window, in `benchmarks.requests`
    kept_size = 1.0  # bytes of a kept token, as a part of one of 16 bits
    prompt: PerLayer  # (kv, importance), until all layers are known
    kept: PerLayer  # (H_kv, n, 2, D), the most important first
    kept_at: PerLayer  # (H_kv, n) positions of the kept
    totals: PerLayer  # (H_kv,) the budget of each head
    recent: PerLayer  # (H_kv, n, 2, D), the oldest first
    bias: PerLayer  # (H_kv, n) log of how many tokens each is; None: one
    saved: PerLayer  # tokens of 16 bits that compression saves

    def importance(self, layer, q, k, v):
        """The score (H_kv, T), or fewer columns if the last tokens need none."""
        raise NotImplementedError

    def by_unit(self, scores: list) -> list:
        """The unit: give all tokens of a unit the same score. A list of (H_kv, n), by layer."""
        return scores

    def budgets(self, scores: list) -> list:
        """The budget: by layer, tokens of 16 bits for each head besides the window (H_kv,)."""
        rooms = [max(self.layer_budget(layer) - self.window, 0) for layer in range(self.n_layers)]
        return [torch.full((self.n_kv_heads,), room) for room in rooms]

    def spread(self, rooms: list) -> list:
        """Divide what unequal budgets leave unused equally among all heads."""
        left = sum(int(even.sum()) for even in Evicting.budgets(self, rooms))
        left = max(left - sum(int(room.sum()) for room in rooms), 0)
        return [room + left // (self.n_layers * self.n_kv_heads) for room in rooms]

    def shrink(self, layer, kv):
        """The rest of a kept token: what is left of it in fewer bytes. kv (H_kv, n, 2, D)"""
        return kv

    def least_kept(self, totals):
        """So many of the prompt's tokens stay, however much is written. totals (H_kv,)"""
        return totals // 2

    def prefill(self, layer, q, k, v):
        """The prompt, or a text after it, which attends to what is kept and makes no choice."""
        if self.num_tokens > 0:
            self.recent[layer] = append(self.recent[layer], k, v)
            return torch.cat((self.kept[layer], self.recent[layer]), dim=1).unbind(dim=2)
        n_earlier = max(k.shape[1] - self.window, 0)
        importance = self.importance(layer, q, k, v)[:, :n_earlier]
        self.prompt[layer], self.saved[layer] = (torch.stack((k, v), dim=2), importance), 0.0
        return k, v

    def advance(self, n_tokens):
        if self.num_tokens == 0:
            self.decide()
        super().advance(n_tokens)

    def decide(self):
        """All layers have read the prompt: keep what is important."""
        prompt, scores = zip(*self.prompt)
        self.prompt = []
        scores = self.by_unit(list(scores))
        for layer, (kv, score, rooms) in enumerate(zip(prompt, scores, self.budgets(scores))):
            n_earlier = score.shape[1]
            self.totals[layer], self.recent[layer] = rooms + self.window, kv[:, n_earlier:]
            self.choose(layer, kv[:, :n_earlier], score, rooms)

    def choose(self, layer, kv, score, rooms):
        """Keep the best of the tokens before the window, kv (H_kv, n, 2, D) with their score
        (H_kv, n): for each head, what fits where `rooms` (H_kv,) of 16 bits would."""
        self.kept_at[layer] = best(score, self.fit(rooms).max())
        self.kept[layer] = self.shrink(layer, take(kv, self.kept_at[layer]))

    def fit(self, room):
        """How many kept tokens fit where so many of 16 bits would. (H_kv,)"""
        return (room.double() / self.kept_size).long()

    def divide(self, layer, n_recent: int):
        """How many of the kept, and of `n_recent` recent tokens, each head attends to: two of
        (H_kv,)."""
        totals = self.totals[layer]
        n_kept = self.fit(totals - self.window).clamp(max=self.kept[layer].shape[1])
        least = self.least_kept(totals).minimum((n_kept * self.kept_size).ceil().long())
        latest = (totals - least).clamp(min=self.window).clamp(max=n_recent)
        return self.fit((totals - latest).clamp(min=0)).minimum(n_kept), latest

    def attend_to(self, layer, q, k, v):
        recent = append(self.recent[layer], k, v)
        n_kept, latest = self.divide(layer, recent.shape[1])
        self.saved[layer] = (1 - self.kept_size) * n_kept.float().mean().item()
        kept, recent = self.kept[layer][:, : n_kept.max()], recent[:, -latest.max() :]
        seen = torch.cat((torch.arange(kept.shape[1]) < n_kept[:, None],
                          torch.arange(recent.shape[1], 0, -1) <= latest[:, None]), dim=1)
        kv = torch.cat((kept, recent), dim=1)
        if not seen.all():  # heads of unequal length: zero what a head does not keep
            kv = kv.masked_fill(~seen[..., None, None], 0)
        self.kept[layer], self.recent[layer] = kv.split([kept.shape[1], recent.shape[1]], dim=1)
        return *kv.unbind(dim=2), self.mask(layer, seen, recent.shape[1])

    def mask(self, layer, seen, n_recent):
        """For keys of which each head sees some, (H_kv, n)."""
        if self.bias[layer] is None:
            return None if seen.all() else seen[:, None]
        bias = F.pad(self.bias[layer][:, : seen.shape[1] - n_recent], (0, n_recent))
        return bias.masked_fill(~seen, -math.inf)[:, None]

    def held(self):
        return super().held() - sum(self.saved) / self.n_layers

    def forget_window(self):
        """Drop the recent tokens, where they are those of a question."""
        self.recent = [recent[:, :0] for recent in self.recent]


class Paged(MethodCache):
    """Pages of tokens, chosen anew for every token. The page being filled is always read."""

    keeps_all = True
    page = 16  # tokens
    pages: PerLayer  # (H_kv, P, page, 2, D), the full ones
    summaries: PerLayer  # (n, H_kv, P, D)
    recent: PerLayer  # (H_kv, n, 2, D), the page being filled

    def summary(self, layer, keys):
        """What pages are known by, of keys (H_kv, P, page, D) -> (n, H_kv, P, D)"""
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
        self.summaries[layer] = self.summary(layer, self.pages[layer][:, :, :, 0])
        return kv.unbind(dim=2)

    def attend_to(self, layer, q, k, v):
        recent = self.recent[layer]
        if recent.shape[1] == self.page:
            page, recent = recent.unsqueeze(1), recent[:, :0]
            self.pages[layer] = torch.cat((self.pages[layer], page), dim=1)
            summary = self.summary(layer, page[:, :, :, 0])
            self.summaries[layer] = torch.cat((self.summaries[layer], summary), dim=2)
        self.recent[layer] = append(recent, k, v)
        chosen = self.pages[layer]  # (H_kv, P, page, 2, D)
        if layer >= self.dense_layers:
            scores = self.scores(layer, q.view(len(k), -1, q.shape[-1]))
            room = max(self.layer_budget(layer) - self.recent[layer].shape[1], 0)
            chosen = take(chosen, best(scores, room // self.page))
        return *torch.cat((chosen.flatten(1, 2), self.recent[layer]), dim=1).unbind(dim=2), None

    def index(self):
        return self.summaries
