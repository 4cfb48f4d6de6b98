"""SentenceKV (arXiv 2504.00970v2) as pure functions on tensors.

For every token it writes, a plain Llama reads the keys and values of all earlier tokens. SentenceKV
reads those of a few sentences. This file decides which, for one layer, in this order:

    prefill (Section 4.1)   find_secondary_sinks, token_importance -> keep_tokens -> order_rows
                            -> sentence_bounds -> sentence_vectors
    decode  (Section 4.2)   mean_query or gaussian -> select_rows

Everything is per KV head: the query heads of a group share one selection, so each key is read once
for all of them. A *row* of a KV head is the key and the value of a kept token.
Shapes: T prompt tokens, N kept tokens or rows, S sentences, W tokens of the observation window,
    H query heads, H_kv KV heads, G = H // H_kv, D channels of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.largest import largest
from support.settings import MAX_COUNT, check_settings


@dataclass(frozen=True)
class SentenceKVConfig:
    """The settings. The paper writes τ for the token budget, and r for the keep factor: prefill
    keeps the ⌊r · τ⌋ most important tokens of the prompt, and drops the others for good. With
    infinity it drops none. τ has room for all sinks, the protected tokens and one more.
    ValueError for a wrong setting."""

    token_budget: int = 1024  # tokens attended to per KV head while decoding
    keep_factor: float = math.inf  # 1 to 5 in the paper
    sink_tokens: int = 4  # first tokens of the prompt, always attended to
    secondary_sinks: int = 8  # at most so many in a head: tokens whose keys have a small norm
    secondary_ratio: float = 0.6  # small: below this fraction of the head's median norm
    recent_window: int = 32  # last tokens, always attended to
    observation_window: int = 32  # last queries of the prompt: their attention is importance
    score: str = "gaussian"  # a name in SCORES; benchmarks/scores.py adds one
    query_decay: float = 0.9  # weight of a query is this ** (tokens since); 1 in the paper
    kv_bits: int = 8  # of each channel that is remembered; 16: the model's dtype, as in the paper
    sentence_limit: int = 16  # tokens; a longer sentence is cut, at a clause if possible
    reuse_layers: int = 1  # of so many layers, the first chooses for all; ChunkKV, 2502.00299

    def __post_init__(self):
        check_settings(self, SCORES)

    @property
    def protected_tokens(self) -> int:
        """Number of last tokens that prefill never drops, and never makes secondary sinks."""
        observed = self.observation_window if self.keep_factor < math.inf else 0  # inf: all stay
        return max(self.recent_window, observed)

    def n_kept(self, n_tokens: int) -> int:
        """N, the rows kept of a prompt of `n_tokens`."""
        return int(min(n_tokens, self.keep_factor * self.token_budget))


def find_secondary_sinks(k: torch.Tensor, config: SentenceKVConfig) -> torch.Tensor:
    """Which tokens are secondary sinks, the shortest keys of their head. Not in the paper.

    In some layers much attention goes to a few tokens in the middle of the text, whatever is asked
    (arXiv 2512.22213). In the default model, q · k is negative for most keys. A key of small norm
    has q · k near 0, more than the others. A sentence vector hides such a key. Its norm shows it.

    k (H_kv, T, D) -> (H_kv, T) bool, True at most `config.secondary_sinks` times in a head
    """
    norms = k.float().norm(dim=-1)  # (H_kv, T)
    threshold = config.secondary_ratio * norms.median(dim=-1, keepdim=True).values
    norms[:, : config.sink_tokens] = math.inf  # attended to anyway
    norms[:, -config.protected_tokens :] = math.inf
    shortest = norms.argsort(dim=-1, stable=True)[:, : config.secondary_sinks]
    short = norms.gather(-1, shortest) < threshold
    return torch.zeros_like(norms, dtype=torch.bool).scatter_(-1, shortest, short)


def token_importance(q: torch.Tensor, k: torch.Tensor, pool: int = 7) -> torch.Tensor:
    """The attention that the prompt's last W queries pay to each earlier token.

    SnapKV's score (arXiv 2404.14469): summed over the window, averaged over the group, and
    max-pooled, so that the neighbours of an important token are kept as well.

    q (H, W, D) of the last W tokens, k (H_kv, T, D) -> (H_kv, T - W)
    """
    (_, window, dim), (kv_heads, tokens, _) = q.shape, k.shape  # W, D, H_kv, T
    grouped = q.reshape(kv_heads, -1, dim)  # (H_kv, G * W, D)
    logits = (grouped @ k.mT).float().view(kv_heads, -1, window, tokens) / math.sqrt(dim)
    future = torch.ones(window, tokens, dtype=torch.bool, device=q.device).triu(tokens - window + 1)
    logits.masked_fill_(future, -math.inf)  # (H_kv, G, W, T)
    received = logits.softmax(dim=-1).sum(dim=2).mean(dim=1)  # (H_kv, T)
    return F.max_pool1d(received[:, : tokens - window], pool, stride=1, padding=pool // 2)


def keep_tokens(importance, secondary, config: SentenceKVConfig) -> torch.Tensor:
    """Positions of the tokens that each head keeps, in reading order.

    The observation window is always kept: the paper does not say so, the authors' code does it. So
    are all sinks and the recent window: `cache.py` relies on it.

    importance (H_kv, T - W), secondary (H_kv, T) -> (H_kv, N)
    """
    n_tokens = secondary.shape[-1]
    importance = F.pad(importance, (0, n_tokens - importance.shape[-1]))
    importance.masked_fill_(secondary, math.inf)
    importance[:, : config.sink_tokens] = math.inf
    importance[:, n_tokens - config.protected_tokens :] = math.inf
    # Pooling makes equal numbers. A stable sort has the same order of them on every device.
    ranked = importance.argsort(dim=-1, descending=True, stable=True)
    return ranked[:, : config.n_kept(n_tokens)].sort(dim=-1).values


def order_rows(kept: torch.Tensor, secondary: torch.Tensor) -> tuple:
    """The positions of a head's rows: its secondary sinks come first, as they are in no sentence,
    then the other kept tokens as they are read. The second result has -1 for secondary sinks.

    kept (H_kv, N) positions in reading order, secondary (H_kv, T) bool -> two of (H_kv, N)

    >>> order_rows(torch.tensor([[0, 1, 2, 4]]), torch.tensor([[0, 0, 1, 0, 0]]).bool())
    (tensor([[2, 0, 1, 4]]), tensor([[-1,  0,  1,  4]]))
    """
    marked, order = kept.masked_fill(secondary.gather(-1, kept), -1).sort(dim=-1, stable=True)
    return kept.gather(-1, order), marked


def sentence_bounds(marked: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The row at which each sentence begins. It ends where the next one begins.

    Sentences of which a head keeps nothing go to the end of its list, so that the table can be cut
    there. Hence index s can mean different sentences in two heads.

    marked (H_kv, N) from `order_rows`, ends (S,), the position after each sentence -> (H_kv, S + 1)

    Sentences end at 4, 7 and 10. Row 0 is a secondary sink, rows 1 and 2 are of the first sentence,
    none is of the second, rows 3 and 4 are of the third:

    >>> sentence_bounds(torch.tensor([[-1, 0, 1, 8, 9]]), torch.tensor([4, 7, 10])).tolist()
    [[1, 3, 5, 5]]
    """
    starts_and_end = F.pad(ends, (1, 0)).expand(len(marked), -1).contiguous()  # 0, 4, 7, 10
    bounds = torch.searchsorted(marked, starts_and_end)  # rows before each: 1, 3, 3, 5
    repeated = F.pad(bounds.diff(dim=-1) == 0, (1, 0))  # the second 3, which becomes N
    return bounds.masked_fill(repeated, marked.shape[-1]).sort(dim=-1).values  # 1, 3, 5, 5


def sentence_vectors(keys: torch.Tensor, bounds: torch.Tensor) -> tuple:
    """The semantic vector of each sentence: the mean of its kept keys, after RoPE (Section 4.1).

    Also returns its variance (not in the paper): the squared distance of a key from that mean,
    averaged over keys and channels. An empty sentence gets zeros.

    keys (H_kv, N, D), bounds (H_kv, S + 1) -> (H_kv, S, D) in the keys' dtype, (H_kv, S) in float32

    >>> sentence_vectors(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), torch.tensor([[0, 2]]))
    (tensor([[[2., 0.]]]), tensor([[0.5000]]))
    """
    keys, dtype = keys.float(), keys.dtype
    # Lengths must add up to N. So rows before the first sentence are a group: `[:, 1:]` drops it.
    lengths = torch.cat((bounds[:, :1], bounds.diff(dim=-1)), dim=-1)  # (H_kv, 1 + S)

    def mean(x):  # of the rows of each sentence, (H_kv, N, n) -> (H_kv, S, n)
        # It sums groups of `lengths` rows. `unsafe` skips a check that would wait for the GPU.
        sums = torch.segment_reduce(x, "sum", lengths=lengths, axis=1, unsafe=True)
        return (sums / lengths.clamp(min=1).unsqueeze(-1))[:, 1:]

    vectors = mean(keys)
    squares = mean(keys.square().mean(dim=-1, keepdim=True)).squeeze(-1)
    variances = squares - vectors.square().mean(dim=-1)  # E[k²] - µ²
    return vectors.to(dtype), variances.clamp(min=0)  # rounding can make a variance negative


def mean_query(q, vectors, variances, lengths) -> torch.Tensor:
    """The paper's score (Section 4.2) for one token: the sentence vector times the mean query of
    the group's heads. The paper takes the mean over the tokens of the open sentence. The cache adds
    up their scores: with a decay of 1, the sums rank sentences as the means do.

    q (H_kv, G, D) of one token, vectors (H_kv, S, D), variances and lengths unused -> (H_kv, S)
    """
    return (vectors @ q.mean(dim=1).unsqueeze(-1)).squeeze(-1).float()


def gaussian(q, vectors, variances, lengths) -> torch.Tensor:
    """The attention that a token of the sentence receives on average, among the sentences, if keys
    are Gaussian. Not in the paper: Expected Attention (arXiv 2510.00636) has Gaussian queries.

    The share of a key is proportional to exp x, x = q · k / √D. A normal x of mean m and variance
    s² has E[exp x] = exp(m + s² / 2). Here m = q · µ / √D, and s² = |q|² σ² / D if all channels
    have variance σ². The share of n keys is divided by n, because the budget counts tokens.

    q (H_kv, G, D), vectors µ (H_kv, S, D), variances σ² and lengths n (H_kv, S) -> (H_kv, S)
    """
    scaled = q / math.sqrt(q.shape[-1])
    squares = scaled.float().square().sum(dim=-1, keepdim=True)  # |q|² / D (H_kv, G, 1)
    log_mean_exp = scaled @ vectors.mT + squares * variances.unsqueeze(1) / 2  # (H_kv, G, S)
    attention = (log_mean_exp + lengths.log().unsqueeze(1)).softmax(-1)  # empty: ln 0 = -inf
    return attention.sum(dim=1) / lengths.clamp(min=1)


SCORES = {"mean_query": mean_query, "gaussian": gaussian}


def select_rows(scores, available, budget, max_sentences: int = MAX_COUNT) -> torch.Tensor:
    """How many rows to select of each sentence (Section 4.2): all of the best ones, and of the one
    that no longer fits the budget, its first rows. Equal scores come in any order.

    scores (H_kv, S); available (H_kv, S), rows that can be selected; budget in rows of a head, a
    number or a tensor with one; at most `max_sentences` are selected -> (H_kv, S)

    Of a budget of 4 rows, the best sentence takes its 3. Of the next best, one row fits:
    >>> select_rows(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[3, 3, 2]]), budget=4)
    tensor([[0, 3, 1]])
    """
    n = min(max_sentences, scores.shape[-1])  # a few of many are found faster than all are sorted
    if n < scores.shape[-1]:  # else one without rows could take another's place
        scores = scores.masked_fill(available == 0, -math.inf)
    best = largest(scores, n)  # 1, 2, 0
    counts = available.gather(-1, best)  # 3, 2, 3
    excess = (counts.cumsum(-1, dtype=counts.dtype) - budget).clamp(min=0)  # rows too many: 0, 1, 4
    selected = (counts - excess).clamp(min=0)  # 3, 1, 0
    return torch.zeros_like(available).scatter_(-1, best, selected)
