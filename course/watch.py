"""A layer of a student's cache beside `tests/oracle.py`: each call goes to both, and the first
difference is said in a line. Keys are compared bit by bit, which tells of which token each one is.
"""

import sys
from copy import copy
from dataclasses import replace
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import TINY, random_ids, random_llama, random_spans  # noqa: F401
from oracle import SCORES
from slow_cache import SlowLayer, SlowSentenceKV  # noqa: F401

from sentencekv import keep_tokens, token_importance


class Difference(Exception):
    """What a student's layer does, and the oracle does not."""


class Watched:
    """Goes before a student's class, `class Both(Watched, Layer)`. Who makes a layer sets its
    `watcher`."""

    def prefill(self, q, k, v):
        return self.watcher.prefill(super().prefill(q, k, v), q, k, v)

    def keep(self):
        super().keep()
        self.watcher.keep(self)

    def most_important(self, q, k, secondary):
        return self.watcher.most_important(super().most_important(q, k, secondary), q, k, secondary)

    def load(self, rows):
        return self.watcher.load(super().load(rows))

    def window_start(self):
        return self.watcher.window_start(self, super().window_start())

    def select(self, window_start):
        self.watcher.used = self.scores.clone()
        return super().select(window_start)

    def decode(self, q, k, v):
        self.watcher.decode(q, k, v)
        return self.watcher.decoded(self, super().decode(q, k, v))

    def seal(self, length):
        super().seal(length)
        self.watcher.seal(self)


class Watcher:
    """What one layer was given, and the oracle's heads for it. `layers` are the watchers of all
    layers, `number` is the place of this one."""

    def __init__(self, slow: SlowLayer, number: int, layers: list):
        self.slow, self.number, self.layers = slow, number, layers
        self.kv = None  # all keys and values so far (H_kv, n, 2, D)
        self.queries = []  # of each written token (H, D)
        self.used = None  # the scores with which the last token selected

    def prefill(self, found, q, k, v) -> tuple:
        self.slow.prefill(q, k, v)
        self.kv = torch.stack((k, v), dim=2)
        if not isinstance(found, tuple) or not all(map(torch.equal, found, (k, v))):
            raise Difference("`prefill` returns the k and the v that it was given")
        return found

    def keep(self, layer):
        self.check_rows(layer)
        self.check_sentences(layer)
        self.check_device(layer)

    def most_important(self, found, q, k, secondary) -> torch.Tensor:
        """If other tokens are kept than by the oracle, try other queries, which would give them."""
        config, right = self.slow.heads[0].config, [sorted(head.kv) for head in self.slow.heads]
        if not torch.is_tensor(found) or found.tolist() == right or len(right[0]) == k.shape[1]:
            return found
        for which, queries in (("first queries", q[:, : config.observation_window]),
                               ("last `recent_window` queries", q[:, -config.recent_window :])):
            if torch.equal(found, keep_tokens(token_importance(queries, k), secondary, config)):
                raise Difference(f"`most_important` asks the {which} of the prompt: ask the last"
                                 " `config.observation_window`")
        return found

    def load(self, loaded) -> torch.Tensor:
        budget = self.slow.heads[0].config.token_budget
        if loaded.shape[1] > budget:
            raise Difference(f"`load` copies {loaded.shape[1]} rows of each head for one token, and"
                             f" the budget is {budget}: load only what the token attends to")
        return loaded

    def decode(self, q, k, v):
        self.slow.decode(q, k, v)
        self.kv = torch.cat((self.kv, torch.stack((k, v), dim=2)), dim=1)
        self.queries.append(q[:, 0])
        self.used = None

    def window_start(self, layer, found: int) -> int:
        head = self.slow.heads[0]
        expected = head.window()[0] - (head.n_tokens - len(head.kv))  # of a position, the row
        if found != expected:
            if layer.open.shape[1] == head.n_tokens - 1 - head.spans[-1][1]:
                raise Difference("`decode` must open the token's own row first: `window_start` and"
                                 " `select` count it")
            raise Difference(f"row {len(head.kv) - 1} has a window that begins at row {expected},"
                             f" and yours begins at row {found}")
        return found

    def decoded(self, layer, found) -> tuple:
        if not isinstance(found, (tuple, list)) or len(found) != 3:
            raise Difference("`decode` returns keys, values and None")
        keys, values, mask = found
        if keys.shape != values.shape or keys.shape[::2] != self.kv.shape[::3]:
            raise Difference(f"`decode` returns keys {tuple(keys.shape)} and values"
                             f" {tuple(values.shape)}, and not (H_kv, n, D)")
        rows = torch.stack((keys, values), dim=2)
        for head in range(len(rows)):
            seen = rows[head] if mask is None else rows[head, mask[head, 0]]
            self.check_attended(layer, head, self.positions_of(seen, head, "`decode` returns"))
        return found

    def seal(self, layer):
        self.check_rows(layer)
        self.check_sentences(layer)
        if layer.scores.any():
            raise Difference("after a seal, the scores of all sentences are 0")

    def positions_of(self, rows, head: int, what: str) -> list:
        """The tokens whose rows (m, 2, D) these are."""
        same = (rows[:, None, 0] == self.kv[head, :, 0]).all(dim=-1)  # (m, n)
        for i in (~same.any(dim=-1)).nonzero().flatten().tolist()[:1]:
            if (self.kv[head, :, 1] == rows[i, 0]).all(dim=-1).any():
                raise Difference(f"{what} a value in the place of a key: keys come first")
            others = (self.kv[:, :, 0] == rows[i, 0]).all(dim=-1).nonzero().tolist()
            raise Difference(f"{what} a key for KV head {head} that " + (
                f"is one of KV head {others[0][0]}" if others else
                "this layer was not given: RoPE is in the keys already, so keep them as they are"))
        positions = same.int().argmax(dim=-1)
        if not torch.equal(rows[:, 1], self.kv[head, positions, 1]):
            raise Difference(f"{what} a key of KV head {head} with the value of another token")
        return positions.tolist()

    def check_rows(self, layer):
        """The rows on the host, and the open ones."""
        for i, head in enumerate(self.slow.heads):
            end = head.spans[-1][1]
            expected = head.secondary + [
                p for p in sorted(head.kv) if p < end and p not in head.secondary]
            check_number("`host`", i, layer.host.shape[1], len(expected))
            found = self.positions_of(layer.host[i], i, "`host` has")
            for row, (mine, right) in enumerate(zip(found, expected)):
                if mine != right:
                    raise Difference(f"row {row} of KV head {i} is the token at {mine}, it should"
                                     f" be the one at {right}. Secondary sinks: {head.secondary}")
            check_number("`open`", i, layer.open.shape[1], head.n_tokens - end)

    def check_sentences(self, layer):
        """Bounds, vectors, variances and scores."""
        for i, head in enumerate(self.slow.heads):
            spans, bounds = kept_spans(head), layer.bounds[i].tolist()
            if len(bounds) != len(head.spans) + 1:
                raise Difference(f"`bounds` has {len(bounds)} numbers in a head, and"
                                 f" {len(head.spans)} sentences need one more than they are")
            lengths = [len(head.tokens_of(span)) for span in spans]
            expected = pairwise(accumulate(lengths, initial=len(head.secondary)))
            found = ((start, end) for start, end in pairwise(bounds) if start != end)
            for span, right, mine in zip_longest(spans, expected, found):
                if mine != right:
                    raise Difference(f"the sentence {span} of KV head {i} has the rows {right}, by"
                                     f" your `bounds` {mine}: each time (first, end)")
            self.check_vectors(layer, i, head, spans)

    def check_vectors(self, layer, i: int, head, spans: list):
        for name in ("vectors", "variances", "scores"):
            table = getattr(layer, name)
            check_number(f"`{name}`", i, table.shape[1], len(head.spans), "sentences")
            if not table.isfinite().all():
                raise Difference(f"`{name}` has NaN: an empty sentence gets zeros")
        filled = layer.bounds[i].diff() > 0
        for span, vector, variance in zip(spans, layer.vectors[i, filled],
                                          layer.variances[i, filled]):
            keys, every = head.keys_of(span), self.kv[i, slice(*span), 0]
            if not close(vector, keys.mean(dim=0)):
                raise Difference(f"the vector of the sentence {span} of KV head {i} is not the mean"
                                 " of its kept keys" + (
                                     ", but of all: dropped keys and secondary sinks do not count"
                                     if close(vector, every.mean(dim=0)) else ""))
            if not close(variance, keys.var(dim=0, correction=0).mean()):
                raise Difference(f"the variance of the sentence {span} of KV head {i} is not that"
                                 " of its kept keys")

    def check_device(self, layer):
        """Of the prompt, the device keeps less than its keys."""
        if self.kv.shape[1] <= 2 * len(self.slow.heads[0].spans):
            return
        for name, value in vars(layer).items():
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if name != "host" and isinstance(x, torch.Tensor) and (
                        x.untyped_storage().nbytes() >= self.kv[:, :, 0].nbytes):
                    raise Difference(f"after `keep`, `{name}` still holds the prompt on the device")

    def check_attended(self, layer, i: int, found: list):
        """The tokens to which a head attends."""
        head = self.slow.heads[i]
        message = wrong_attention(head, found)
        if not message and {*found} != {*attended(head)}:
            extra = sorted({*found} - {*attended(head)})
            message = f"selects {extra}, and not the best: {self.wrong_ranking(layer, i)}"
        if message:
            raise Difference(f"at token {head.n_tokens - 1}, KV head {i} of layer {self.number}"
                             f" {message}")

    def wrong_ranking(self, layer, i: int) -> str:
        """Why the sentences of a head are in another order than the oracle's."""
        head, mine = self.slow.heads[i], self.ranking(layer, i, layer.scores)
        right = head.best_sentences()
        if mine == right:
            if self.used is not None and self.ranking(layer, i, self.used) != right:
                return "`decode` must add the token's score before it selects"
            return "the scores are right, so take the best sentences, and of each the first rows"
        if not layer.scores.any():
            return "your scores are all 0: `decode` calls `add_score`, which sets `scores`"
        for reason, changes in self.likely_changes(i):
            other = copy(head)
            vars(other).update(changes)
            if other.best_sentences() == mine:
                return f"your scores {reason}"
        n = next(n for n, (a, b) in enumerate(zip_longest(right, mine)) if a != b)  # as far, alike
        return (f"the best sentences are {right[: n + 1][-3:]}, and by your scores"
                f" {mine[: n + 1][-3:]}")

    def ranking(self, layer, i: int, scores) -> list:
        """The sentences by a student's scores (H_kv, S), the best first."""
        scores = scores[i, layer.bounds[i].diff() > 0]
        return [kept_spans(self.slow.heads[i])[s] for s in scores.argsort(descending=True).tolist()]

    def likely_changes(self, i: int) -> list:
        """What a student may do with scores -> a head of the oracle that does it."""
        head, n_heads = self.slow.heads[i], len(self.slow.heads)

        def of_head(queries):  # (H, D) each
            return [q.unflatten(0, (n_heads, -1))[i] for q in queries]

        n_open = len(head.queries)
        strided = [q.unflatten(0, (-1, n_heads))[:, i] for q in self.queries[-n_open:]]
        others = [of_head(layer.queries[-n_open:]) for layer in self.layers
                  if layer is not self and len(layer.queries) == len(self.queries)]
        return [
            ("use the queries of other heads: query heads 0 to G - 1 share KV head 0",
             {"queries": strided}),
            *(("use the queries of another layer", {"queries": other}) for other in others),
            *((f"are those of `{score}`: use `config.score`",
               {"config": replace(head.config, score=score)}) for score in SCORES),
            ("count all queries alike: multiply the scores so far by the query decay, not the new"
             " one",
             {"config": replace(head.config, query_decay=1.0)}),
            ("count the last query alone: add them up", {"queries": head.queries[-1:]}),
            ("count queries from before the last seal", {"queries": of_head(self.queries)})]


def attended(head) -> list:
    """The tokens to which a head of the oracle attended last."""
    return head.first_sinks + head.secondary + head.selected[-1] + head.window()


def wrong_attention(head, found: list) -> str:
    """What is wrong with the tokens to which a head attends, if it is not which are selected."""
    sinks, window = head.first_sinks + head.secondary, head.window()
    budget, room = head.config.token_budget, len(attended(head))
    twice = sorted(i for i in {*found} if found.count(i) > 1)
    early = sorted(i for i in found if head.spans[-1][1] <= i < window[0])
    no_sinks, no_window = ([i for i in part if i not in found] for part in (sinks, window))
    for wrong, message in (
            (head.n_tokens - 1 not in found, "does not attend to the token itself"),
            (twice, f"attends twice to {twice}: a sink or a row of the window is not selected"),
            (early, f"attends to {early}, of the open sentence, but before the window"),
            (len(found) > budget, f"attends to {len(found)} tokens, and the budget is {budget}"),
            (no_sinks, f"does not attend to the sinks {no_sinks}"),
            (no_window, f"does not attend to {no_window}, and its window begins at {window[0]}"),
            (len(found) < room, f"attends to {len(found)} tokens, and there is room for {room}"),
            (len(found) > room, f"attends to {len(found)} tokens, and should to {room}")):
        if wrong:
            return message
    return ""


def kept_spans(head) -> list:
    return [span for span in head.spans if head.tokens_of(span)]


def close(a, b) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def check_number(what: str, head: int, found: int, expected: int, of: str = "rows"):
    if found != expected:
        raise Difference(f"{what} of KV head {head} has {found} {of}, and should have {expected}")
