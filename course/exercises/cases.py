"""Small inputs for each exercise, and the mistakes that a student is likely to make.

The cases of an exercise are a generator under its name: it calls the student's function and yields
what is compared with the project's. Shapes are as in `sentencekv.py`, for 2 KV heads.
"""

import math
from types import SimpleNamespace

import torch

import sentencekv
from cache import NO_ROW, LayerCache, SentenceKVCache
from model import LlamaConfig
from sentencekv import SentenceKVConfig

TINY = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                   num_attention_heads=4, num_key_value_heads=2, head_dim=4,
                   max_position_embeddings=256)


def random(seed: int, *shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attend(function):
    attention, q = SimpleNamespace(head_dim=4), random(1, 4, 1, 4)
    keys, values = random(2, 2, 6, 4), random(3, 2, 6, 4)
    mask = torch.tensor([[[1, 0, 1, 1, 0, 1]], [[0, 1, 1, 0, 0, 1]]]).bool()
    yield function(attention, q, keys, values, None)
    yield function(attention, q, keys, values, mask)


def is_end(function):
    for before, after in (("He left.", "She sat."), ("Dr.", "Smith sat."), ("He sat", "down."),
                          ("It is 3.", "5 m long."), ("Why?", "he asked."), ("你好。", "再见。"),
                          ("I work at Yahoo!", "in London."), ("Ax Inc.", "The end."),
                          ("the U.S.", "Army"), ("Wait.", "• Tea"), ("你好。", '"Hello'),
                          ("the U.S.", '"Hello'), ("Is it so?", "iPhone")):
        yield function(before, " ", after)
    yield function("A heading", "\n\n", "A line")
    yield function("a line", "\n", "another")


def sentence_bounds(function):
    ends = torch.tensor([4, 7, 10])
    for marked in ([[-1, 0, 1, 8, 9]], [[0, 1, 5, 8, 9], [3, 4, 5, 6, 7]],
                      [[7, 8, 9], [0, 1, 8]]):
        yield function(torch.tensor(marked), ends)


def sentence_vectors(function):
    keys = random(1, 2, 9, 4)
    yield from function(keys, torch.tensor([[0, 2, 5, 9], [0, 1, 5, 9]]))
    yield from function(keys, torch.tensor([[2, 3, 3, 9], [1, 4, 6, 6]]))


def scores(function):
    yield function(random(1, 2, 3, 4), random(2, 2, 5, 4), random(3, 2, 5).abs(),
                   torch.tensor([[1, 5, 2, 0, 3], [3, 3, 1, 4, 2]]))


mean_query = gaussian = scores


def token_importance(function):
    yield function(random(1, 4, 3, 8), random(2, 2, 20, 8), pool=1)  # no pooling
    yield function(random(1, 4, 3, 8), random(2, 2, 20, 8))


def select_rows(function):
    scores, available = random(1, 2, 6), torch.tensor([[3, 1, 4, 1, 5, 2], [2, 0, 3, 3, 0, 4]])
    for budget in (0, 1, 4, 7, 100):
        yield function(scores, available, budget)
    yield function(scores, available, torch.tensor([4]))


def assign_slots(function):
    """Any order of the loaded rows is right: what is compared does not depend on it."""
    starts = torch.tensor([[4, 8, 12]])
    for before, places, resident, selected in (
            ([5, 8, 4], [0, 1, 0], [2, 1, 0], [0, 2, 1]),
            ([4, 5, 8, 9], [0, 0, 1, 1], [2, 2, 0], [2, 1, 0]),
            ([NO_ROW] * 4, [0] * 4, [0, 0, 0], [2, 2, 0]),
            ([4, 5, 8, 9], [0, 0, 1, 1], [2, 2, 0], [1, 0, 2])):
        given = [torch.tensor([x]) for x in (before, places, resident, selected)]
        before, *rest = (x.clone() for x in given)
        places, resident, selected = rest
        wanted = {starts[0, s].item() + i for s in range(3) for i in range(selected[0, s])}
        rows, places, missing = function(before, places, starts, resident, selected)
        if missing.dtype != torch.bool:
            raise ValueError(f"`missing` has the dtype {missing.dtype}, it must be torch.bool")
        if not all(map(torch.equal, given, (before, *rest))):
            raise ValueError("you changed an argument: work on copies")
        yield rows.sort().values
        if missing.sum() > (selected - resident).clamp(min=0).sum() and set(
                rows[rows < NO_ROW].tolist()) == wanted:
            raise ValueError(ALL_MOVE)
        yield places[rows < NO_ROW][rows[rows < NO_ROW].argsort()]
        yield rows[missing].sort().values
        yield (rows == given[0])[~missing & (rows < NO_ROW)]
    rows_moved(function)  # finds what goes wrong only after several steps


def rows_moved(function, steps: int = 50) -> tuple[int, int]:
    """How many rows `assign_slots` loads in a random run, and the least that are necessary."""
    lengths = torch.tensor([[3, 7, 5, 9, 2, 6, 8, 4]])
    starts = lengths.cumsum(dim=-1) - lengths
    rows, places = torch.full((1, 20), NO_ROW), torch.zeros(1, 20, dtype=torch.long)
    resident, scores, moved, least = torch.zeros_like(lengths), 0, 0, 0
    for step in range(steps):
        scores = 0.9 * scores + random(step, *lengths.shape)  # most of a selection stays
        selected = sentencekv.select_rows(scores, lengths, 20 - step % 3)
        rows, places, missing = function(rows, places, starts, resident, selected)
        moved += int(missing.sum())
        least += int((selected - resident).clamp(min=0).sum())
        resident = selected
    return moved, least


def seal(function):
    yield from seal_after(function, [(0, 5), (5, 12), (12, 20)])
    yield from seal_after(function, [(0, 15), (15, 30), (30, 40)])  # 16 tokens are dropped


def seal_after(function, spans: list):
    class Layer(LayerCache):
        seal = function

    cache, n_tokens = sealing_cache(Layer, spans), spans[-1][1]
    plan, layer = cache.plan, cache.layers[1]
    take(cache, n_tokens, "prefill")
    layer.host.reserve(100)  # more than a seal will, so these rows stay
    layer.host.later.fill_(math.nan)
    for i in range(12):
        if i in (6, 9):
            cache.seal(5 if i == 6 else 3)
            in_use = slice(plan.n_places)
            yield "the starts of the sentences, then their ends", torch.stack(
                (layer.starts[:, in_use], layer.ends[:, in_use]))
            yield "scores", layer.scores.clone()
            yield "rows on the host", layer.host.read(0, plan.open_row)
            yield "vectors", layer.vectors[:, in_use].clone()
        take(cache, 1, "decode")


def sealing_cache(layer_class, spans: list) -> SentenceKVCache:
    """A cache for TINY with layers of this class, which expects a text of these sentences."""
    class Cache(SentenceKVCache):
        Layer = layer_class

    config = SentenceKVConfig(token_budget=24, keep_factor=1, sink_tokens=2, secondary_sinks=0,
                              recent_window=4, observation_window=4, sentence_limit=12,
                              kv_bits=16)
    cache = Cache(config, TINY, spans[-1][1] + 20, "cpu", torch.float32)
    cache.expect(spans)
    return cache


def take(cache, n_tokens: int, method: str):
    """What a model does, with random q, k and v. `method` is "prefill" or "decode"."""
    for i, layer in enumerate(cache.layers):
        q, k, v = (random(cache.num_tokens + 100 * (3 * i + j), heads, n_tokens, 4)
                   for j, heads in enumerate((4, 2, 2)))
        getattr(layer, method)(q, k, v)
        if method == "prefill":
            layer.keep()
    cache.advance(n_tokens)


GROUPS = "query heads 0 to G - 1 share KV head 0; you gave it every H_kv-th head"
ALL_MOVE = "you loaded rows that were in slots already"
# (text of the project's function, what a student may write instead, the diagnosis)
MISTAKES = {
    "02_attend": [
        ("q.view(len(keys), -1, self.head_dim)",
         "q.view(-1, len(keys), self.head_dim).transpose(0, 1)", GROUPS),
        ("grouped[None], keys[None], values[None], mask)",
         "q[None], keys.repeat(len(q) // len(keys), 1, 1)[None],\n"
         "            values.repeat(len(q) // len(keys), 1, 1)[None],\n"
         "            None if mask is None else mask.repeat(1, len(q) // len(keys), 1, 1))",
         GROUPS),
        ("values[None], mask)", "values[None], is_causal=True)",
         "the rows of a group are heads, not positions: no is_causal"),
        ("values[None], mask)", "values[None], None if mask is None else ~mask)",
         "your mask excludes what it should include: it is True where to attend"),
        ("values[None], mask)", "values[None])", "you attended to slots that the mask excludes"),
        ("values[None], mask)", "values[None], mask, scale=1.0)",
         "you did not divide by the root of D"),
    ],
    "03_is_end": [
        ("    if one_holds(ABBREVIATED, before, after):\n        return opens and not small\n", "",
         "an abbreviation ends a sentence only before a word that opens one"),
        ("    if not MARK_END.match(before) or one_holds(INSIDE, before, after):\n",
         "    if not MARK_END.match(before):\n", "the rules of INSIDE say where no sentence ends"),
        ("starts_item(before, after) or ends_line(before, gap, after)",
         "starts_item(before, after)", "a line end can end a sentence without a mark"),
    ],
    "05_sentence_vectors": [
        ("lengths.clamp(min=1).unsqueeze(-1)", "keys.shape[1]",
         "you divided by N, not by the sentence's rows"),
        ("lengths.clamp(min=1).unsqueeze(-1)", "lengths.unsqueeze(-1)",
         "the mean of no keys is NaN: an empty sentence gets zeros"),
        ("squares - vectors.square().mean(dim=-1)", "squares",
         "your variance is the mean square: subtract the square of the mean"),
        ("squares - vectors.square().mean(dim=-1)",
         "(squares - vectors.square().mean(dim=-1)) * keys.shape[-1]",
         "you summed the variance over channels: the mean is asked for"),
    ],
    "04_sentence_bounds": [
        ("F.pad(ends, (1, 0))", "F.pad(ends, (1, 0), value=-1)",
         "rows marked with -1 belong to no sentence: the first sentence begins after them"),
        ("bounds.masked_fill(repeated, marked.shape[-1]).sort(dim=-1).values", "bounds",
         "a sentence without rows must become an empty one at the end"),
        ("torch.searchsorted(marked, starts_and_end)",
         "torch.searchsorted(marked, starts_and_end, right=True)",
         "an end is the position after a sentence: a token there is in the next one"),
    ],
    "06_mean_query": [
        ("q.mean(dim=1)", "q.sum(dim=1)", "you summed the group's queries: the mean is asked for"),
        ("q.mean(dim=1)", "q[:, 0]", "you took one query head of the group, not their mean"),
        (").squeeze(-1)", ").squeeze(-1) / math.sqrt(q.shape[-1])",
         "you divided by the root of D: the score is the plain product"),
    ],
    "06_gaussian": [
        ("scaled = q / math.sqrt(q.shape[-1])", "scaled = q",
         "you did not divide the query by the root of D"),
        (" / 2  # (H_kv, G, S)", "  # (H_kv, G, S)", "the exponent has half of |q|² σ²"),
        ("attention.sum(dim=1) / lengths.clamp(min=1)", "attention.sum(dim=1)",
         "the result is the share of one token: divide by the sentence's length"),
        ("(log_mean_exp + lengths.log().unsqueeze(1))", "log_mean_exp",
         "a sentence of n keys counts n times in the softmax: add ln n"),
        ("attention.sum(dim=1)", "attention.mean(dim=1)", "sum over the query heads of the group"),
        ("lengths.clamp(min=1)", "lengths", "0 / 0 is NaN: an empty sentence receives 0"),
    ],
    "07_token_importance": [
        (".sum(dim=2).mean(dim=1)", ".sum(dim=2).sum(dim=1)",
         "sum over the window, but take the mean over the group"),
        (" / math.sqrt(dim)", "", "you did not divide the logits by the root of D"),
        ("q.reshape(kv_heads, -1, dim)",
         "q.unflatten(0, (-1, kv_heads)).transpose(0, 1).reshape(kv_heads, -1, dim)", GROUPS),
        ("triu(tokens - window + 1)", "triu(tokens)",
         "queries of the window attended to tokens after them"),
        ("padding=pool // 2)", "padding=pool // 2) * 0 + received[:, : tokens - window]",
         "you did not pool: each token gets the maximum of its neighbours"),
    ],
    "07_select_rows": [
        ("topk(n, dim=-1)", "topk(n, dim=-1, largest=False)",
         "the best sentence has the highest score"),
        ("(counts - excess).clamp(min=0)", "counts.masked_fill(excess > 0, 0)",
         "the first rows of the last sentence are selected too, until the budget is full"),
        ("clamp(min=0)  # rows too many: 0, 1, 4", "clamp(min=0) * 0",
         "the budget is exceeded: of the last sentence only the first rows are selected"),
        ("torch.zeros_like(available).scatter_(-1, best, selected)", "selected.gather(-1, best)",
         "gather puts nothing back: use scatter, or gather with order.argsort()"),
        ("scatter_(-1, best, selected)", "copy_(selected)",
         "your result is in the order of the scores: put it back in the sentences' order"),
    ],
    "08_assign_slots": [
        ("n_loads = (selected - n_resident).clamp(min=0).cumsum(dim=-1)",
         "free, n_loads = free | True, selected.cumsum(dim=-1)\n"
         "    number = free.cumsum(dim=-1)",
         ALL_MOVE),
        ("(selected - n_resident).clamp(min=0)", "(selected - n_resident)",
         "a sentence that needs fewer rows than before loads none: no negative counts"),
        ("missing = free & (place < n_places)", "missing = free",
         "a free slot is missing nothing when all rows to load have a slot"),
        ("rows.masked_fill(free, NO_ROW)", "rows",
         "a free slot that takes no row is empty: its row is NO_ROW"),
        ("torch.where(free, place, places)", "places",
         "a slot that takes a row takes the row's place, too"),
    ],
    "09_seal": [
        ("self.scores.zero_()", "None", "scores must begin at zero for the next sentence"),
        ("kv[:, :, 0], bounds", "kv[:, :, 1], bounds", "a sentence vector is the mean of keys"),
        ("bounds, first_row)", "bounds)",
         "bounds count from the first row of the sentence: tell `add_sentences` which row this is"),
        ("self.plan.slots_of(first_row, first_row + length)",
         "slice(first_row, first_row + length)", "a row is not a slot: ask `plan.slots_of`"),
        ("first_row = self.plan.open_row", "first_row = self.plan.n_rows - length",
         "the first `length` open tokens are sealed, not the last ones"),
        ("self.offload(first_row, kv)", "self.offload(first_row + self.plan.n_dropped, kv)",
         "rows are not positions: the first row to write is `plan.open_row`"),
        ("self.offload(first_row, kv)", "None", "the rows are not on the host: offload them"),
    ],
}
