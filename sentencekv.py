"""SentenceKV (arXiv 2504.00970) as pure functions on tensors.

A plain Llama reads the keys and values of all earlier tokens for every token it writes. SentenceKV
reads those of a few sentences. This file decides which, in this order:

    prefill (Section 3.2)   token_importance -> keep_tokens -> sentence_bounds -> sentence_vectors
    decode  (Section 3.3)   mean_query or gaussian -> select_rows

It knows nothing of text, devices, layers or memory. Everything is per KV head: the query heads of
a group choose together, so the memory that grouped-query attention saves stays saved.

Shapes: T prompt tokens, N kept tokens (their keys and values are called rows), S sentences,
    H query heads, H_kv KV heads, G = H // H_kv, D channels of a head, W observation window.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class SentenceKVConfig:
    """How many tokens prefill keeps, and how many of them decoding attends to.

    The paper writes τ for `token_budget` and r for `keep_factor`: prefill keeps the ⌊r · τ⌋ most
    important tokens of the prompt and drops the others for good. The paper's runs use r = 1 to 5.
    The default here is infinity: every token is kept in host memory, and no importance is computed.

    Raises ValueError, with the value and the limit, for a setting that cannot work.
    """

    token_budget: int = 1024  # tokens attended to per KV head while decoding
    keep_factor: float = math.inf
    sink_tokens: int = 4  # first tokens of the prompt, always attended to
    recent_window: int = 32  # last tokens, always attended to
    observation_window: int = 32  # last queries of the prompt, which judge importance
    score: str = "gaussian"  # a name in SCORES
    sentence_limit: int = 128  # tokens; a longer sentence is cut

    def __post_init__(self):
        for name, least in (("sink_tokens", 0), ("recent_window", 1), ("observation_window", 1),
                            ("sentence_limit", 1), ("keep_factor", 1)):
            if not getattr(self, name) >= least:  # `not >=` also refuses NaN
                raise ValueError(f"{name} is {getattr(self, name)}, the least is {least}")
        least = self.sink_tokens + self.protected_tokens + 1
        if self.token_budget < least:
            raise ValueError(f"token_budget is {self.token_budget}, the least is {least}:"
                             f" {self.sink_tokens} sinks + {self.protected_tokens} recent + 1")
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}, the choices are {', '.join(SCORES)}")

    @property
    def protected_tokens(self) -> int:
        """Last tokens of the prompt that prefill never drops."""
        return max(self.recent_window, self.observation_window * (self.keep_factor < math.inf))

    @property
    def selected_rows(self) -> int:
        """B, the part of the budget that is left for rows of sentences."""
        return self.token_budget - self.sink_tokens - self.recent_window

    def kept_tokens(self, n_tokens: int) -> int:
        """N, the rows kept of a prompt of `n_tokens`."""
        return int(min(n_tokens, self.keep_factor * self.token_budget))


def token_importance(q: torch.Tensor, k: torch.Tensor, pool: int = 7) -> torch.Tensor:
    """The attention that the prompt's last W queries pay to each earlier token.

    SnapKV's score (arXiv 2404.14469): summed over the observation window, averaged over the group,
    and max-pooled, so that the neighbours of an important token are kept as well.

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
    """Positions of the tokens that each head keeps, in reading order.

    The observation window is always kept, as in the paper. So are the sinks and the recent window,
    which the paper does not say: the first and last rows of all heads are then the same tokens.

    importance (H_kv, T - W) -> (H_kv, N)
    """
    importance = F.pad(importance, (0, n_tokens - importance.shape[-1]), value=math.inf)
    importance[:, : config.sink_tokens] = math.inf
    importance[:, n_tokens - config.protected_tokens :] = math.inf
    # Pooling makes ties. A stable sort breaks them alike on every device; `topk` does not.
    ranked = importance.argsort(dim=-1, descending=True, stable=True)
    return ranked[:, : config.kept_tokens(n_tokens)].sort(dim=-1).values


def sentence_bounds(kept: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The row at which each sentence begins; it ends where the next one begins.

    A sentence of which a head keeps nothing is left out, and an empty one is added at the end.

    kept (H_kv, N) positions, ends (S,) positions after each sentence -> (H_kv, S + 1)

    >>> sentence_bounds(torch.tensor([[0, 1, 8, 9]]), torch.tensor([4, 7, 10])).tolist()
    [[0, 2, 4, 4]]
    """
    ends = torch.searchsorted(kept, ends.expand(len(kept), -1).contiguous())  # positions to rows
    empty = ends.diff(dim=-1, prepend=torch.zeros_like(ends[:, :1])) == 0
    return F.pad(ends.masked_fill(empty, kept.shape[-1]).sort(dim=-1).values, (1, 0))


def sentence_vectors(keys: torch.Tensor, bounds: torch.Tensor) -> tuple:
    """The semantic vector of each sentence: the mean of its kept keys, after RoPE (Section 3.2).

    And its variance, which is not in the paper: the squared distance of a key from that mean,
    averaged over keys and channels. An empty sentence gets zeros.

    keys (H_kv, N, D), bounds (H_kv, S + 1) -> (H_kv, S, D) in the keys' dtype, (H_kv, S) in float32

    >>> sentence_vectors(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), torch.tensor([[0, 2]]))
    (tensor([[[2., 0.]]]), tensor([[0.5000]]))
    """
    keys, dtype, lengths = keys.float(), keys.dtype, bounds.diff(dim=-1)

    def mean(x):  # without `unsafe`, the host would wait for the GPU to check the lengths' sum
        sums = torch.segment_reduce(x, "sum", lengths=lengths, axis=1, unsafe=True)
        return sums / lengths.clamp(min=1).view(*lengths.shape, *[1] * (x.dim() - 2))

    vectors = mean(keys)
    variances = mean(keys.square().mean(dim=-1)) - vectors.square().mean(dim=-1)
    return vectors.to(dtype), variances.clamp(min=0)  # rounding can make a variance negative


def mean_query(q, vectors, variances, lengths) -> torch.Tensor:
    """The paper's score (Section 3.3): the mean query of the sentence being written, times the
    sentence vector. The product is linear, so the sum of these scores over the tokens written
    ranks the sentences in the same way.

    q (H_kv, G, D) of one token, vectors (H_kv, S, D), variances and lengths unused -> (H_kv, S)
    """
    return (vectors @ q.mean(dim=1).unsqueeze(-1)).squeeze(-1).float()


def gaussian(q, vectors, variances, lengths) -> torch.Tensor:
    """The attention that a token of the sentence receives on average, if its keys are Gaussian.

    For keys k with mean µ and variance σ² in every channel, and a query q already divided by √D,
    the mean of exp(q · k) is exp(q · µ + |q|² σ² / 2). A sentence of n such keys receives n times
    that in a softmax over all sentences. The budget counts tokens, so the score is per token.

    Not in the paper. Expected Attention (arXiv 2510.00636) takes the *queries* for Gaussian, to
    decide what to evict at prefill. This is its dual.

    q (H_kv, G, D) of one token, vectors µ (H_kv, S, D), variances σ² and lengths n (H_kv, S)
    -> (H_kv, S)
    """
    q = q / math.sqrt(q.shape[-1])
    half_norms = q.float().square().sum(dim=-1, keepdim=True) / 2  # |q|² / 2 (H_kv, G, 1)
    log_means = q @ vectors.mT + half_norms * variances.unsqueeze(1)  # (H_kv, G, S)
    # An empty sentence has ln 0 = -inf and receives nothing.
    attention = (log_means + lengths.log().unsqueeze(1)).softmax(dim=-1)
    return attention.sum(dim=1) / lengths.clamp(min=1)


# `SCORES["mine"] = mine` registers a score of your own, as benchmarks/scores.py does.
SCORES = {"mean_query": mean_query, "gaussian": gaussian}


def select_rows(scores, lengths, room) -> torch.Tensor:
    """How many rows to select of each sentence: the best sentences whole, while there is room, and
    of the last one the first rows (Section 3.3). This sorts S scores, and never N tokens.

    scores (H_kv, S), lengths (H_kv, S) in rows, room (1,) in rows -> (H_kv, S)

    >>> select_rows(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[3, 3, 2]]), torch.tensor([4]))
    tensor([[0, 3, 1]])
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)  # best sentence first
    lengths = lengths.gather(-1, order)
    excess = (lengths.cumsum(dim=-1) - room).clamp(min=0)  # rows too many, up to this sentence
    selected = (lengths - excess).clamp(min=0)
    return torch.empty_like(selected).scatter_(-1, order, selected)
