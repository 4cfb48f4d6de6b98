"""SentenceKV (arXiv 2504.00970) as pure functions on tensors.

A plain Llama reads the keys and values of all earlier tokens for every token it writes. SentenceKV
reads those of a few sentences. This file decides which, in this order:

    prefill (Section 3.2)   find_secondary_sinks, token_importance -> keep_tokens -> order_rows
                            -> sentence_bounds -> sentence_vectors
    decode  (Section 3.3)   mean_query or gaussian -> select_rows

It knows nothing of text, devices, layers or memory. Everything is per KV head: the query heads of
a group share one selection, so each key is read once for all of them. A row of a KV head is the
key and the value of a kept token.

Shapes: T prompt tokens, N kept tokens or rows, S sentences, W tokens of the observation window,
    H query heads, H_kv KV heads, G = H // H_kv, D channels of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


MOST = 2**31  # of a setting that counts tokens


@dataclass(frozen=True)
class SentenceKVConfig:
    """The settings of the method.

    The paper writes τ for the token budget and r for the keep factor: prefill keeps the ⌊r · τ⌋
    most important tokens of the prompt and drops the others permanently. The paper uses r = 1 to 5.
    The default here is infinity: every token is kept in host memory, and no importance is computed.

    Raises ValueError, with the value and the limit, for a setting that cannot work.
    """

    token_budget: int = 1024  # tokens attended to per KV head while decoding
    keep_factor: float = math.inf
    sink_tokens: int = 4  # first tokens of the prompt, always attended to
    secondary_sinks: int = 8  # at most so many in a head: its shortest keys, always attended to
    secondary_ratio: float = 0.6  # their length, at most this fraction of the head's median
    recent_window: int = 32  # last tokens, always attended to
    observation_window: int = 32  # last queries of the prompt: their attention is importance
    score: str = "gaussian"  # a name in SCORES
    query_decay: float = 0.9  # weight of a query is this ** (tokens since); 1 in the paper
    sentence_limit: int = 16  # tokens; a longer sentence is cut, at a clause if possible

    def __post_init__(self):
        for name, least in (("sink_tokens", 0), ("secondary_sinks", 0), ("secondary_ratio", 0),
                            ("recent_window", 1), ("observation_window", 1), ("sentence_limit", 1),
                            ("keep_factor", 1), ("query_decay", 0)):
            if not getattr(self, name) >= least:  # `not >=` also refuses NaN
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        for name, kind in self.__annotations__.items():
            if kind is int and getattr(self, name) > MOST:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at most {MOST}")
        if self.query_decay > 1:
            raise ValueError(f"query_decay is {self.query_decay}, must be at most 1")
        sinks = self.sink_tokens + self.secondary_sinks
        least = sinks + self.protected_tokens + 1
        if self.token_budget < least:
            raise ValueError(f"token_budget is {self.token_budget}, must be at least {least}:"
                             f" {sinks} sinks + {self.protected_tokens} last tokens + 1")
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}, the choices are {', '.join(SCORES)}")

    @property
    def protected_tokens(self) -> int:
        """Last tokens of the prompt that prefill never drops or makes secondary sinks. Those of the
        observation window are among them where importance is computed."""
        observed = 0 if self.keep_factor == math.inf else self.observation_window
        return max(self.recent_window, observed)

    def n_kept(self, n_tokens: int) -> int:
        """N, the rows kept of a prompt of `n_tokens`."""
        return int(min(n_tokens, self.keep_factor * self.token_budget))


def find_secondary_sinks(k: torch.Tensor, config: SentenceKVConfig) -> torch.Tensor:
    """Which tokens are secondary sinks: those with the shortest keys of their head, if these are
    much shorter than its median. Not in the paper.

    In some layers attention does not rest on the first tokens, but on a few in the middle of the
    text, whatever is asked (arXiv 2512.22213). The mean of a sentence's keys hides one such key. No
    query is needed to find them: their keys are short, and RoPE does not change a length.

    k (H_kv, T, D) -> (H_kv, T) bool, True at most `config.secondary_sinks` times in a head
    """
    norms = k.float().norm(dim=-1)  # (H_kv, T)
    limit = config.secondary_ratio * norms.median(dim=-1, keepdim=True).values
    norms[:, : config.sink_tokens] = math.inf  # attended to anyway
    norms[:, -config.protected_tokens :] = math.inf
    shortest = norms.argsort(dim=-1, stable=True)[:, : config.secondary_sinks]
    short = norms.gather(-1, shortest) < limit
    return torch.zeros_like(norms, dtype=torch.bool).scatter_(-1, shortest, short)


def token_importance(q: torch.Tensor, k: torch.Tensor, pool: int = 7) -> torch.Tensor:
    """Token importance: the attention that the prompt's last W queries pay to each earlier token.

    SnapKV's score (arXiv 2404.14469): summed over the window, averaged over the group, and
    max-pooled, so that the neighbours of an important token are kept as well.

    q (H, W, D) of the last W tokens, k (H_kv, T, D) -> (H_kv, T - W)
    """
    (_, window, dim), (kv_heads, tokens, _) = q.shape, k.shape
    grouped = q.reshape(kv_heads, -1, dim)  # (H_kv, G * W, D)
    logits = (grouped @ k.mT).float().view(kv_heads, -1, window, tokens) / math.sqrt(dim)
    future = torch.ones(window, tokens, dtype=torch.bool, device=q.device).triu(tokens - window + 1)
    logits.masked_fill_(future, -math.inf)
    received = logits.softmax(dim=-1).sum(dim=2).mean(dim=1)  # (H_kv, T)
    return F.max_pool1d(received[:, : tokens - window], pool, stride=1, padding=pool // 2)


def keep_tokens(importance, secondary, config: SentenceKVConfig) -> torch.Tensor:
    """Positions of the tokens that each head keeps, in reading order.

    The observation window is always kept, as in the paper. So are all sinks and the recent window,
    which the paper does not say. `SentenceKVCache.plan` relies on it: in every head, the sinks come
    after the secondary sinks, and the last rows are the same tokens.

    importance (H_kv, T - W), secondary (H_kv, T) -> (H_kv, N)
    """
    n_tokens = secondary.shape[-1]
    importance = F.pad(importance, (0, n_tokens - importance.shape[-1]))
    importance.masked_fill_(secondary, math.inf)
    importance[:, : config.sink_tokens] = math.inf
    importance[:, n_tokens - config.protected_tokens :] = math.inf
    # Pooling makes ties. A stable sort breaks them alike on every device; `topk` does not.
    ranked = importance.argsort(dim=-1, descending=True, stable=True)
    return ranked[:, : config.n_kept(n_tokens)].sort(dim=-1).values


def order_rows(kept: torch.Tensor, secondary: torch.Tensor) -> tuple:
    """The order of a head's rows: its secondary sinks, then all other kept tokens as they are read.

    The secondary sinks are always attended to, so they belong to no sentence that is selected. The
    second result marks them with -1 for `sentence_bounds`.

    kept (H_kv, N) positions in reading order, secondary (H_kv, T) -> two of (H_kv, N)

    >>> order_rows(torch.tensor([[0, 1, 2, 4]]), torch.tensor([[0, 0, 1, 0, 0]]).bool())
    (tensor([[2, 0, 1, 4]]), tensor([[-1,  0,  1,  4]]))
    """
    marked, order = kept.masked_fill(secondary.gather(-1, kept), -1).sort(dim=-1, stable=True)
    return kept.gather(-1, order), marked


def sentence_bounds(marked: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The row at which each sentence begins. The sentence ends where the next one begins.

    A sentence of which a head keeps nothing becomes an empty one at the end. So sentence s of one
    head need not be sentence s of another.

    marked (H_kv, N) positions, -1 for those of no sentence, ends (S,) positions after each sentence
    -> (H_kv, S + 1)

    >>> sentence_bounds(torch.tensor([[-1, 0, 1, 8, 9]]), torch.tensor([4, 7, 10])).tolist()
    [[1, 3, 5, 5]]
    """
    ends = F.pad(ends, (1, 0)).expand(len(marked), -1).contiguous()  # 0: before all sentences
    bounds = torch.searchsorted(marked, ends)  # the rows before each end
    empty = F.pad(bounds.diff(dim=-1) == 0, (1, 0))
    return bounds.masked_fill(empty, marked.shape[-1]).sort(dim=-1).values  # empty ones go last


def sentence_vectors(keys: torch.Tensor, bounds: torch.Tensor) -> tuple:
    """The semantic vector of each sentence: the mean of its kept keys, after RoPE (Section 3.2).

    Also returns its variance (not in the paper): the squared distance of a key from that mean,
    averaged over keys and channels. An empty sentence gets zeros. Rows before the first sentence
    take no part.

    keys (H_kv, N, D), bounds (H_kv, S + 1) -> (H_kv, S, D) in the keys' dtype, (H_kv, S) in float32

    >>> sentence_vectors(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), torch.tensor([[0, 2]]))
    (tensor([[[2., 0.]]]), tensor([[0.5000]]))
    """
    keys, dtype, lengths = keys.float(), keys.dtype, F.pad(bounds, (1, 0)).diff(dim=-1)

    def mean(x):  # of the rows of each sentence, (H_kv, N, n) -> (H_kv, S, n)
        # `unsafe` skips a check of the lengths, for which the host would wait for the GPU.
        sums = torch.segment_reduce(x, "sum", lengths=lengths, axis=1, unsafe=True)
        return (sums / lengths.clamp(min=1).unsqueeze(-1))[:, 1:]

    vectors = mean(keys)
    squares = mean(keys.square().mean(dim=-1, keepdim=True)).squeeze(-1)
    variances = squares - vectors.square().mean(dim=-1)  # E[k²] - µ²
    return vectors.to(dtype), variances.clamp(min=0)  # rounding can make a variance negative


def mean_query(q, vectors, variances, lengths) -> torch.Tensor:
    """The paper's score (Section 3.3): the mean query of the sentence being written, times the
    sentence vector. It is linear in the query, so its sum over tokens ranks as the mean does, if
    `query_decay` is 1; a smaller one makes it a weighted mean. One selection per group needs the
    mean over its query heads, too.

    q (H_kv, G, D) of one token, vectors (H_kv, S, D), variances and lengths unused -> (H_kv, S)
    """
    return (vectors @ q.mean(dim=1).unsqueeze(-1)).squeeze(-1).float()


def gaussian(q, vectors, variances, lengths) -> torch.Tensor:
    """The attention that a token of the sentence receives on average, if its keys are Gaussian.

    For Gaussian keys k with mean µ and covariance σ² I, and x = q · k / √D, the mean of exp(x) is
    exp(q · µ / √D + |q|² σ² / 2D). In the softmax over all sentences, one of n keys counts n times.
    Its share is divided by n, because the budget counts tokens, and summed over the G query heads.

    Not in the paper. Expected Attention (arXiv 2510.00636) assumes that the *queries* are Gaussian,
    to decide what to evict. Here the keys are assumed Gaussian instead: this is its dual.

    q (H_kv, G, D) of one token, vectors µ (H_kv, S, D), variances σ² and lengths n (H_kv, S)
    -> (H_kv, S)
    """
    q = q / math.sqrt(q.shape[-1])
    squared_norms = q.float().square().sum(dim=-1, keepdim=True)  # |q|² (H_kv, G, 1)
    log_mean_exp = q @ vectors.mT + squared_norms * variances.unsqueeze(1) / 2  # (H_kv, G, S)
    # An empty sentence has ln 0 = -inf and receives nothing.
    attention = (log_mean_exp + lengths.log().unsqueeze(1)).softmax(dim=-1)
    return attention.sum(dim=1) / lengths.clamp(min=1)


# `SCORES["mine"] = mine` registers a score of your own, as benchmarks/scores.py does.
SCORES = {"mean_query": mean_query, "gaussian": gaussian}


def select_rows(scores, lengths, row_budget, most: int = MOST) -> torch.Tensor:
    """How many rows to select of each sentence: all of the best ones, until the budget is full, and
    the first rows of the last one (Section 3.3). Only S scores are compared, and no tokens.

    scores (H_kv, S), lengths (H_kv, S) in rows, row_budget (H_kv, 1), at most `most` -> (H_kv, S)

    >>> select_rows(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[3, 3, 2]]), torch.tensor([[4]]))
    tensor([[0, 3, 1]])
    """
    # A selected sentence takes at least one row, so the best `most` are enough, without empty ones.
    # Equal scores come in any order, which can differ between devices.
    n = min(most, scores.shape[-1])
    best = scores.masked_fill(lengths == 0, -math.inf).topk(n, dim=-1).indices
    available = lengths.gather(-1, best)
    excess = (available.cumsum(dim=-1) - row_budget).clamp(min=0)  # rows too many, up to this one
    selected = (available - excess).clamp(min=0)
    return torch.zeros_like(lengths).scatter_(-1, best, selected)
