"""A cache of your own: SentenceKV for one prompt and one answer, one layer at a time.

It has no slots: for each token, all rows that the token attends to come from the host. Rows have
numbers as in `cache.py`: the secondary sinks of a head first, then its other kept tokens as they
are read. The rows from `host.shape[1]` on are those of the open sentence.

Shapes: H query heads, H_kv KV heads, G = H // H_kv, D channels of a head, T tokens of the prompt,
N rows kept of them, S sentences.
"""

import math

import torch
import torch.nn.functional as F

from sentencekv import (SCORES, find_secondary_sinks, keep_tokens, order_rows, select_rows,
                        sentence_bounds, sentence_vectors, token_importance)


class Layer:
    """One layer. `Cache.expect` sets `ends` (S,), the position after each sentence of the prompt,
    and `n_first_sinks`, the number of first tokens that are always attended to.

    host       (H_kv, n, 2, D)  on the host: the rows of all sentences in the table
    open       (H_kv, m, 2, D)  on the device: the rows of the open sentence
    bounds     (H_kv, S + 1)    the row at which each sentence begins, then the end of the last one
    vectors    (H_kv, S, D)     the mean key of each sentence
    variances  (H_kv, S)        of its keys
    scores     (H_kv, S)        how well it matches the open sentence
    """

    def __init__(self, config, heads: int, dim: int, device, dtype):
        self.config, self.prompt = config, None
        self.host = torch.zeros(heads, 0, 2, dim, dtype=dtype)
        self.open = self.host.to(device)
        self.vectors = torch.zeros(heads, 0, dim, device=device, dtype=dtype)
        self.variances = torch.zeros(heads, 0, device=device)

    def prefill(self, q, k, v) -> tuple:
        """Take the whole prompt, which attends to itself: q (H, T, D), k and v (H_kv, T, D)."""
        self.prompt = q, k, v
        return k, v

    def order(self, kept, secondary) -> torch.Tensor:
        """Step 1. Put the kept tokens in the order of rows, and set `bounds` for the prompt.

        kept (H_kv, N) positions in reading order, secondary (H_kv, T) bool
        -> (H_kv, N), the position of each row
        """
        positions, marked = order_rows(kept, secondary)
        self.bounds = sentence_bounds(marked, self.ends)
        return positions

    def add_sentences(self, keys, bounds):
        """Step 2. Add the sentences between these bounds to `vectors` and `variances`. Set `scores`
        to one zero for each sentence, old and new.

        keys (H_kv, n, D), bounds (H_kv, s + 1) in these n keys, for s sentences
        """
        vectors, variances = sentence_vectors(keys, bounds)
        self.vectors = torch.cat((self.vectors, vectors), dim=1)
        self.variances = torch.cat((self.variances, variances), dim=1)
        self.scores = torch.zeros_like(self.variances)

    def add_score(self, q):
        """Step 3. Multiply `scores` by the query decay, and add the score for one token's queries,
        q (H, 1, D). The length of a sentence is the number of rows between its bounds."""
        grouped = q.view(len(self.vectors), -1, q.shape[-1])  # (H_kv, G, D)
        lengths = self.bounds.diff(dim=-1).float()
        score = SCORES[self.config.score](grouped, self.vectors, self.variances, lengths)
        self.scores = self.config.query_decay * self.scores + score

    def most_important(self, q, k, secondary) -> torch.Tensor:
        """Step 4. The positions of the tokens of the prompt that each head keeps, in reading order:
        all if `config.n_kept(T)` is T. q (H, T, D), k (H_kv, T, D) -> (H_kv, N)"""
        n_tokens = k.shape[1]
        if self.config.n_kept(n_tokens) == n_tokens:
            return torch.arange(n_tokens, device=k.device).expand(len(k), -1)
        importance = token_importance(q[:, -self.config.observation_window :], k)
        return keep_tokens(importance, secondary, self.config)

    def select(self, window_start: int) -> torch.Tensor:
        """Step 4. The rows on the host that the next token attends to: all sinks, selected rows of
        sentences, and the rows of its window that are on the host. They and the open rows of the
        window are as many as the budget allows, the same number in all heads -> (H_kv, n)

        `window_start` is the first row of the window, which ends with the last open row.
        """
        n_host = self.host.shape[1]
        budget = self.config.token_budget - (n_host + self.open.shape[1] - window_start)
        # All sinks are one sentence in front of the others. Its score is infinite.
        bounds = F.pad(self.bounds.clamp(min=self.bounds[:, :1] + self.n_first_sinks), (1, 0))
        bounds = bounds.clamp(max=min(window_start, n_host))  # only rows before the window
        scores = F.pad(self.scores, (1, 0), value=math.inf)
        counts = select_rows(scores, bounds.diff(dim=-1), budget)
        return torch.tensor([
            [row for start, n in zip(starts, ns) for row in range(start, start + n)]
            + [*range(window_start, n_host)]
            for starts, ns in zip(bounds.tolist(), counts.tolist())], dtype=torch.long)

    def load(self, rows) -> torch.Tensor:
        """Step 5. Copy rows from the host to the device: (H_kv, n) -> (H_kv, n, 2, D)"""
        head = torch.arange(len(rows))[:, None]
        return self.host[head, rows].to(self.open.device)

    def keep(self):
        """Step 5. The prompt is read. Find its secondary sinks, make its sentences with the methods
        above, and put the rows of the kept tokens on the host. Keep nothing else of `prompt`."""
        (q, k, v), self.prompt = self.prompt, None
        secondary = find_secondary_sinks(k, self.config)
        positions = self.order(self.most_important(q, k, secondary), secondary)
        head = torch.arange(len(k), device=k.device)[:, None]
        rows = torch.stack((k, v), dim=2)[head, positions]  # (H_kv, N, 2, D)
        self.add_sentences(rows[:, :, 0], self.bounds)
        self.host = rows.cpu()

    def decode(self, q, k, v) -> tuple:
        """Step 5. Take one token, q (H, 1, D), k and v (H_kv, 1, D): add its row to the open ones,
        add its score, and load what it attends to. Returns keys and values (H_kv, n, D), and None,
        because no head needs a mask."""
        self.open = torch.cat((self.open, torch.stack((k, v), dim=2)), dim=1)
        self.add_score(q)
        start = self.window_start()
        loaded = self.load(self.select(start))
        kv = torch.cat((loaded, self.open[:, max(start - self.host.shape[1], 0) :]), dim=1)
        return *kv.unbind(dim=2), None

    def window_start(self) -> int:
        """Step 6. The first row of the window, which ends with the last open row. It has
        `recent_window` rows, or begins with the open sentence if that is longer. It leaves room in
        the budget for `config.sink_tokens + config.secondary_sinks` rows, even if the prompt has
        fewer sinks, and begins after the first sinks."""
        config, open_row = self.config, self.host.shape[1]
        end = open_row + self.open.shape[1]
        most = config.token_budget - config.sink_tokens - config.secondary_sinks
        return max(min(end - config.recent_window, open_row), end - most, self.n_first_sinks)

    def seal(self, length: int):
        """Step 6. The first `length` open rows form a sentence: they go to the host, and the
        sentence gets its bounds, its vector and its variance. Rows after them stay open."""
        rows, self.open = self.open[:, :length], self.open[:, length:]
        bounds = torch.tensor([[0, length]], device=rows.device).expand(len(rows), -1)
        self.add_sentences(rows[:, :, 0], bounds)
        self.bounds = torch.cat((self.bounds, self.bounds[:, -1:] + length), dim=1)
        self.host = torch.cat((self.host, rows.cpu()), dim=1)


class Cache:
    """All layers, with the part of the protocol of `model.FullCache` that one prompt needs."""

    Layer = Layer

    def __init__(self, config, model_config, device, dtype):
        n_layers, heads, dim = model_config.kv_shape
        self.num_tokens = 0
        self.layers = [self.Layer(config, heads, dim, device, dtype) for _ in range(n_layers)]

    def expect(self, spans: list):
        """The prompt has these sentences, (start, end) in its tokens."""
        for layer in self.layers:
            layer.ends = torch.tensor([end for _, end in spans], device=layer.open.device)
            layer.n_first_sinks = min(layer.config.sink_tokens, spans[-1][1])

    def advance(self, n_tokens: int):
        self.num_tokens += n_tokens

    def seal(self, length: int):
        for layer in self.layers:
            layer.seal(length)
