"""SentenceKV (arXiv 2504.00970) as pure functions on tensors.

While reading the prompt: how important is each token, which tokens are kept, and one semantic
vector per sentence. While writing: how well does each sentence answer the sentence being written,
and which kept tokens does that bring back within the budget.

This file knows nothing of text, devices, layers or memory: it is told where sentences end and
returns numbers. Everything is per KV head: the query heads of a group choose together, so what
grouped-query attention saves stays saved.

Shapes: T prompt tokens, N kept tokens ("rows"), S sentences, W the observation window,
    H query heads, H_kv KV heads, G = H // H_kv, D channels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def mean_query(q, vectors, spreads, lengths) -> torch.Tensor:
    """The paper's score: the query, averaged over its group, times the semantic vector.

    The paper averages the queries of the sentence being written before it multiplies. That is
    linear, so the sum of these scores over the sentence's tokens ranks sentences the same.

    q (H_kv, G, D), vectors (H_kv, S, D), spreads and lengths (unused) (H_kv, S) -> (H_kv, S)
    """
    return (vectors @ q.mean(dim=1).unsqueeze(-1)).squeeze(-1).float()


def votes(q, vectors, spreads, lengths) -> torch.Tensor:
    """Each query head spreads one vote over the sentences, as it would spread its attention.

    A sentence of n keys near their mean k̄ would receive attention in proportion to
    n · exp(q · k̄ / √D): a softmax over sentences, with ln n added. An empty one gets ln 0 = -∞,
    no vote. Not in the paper.

    q (H_kv, G, D), vectors (H_kv, S, D), spreads (unused) and lengths (H_kv, S) -> (H_kv, S)
    """
    logits = (q @ vectors.mT).float() / math.sqrt(q.shape[-1])  # (H_kv, G, S)
    return (logits + lengths.log().unsqueeze(1)).softmax(dim=-1).sum(dim=1)


def expected_attention(q, vectors, spreads, lengths) -> torch.Tensor:
    """Attention that a token of the sentence can expect, from what is known of its keys.

    Keys that lie around their mean k̄ like a normal distribution, σ² wide in every channel, have
    exp(q · k / √D) = exp(q · k̄ / √D + |q|² σ² / 2D) on average: a sentence of unlike keys may hide
    one that answers. As the budget counts tokens, it is the average and not the sum that ranks.
    Not in the paper.

    q (H_kv, G, D), vectors (H_kv, S, D), spreads σ² and lengths (H_kv, S) -> (H_kv, S)
    """
    dim = q.shape[-1]
    width = q.float().square().sum(dim=-1, keepdim=True) / (2 * dim)  # |q|² / 2D (H_kv, G, 1)
    logits = torch.addcmul(lengths.log().unsqueeze(1), width, spreads.unsqueeze(1))
    logits = logits.add(q @ vectors.mT, alpha=dim**-0.5)  # (H_kv, G, S)
    return logits.softmax(dim=-1).sum(dim=1) / lengths.clamp(min=1)


SCORES = {"mean_query": mean_query, "votes": votes, "expected_attention": expected_attention}


@dataclass(frozen=True)
class SentenceKVConfig:
    """What to keep and how much of it to attend to. Raises ValueError if it cannot work.

    `keep_factor` is the paper's r: prefill keeps the r · token_budget most important tokens on
    the host. The paper's runs use 1 to 5; infinity, the default here, keeps every token, so what
    a later sentence asks for is never already gone, and importance need not be computed.
    """

    token_budget: int = 1024  # tokens attended to per KV head while decoding, τ
    keep_factor: float = math.inf
    sink_tokens: int = 4  # first tokens, always attended to
    recent_window: int = 32  # last tokens, always attended to
    observation_window: int = 32  # last queries of the prompt, which judge importance
    score: str = "expected_attention"
    sentence_limit: int = 128  # tokens; a longer run of text is cut

    def __post_init__(self):
        for name, least in (("sink_tokens", 0), ("recent_window", 1), ("observation_window", 1),
                            ("sentence_limit", 1), ("keep_factor", 1)):
            if not getattr(self, name) >= least:  # `not >=` also refuses NaN
                raise ValueError(f"{name} is {getattr(self, name)}, the least is {least}")
        least = self.sink_tokens + self.always_kept + 1
        if self.token_budget < least:
            raise ValueError(f"token_budget is {self.token_budget}, the least is {least}:"
                             f" {self.sink_tokens} sinks + {self.always_kept} recent + 1")
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}, the choices are {', '.join(SCORES)}")

    @property
    def always_kept(self) -> int:
        """Tokens at the prompt's end that prefill never drops."""
        judges = self.observation_window if self.keep_factor < math.inf else 0
        return max(self.recent_window, judges)

    @property
    def load_slots(self) -> int:
        """B, the rows of the budget that sentences are fetched into."""
        return self.token_budget - self.sink_tokens - self.recent_window

    def kept_tokens(self, n_tokens: int) -> int:
        """N, the rows kept of a prompt: ⌊r · τ⌋, or all of them."""
        return int(min(n_tokens, self.keep_factor * self.token_budget))


def token_importance(q: torch.Tensor, k: torch.Tensor, pool: int = 7) -> torch.Tensor:
    """Attention that the prompt's last W queries pay to each earlier token. SnapKV, 2404.14469.

    Summed over the window, averaged over the group, max-pooled so that a needle's neighbours
    come along.

    q (H, W, D) of the last W tokens, k (H_kv, T, D) -> (H_kv, T - W)
    """
    (_, window, dim), (kv_heads, tokens, _) = q.shape, k.shape
    grouped = q.reshape(kv_heads, -1, dim)  # (H_kv, G * W, D)
    logits = (grouped @ k.mT).float().view(kv_heads, -1, window, tokens) / math.sqrt(dim)
    future = torch.ones(window, tokens, dtype=torch.bool, device=q.device)
    logits.masked_fill_(future.triu(tokens - window + 1), -math.inf)
    received = logits.softmax(dim=-1).sum(dim=2).mean(dim=1)  # (H_kv, T)
    return F.max_pool1d(received[:, : tokens - window], pool, stride=1, padding=pool // 2)


def keep_tokens(importance: torch.Tensor, n_tokens: int, config: SentenceKVConfig) -> torch.Tensor:
    """Positions of the kept tokens of each head, in reading order.

    The window's own tokens are always kept, as in the paper; the sinks and the recent tokens are
    too, which the paper leaves to chance: they are attended to in any case, and so every head's
    rows begin and end alike.

    importance (H_kv, T - W) -> (H_kv, N)
    """
    importance = F.pad(importance, (0, n_tokens - importance.shape[-1]), value=math.inf)
    importance[:, : config.sink_tokens] = math.inf
    importance[:, n_tokens - config.always_kept :] = math.inf
    # Pooling makes ties; a stable sort settles them alike on every device, as `topk` does not.
    ranked = importance.argsort(dim=-1, descending=True, stable=True)
    return ranked[:, : config.kept_tokens(n_tokens)].sort(dim=-1).values


def sentence_bounds(kept: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows at which each sentence begins; a sentence's rows end where the next one's begin.

    Sentences with nothing kept are left out, and as many empty ones stand at the end.

    kept (H_kv, N) positions, ends (S,) token positions where sentences end -> (H_kv, S + 1)

    >>> sentence_bounds(torch.tensor([[0, 1, 8, 9]]), torch.tensor([4, 7, 10])).tolist()
    [[0, 2, 4, 4]]
    """
    ends = torch.searchsorted(kept, ends.expand(len(kept), -1).contiguous())  # as rows
    empty = ends.diff(dim=-1, prepend=torch.zeros_like(ends[:, :1])) == 0
    return F.pad(ends.masked_fill(empty, kept.shape[-1]).sort(dim=-1).values, (1, 0))


def sentence_vectors(keys: torch.Tensor, bounds: torch.Tensor) -> tuple:
    """Semantic vector of every sentence: the mean of its kept keys (Section 3.2), after RoPE.

    And its spread, how far the keys lie from that mean: the squared distance, averaged over keys
    and channels. A sentence with nothing kept gets zeros.

    keys (H_kv, N, D), bounds (H_kv, S + 1) -> vectors (H_kv, S, D), spreads (H_kv, S) in float32
    """
    keys, dtype, lengths = keys.float(), keys.dtype, bounds.diff(dim=-1)

    def average(x):  # `unsafe`: the bounds tile the rows; to check it the host would await the GPU
        sums = torch.segment_reduce(x, "sum", lengths=lengths, axis=1, unsafe=True)
        return sums / lengths.clamp(min=1).view(*lengths.shape, *[1] * (x.dim() - 2))

    vectors = average(keys)
    spreads = average(keys.square().mean(dim=-1)) - vectors.square().mean(dim=-1)
    return vectors.to(dtype), spreads.clamp(min=0)


def take_best(scores, lengths, room) -> torch.Tensor:
    """How many rows to take of each sentence: the best ones whole while there is room.

    The last of them is cut to fit, in reading order (Section 3.3). This sorts S scores and never N
    tokens.

    scores (H_kv, S), lengths (H_kv, S) in rows, room (1,) in rows -> (H_kv, S)

    >>> take_best(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[3, 3, 2]]), torch.tensor([4]))
    tensor([[0, 3, 1]])
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)  # best sentence first
    lengths = lengths.gather(-1, order)
    excess = (lengths.cumsum(dim=-1) - room).clamp(min=0)  # too many, with the i-th best one
    taken = (lengths - excess).clamp(min=0)
    return torch.empty_like(taken).scatter_(-1, order, taken)
