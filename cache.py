"""Where keys and values live while a Llama reads and writes: on the device and on the host.

    Plan             what all layers share: the text being read, what the next token attends to
    LayerCache       one layer: its sentences and slots on the device, its rows on the host
    SentenceKVCache  all layers, with the protocol of `model.FullCache`

It asks `sentencekv.py` for every choice, and knows nothing of tokenizers, RoPE or weights.

A *row* is a kept token: its key and its value, side by side (2, D), so that they move together. The
rows of a head are its secondary sinks, then the other kept tokens as they are read. If positions 0
to 9 are all kept, and 5 is a secondary sink, rows 0 to 9 are the positions 5 0 1 2 3 4 6 7 8 9.
The last tokens of the first text are never secondary sinks and never dropped, nor is any later one.
So from there on, row = position - n_dropped. All rows are on the host, but for those of the *open*
sentence, which is being written: they are offloaded when it is sealed.

A *slot* is room for a row on the device. Attention reads the slots of its layer, and nothing else,
in any order: RoPE has put the positions into the keys.

    [ B slots for selected rows | R slots for the window: row r is in slot B + r % R ]

The table of a layer has P *places*. Place 0 stands for all sinks of a head, the first tokens and
the secondary ones: it is always selected. Each other place stands for a sentence; some are free.
Other shapes are as in `sentencekv.py`, which is given the P places as its S sentences.
"""

import math

import torch
import torch.nn.functional as F

from sentencekv import (SCORES, SentenceKVConfig, find_secondary_sinks, keep_tokens, order_rows,
                        select_rows, sentence_bounds, sentence_vectors, token_importance)
from support.host_rows import Copies, HostRows, load_missing
from support.memory import Totals, report
from support.slots import NO_ROW, assign_slots
from support.table import make_room, room_for


class Plan:
    """What all layers share: the text that is read, and what the next token attends to. A layer
    holds the plan and not the cache: in a cycle of references, Python frees the memory late."""

    def __init__(self, config: SentenceKVConfig, max_tokens: int, device):
        self.config = config
        self.num_tokens = 0  # that all layers have seen: the position of the next one
        self.n_dropped = 0  # number of tokens of the first text that each head dropped
        self.n_first_sinks = 0  # number of first tokens that are always selected
        self.n_places = 1  # number of places in use
        self.open_row = 0  # first row without a place: of the open sentence, or of a new text
        self.text_end = 0  # the position after the newest text, read or still being read
        self.sentence_ends = None  # of that text (S,): after each sentence, from its beginning

        self.n_row_slots = min(config.token_budget - config.recent_window, max_tokens)  # B
        # R must hold the recent window, and the open sentence with the next token. It is the sum:
        # with R = recent_window, B + R would be τ, often a power of two, and the keys of all heads
        # would compete for the same lines of a processor's cache.
        self.n_window_slots = config.recent_window + min(config.sentence_limit, max_tokens)  # R
        self.window_index = torch.arange(self.n_window_slots, device=device)  # 0 to R - 1

        # For the next token, as tensors (1,): a CUDA graph records a number as a constant.
        self.n_select = torch.zeros(1, device=device, dtype=torch.long)  # rows, in each head
        self.select_end = torch.zeros_like(self.n_select)  # only rows before it can be selected
        self.next_slot = torch.zeros_like(self.n_select)  # of the token itself
        self.in_window = torch.zeros(1, self.n_window_slots, device=device, dtype=torch.bool)
        self.total_loaded = torch.zeros_like(self.n_select)  # rows since the last text, all layers

    @property
    def n_rows(self) -> int:
        """Rows so far: the row of the next token."""
        return self.num_tokens - self.n_dropped

    @property
    def text_rows(self) -> int:
        """Rows at the end of the last text. While the first is read, nothing of it is dropped."""
        return self.text_end - self.n_dropped

    @property
    def is_first_text(self) -> bool:
        return self.open_row == 0

    def slots_of(self, first_row: int, end_row: int) -> torch.Tensor:
        """The slots of rows of the window."""
        rows = torch.arange(first_row, end_row, device=self.window_index.device)
        return self.n_row_slots + rows % self.n_window_slots

    def window_start(self) -> int:
        """The first row of the next token's window: that of the recent window, or of the open
        sentence if it is longer. It is the same in all heads, so if it has to be cut to fit the
        budget, it leaves room for as many sinks as a head can have."""
        config, end = self.config, self.n_rows + 1
        most = config.token_budget - config.sink_tokens - config.secondary_sinks
        start = min(end - config.recent_window, self.open_row)
        # In a short prompt it begins after the first sinks, which are its first rows: such a prompt
        # has no secondary sinks.
        return max(start, end - most, self.n_first_sinks)

    def plan_next(self):
        """Decide what the next token attends to: its window, which ends with the token itself, and
        as many selected rows before the window as the budget of τ tokens allows.

        With τ = 96 and a recent window of 32, the token in row 300 has the window 269 to 300. In
        each head 96 - 32 = 64 of the rows 0 to 268 are selected, all sinks among them.
        """
        row, start = self.n_rows, self.window_start()
        n_window = row + 1 - start
        # If the window is cut, the beginning of the open sentence is not attended to.
        select_end = min(start, self.open_row)
        assert row - select_end < self.n_window_slots, "a sentence is too long: call `seal`"
        self.n_select.fill_(min(self.config.token_budget - n_window, select_end))
        self.select_end.fill_(select_end)
        self.next_slot.fill_(self.n_row_slots + row % self.n_window_slots)
        age = (row - self.window_index) % self.n_window_slots  # 0: the slot of the token itself
        self.in_window.copy_(age < n_window)


class LayerCache:
    """One layer, on the device. Its table, per KV head:

    vectors     (H_kv, P, D)       the sentence vector
    variances   (H_kv, P)          of the sentence's keys
    lengths     (H_kv, P) float    rows of the sentence, for its score; 0 at place 0
    starts      (H_kv, P)          the first row that can be selected
    ends        (H_kv, P)          the row after the last one that can be selected
    scores      (H_kv, P)          how well it matches the open sentence
    n_resident  (H_kv, P)          how many of its rows are in slots

    A prompt has two sentences, of 10 and of 8 tokens. In one head, 2 tokens of the second are
    secondary sinks: rows 0 and 1. Rows 2 to 11 are the first sentence. Its first 4 tokens are
    sinks, too. They count for its vector and its length, but are selected with place 0:

        place       0     1     2
        starts      0     6    12
        ends        6    12    18
        lengths     0    10     6

    Its slots (H_kv, B + R, 2, D). Of the B slots for selected rows (H_kv, B): slot_row is the row,
    or NO_ROW, which is greater than any row; slot_place is the row's place, and slot_missing says
    whether the row must be loaded from the host. Each stage is a method, so that it can be timed.
    """

    TABLE = ("vectors", "variances", "lengths", "starts", "ends", "scores", "n_resident")

    def __init__(self, plan: Plan, host: HostRows, device, dtype):
        heads, dim, capacity = host.heads, host.dim, room_for(plan.n_places)
        self.plan, self.host = plan, host
        self.last_queries = []  # of each part of the first text (H, at most W, D)
        self.vectors = torch.zeros(heads, capacity, dim, device=device, dtype=dtype)
        self.variances = torch.zeros(heads, capacity, device=device)
        self.lengths, self.scores = self.variances.clone(), self.variances.clone()
        self.starts = torch.zeros(heads, capacity, device=device, dtype=torch.long)
        self.ends, self.n_resident = self.starts.clone(), self.starts.clone()
        n_slots = plan.n_row_slots + plan.n_window_slots
        self.slots = torch.zeros(heads, n_slots, 2, dim, device=device, dtype=dtype)
        self.slot_row = torch.full((heads, plan.n_row_slots), NO_ROW, device=device)
        self.slot_place = torch.zeros_like(self.slot_row)
        self.slot_missing = torch.zeros_like(self.slot_row, dtype=torch.bool)

    def prefill(self, q, k, v) -> tuple:
        """Take the next part of a text. It attends to all rows so far: they come back to the device
        for as long as the layer computes."""
        kv = torch.stack((k, v), dim=2)  # (H_kv, T, 2, D)
        if self.plan.n_rows > 0:
            kv = torch.cat((self.host.read(0, self.plan.n_rows), kv), dim=1)
        if self.plan.is_first_text:
            self.read_first_text(q, kv)
        else:
            self.read_later_text(kv)
        return kv.unbind(dim=2)

    def read_first_text(self, q, kv):
        """Offload the rows of a part. After the last part, make the sentences, and offload the kept
        rows in their order instead. kv (H_kv, n, 2, D) of all parts so far"""
        plan, config, n_tokens = self.plan, self.plan.config, kv.shape[1]
        # `clone`: a slice would keep all of q in memory.
        self.last_queries.append(q[:, -config.observation_window :].clone())
        if n_tokens < plan.text_rows:
            self.offload(plan.n_rows, kv[:, plan.n_rows :])
            return
        secondary = self.secondary_sinks(kv[:, :, 0])
        kept = torch.arange(n_tokens, device=kv.device).expand(len(kv), -1)  # (H_kv, N)
        if config.n_kept(n_tokens) < n_tokens:
            kept = self.most_important(kv[:, :, 0], secondary)
        self.last_queries = []
        self.offload(0, self.make_sentences(kv, kept, secondary), replace=True)

    def read_later_text(self, kv):
        """Offload the rows of a part: all are kept. After the last part, make the sentences."""
        plan = self.plan
        self.offload(plan.n_rows, kv[:, plan.n_rows :])
        if kv.shape[1] == plan.text_rows:
            bounds = F.pad(plan.sentence_ends, (1, 0)).expand(len(kv), -1)  # 0, and all ends
            self.add_sentences(kv[:, plan.open_row :, 0], bounds, plan.open_row)

    def secondary_sinks(self, k) -> torch.Tensor:
        """Which tokens of the first text are secondary sinks: k (H_kv, T, D) -> (H_kv, T) bool"""
        return find_secondary_sinks(k, self.plan.config)

    def most_important(self, k, secondary) -> torch.Tensor:
        """The positions that each head keeps, in reading order: k (H_kv, T, D) -> (H_kv, N)"""
        config, q = self.plan.config, torch.cat(self.last_queries, dim=1)
        q = q[:, -config.observation_window :]  # (H, W, D)
        return keep_tokens(token_importance(q, k), secondary, config)

    def make_sentences(self, kv, kept, secondary) -> torch.Tensor:
        """Put the kept rows in order, and give the sentences of the first text their places.
        kv (H_kv, T, 2, D), kept (H_kv, N), secondary (H_kv, T) -> rows (H_kv, N, 2, D)"""
        plan, head = self.plan, torch.arange(len(kv), device=kv.device)[:, None]
        row_positions, marked = order_rows(kept, secondary)
        rows = kv[head, row_positions]
        self.host.note_positions(row_positions)
        bounds = sentence_bounds(marked, plan.sentence_ends)  # (H_kv, S + 1)
        # The first sentence begins after the secondary sinks, and with the first sinks.
        n_all_sinks = bounds[:, :1] + plan.n_first_sinks  # (H_kv, 1)
        self.add_sentences(rows[:, :, 0], bounds, n_all_sinks=n_all_sinks)
        self.ends[:, :1] = n_all_sinks  # of place 0
        return rows

    def add_sentences(self, keys, bounds, first_row: int = 0, n_all_sinks=0):
        """Give S sentences the next places of the table. keys (H_kv, n, D) of the rows from
        `first_row` on, bounds (H_kv, S + 1) counted from it"""
        first = self.plan.n_places
        places = slice(first, first + bounds.shape[-1] - 1)
        self.vectors[:, places], self.variances[:, places] = sentence_vectors(keys, bounds)
        self.lengths[:, places] = bounds.diff(dim=-1).float()
        bounds = (first_row + bounds).clamp(min=n_all_sinks)  # a sink is selected with place 0
        self.starts[:, places], self.ends[:, places] = bounds[:, :-1], bounds[:, 1:]

    def offload(self, first_row: int, rows, replace: bool = False):
        """Copy rows (H_kv, n, 2, D) to the host, beside the computation that follows."""
        self.host.write(first_row, rows, self.plan.text_rows, replace)

    def fill_window(self, first_row: int):
        """After a text, the rows from this one on come back from the host. Scores begin at 0."""
        n_rows = self.plan.n_rows
        self.slots[:, self.plan.slots_of(first_row, n_rows)] = self.host.read(first_row, n_rows)
        self.scores.zero_()

    def decode(self, q, k, v) -> tuple:
        """Select rows, load those that are missing (Section 3.3), return all slots and a mask."""
        plan = self.plan
        self.slots.index_copy_(1, plan.next_slot, torch.stack((k, v), dim=2))  # (H_kv, 1, 2, D)
        self.select(q.view(len(k), -1, q.shape[-1]))
        self.load()
        mask = torch.cat((self.slot_row < NO_ROW, plan.in_window.expand(len(k), -1)), dim=1)
        return *self.slots.unbind(dim=2), mask.unsqueeze(1)  # (H_kv, 1, B + R)

    def select(self, q):
        """Select the rows of the best sentences, and find slots for them. q (H_kv, G, D)"""
        plan = self.plan
        # Scores add up over the open sentence, with less weight for older tokens.
        torch.add(self.score(q), self.scores, alpha=plan.config.query_decay, out=self.scores)
        self.scores[:, 0] = math.inf  # place 0; written after the sum, since 0 * inf is NaN
        # Of each place, the rows before the window: none, some or all. (H_kv, P)
        available = plan.select_end.clamp(self.starts, self.ends) - self.starts
        # The rows in B slots are of at most B places.
        selected = select_rows(self.scores, available, plan.n_select, plan.n_row_slots)
        # A row that is still selected keeps its slot. If slots hold the rows 5, 8, 4, and 8, 9, 12
        # are selected, the slots hold 9, 8, 12 next, and 9 and 12 are missing.
        rows, places, missing = assign_slots(
            self.slot_row, self.slot_place, self.starts, self.n_resident, selected)
        self.slot_row.copy_(rows)  # not `=`: a CUDA graph has the tensors of the first token
        self.slot_place.copy_(places)
        self.slot_missing.copy_(missing)
        self.n_resident.copy_(selected)
        plan.total_loaded += missing.sum()

    def score(self, q):
        """How well each sentence matches one token's queries (H_kv, G, D) -> (H_kv, P)."""
        return SCORES[self.plan.config.score](q, self.vectors, self.variances, self.lengths)

    def load(self):
        """Copy the missing rows from the host into the slots that were found for them. The other
        selected rows are in slots already."""
        load_missing(self.host, self.slots, self.slot_row, self.slot_missing)

    def seal(self, length: int):
        """Give the first `length` rows of the open sentence a place, and offload them."""
        first_row = self.plan.open_row
        kv = self.slots[:, self.plan.slots_of(first_row, first_row + length)]  # (H_kv, n, 2, D)
        bounds = torch.tensor([[0, length]], device=kv.device).expand(len(kv), -1)
        self.add_sentences(kv[:, :, 0], bounds, first_row)
        self.offload(first_row, kv)
        self.scores.zero_()  # tokens that stay open lose their part of the scores, as in the oracle

    def truncate(self, n_places: int):
        """Forget all places of the table from this one on, and what is in slots."""
        for table in (self.lengths, self.starts, self.ends):
            table[:, n_places:] = 0
        self.slot_row.fill_(NO_ROW)
        for tensor in (self.slot_place, self.slot_missing, self.n_resident):
            tensor.zero_()


class SentenceKVCache:
    """All layers, with the protocol of `model.FullCache`. Invariants, which tests/test_cache.py
    checks after each step:
     1. The rows of a head are all its sinks, and then its sentences without gaps.
     2. Row r of the window is in slot B + r % R.
     3. Of the rows of a place, the first `n_resident` are in slots, from `starts` on.
     4. Each head selects `n_select` rows before the window, all sinks among them. With the window
        these are at most `token_budget` tokens.
     5. The window never moves back, but in `truncate`: a newer row may be in an older one's slot.
     6. Slots that the mask hides are finite: attention gives them weight 0, and 0 times NaN is NaN.
     7. Tensors are reallocated only with another `version`: `decode` can be a CUDA graph.
    """

    Layer = LayerCache  # a subclass can have layers of its own

    def __init__(self, config: SentenceKVConfig, model_config, max_tokens: int, device, dtype):
        device = torch.device(device)
        n_layers, heads, dim = model_config.kv_shape
        self.config, self.plan = config, Plan(config, max_tokens, device)
        self.copies, self.n_resizes = Copies(device), 0
        self.layers = [self.Layer(self.plan, HostRows(heads, dim, device, dtype, self.copies),
                                  device, dtype) for _ in range(n_layers)]
        self.first_text = None  # its number of tokens, and the places in use after it
        self.totals = Totals(self.plan, self.layers)  # rows selected and loaded, for `report`

    @property
    def num_tokens(self) -> int:
        return self.plan.num_tokens

    @property
    def version(self) -> int:
        """Changes when a tensor is reallocated: a graph captured before must not be replayed."""
        return self.n_resizes + sum(layer.host.n_moves for layer in self.layers)

    def expect(self, spans: list):
        """The next text has these sentences, (start, end) in its tokens. The first text is kept as
        the keep factor says, later ones whole. A sentence that is open ends here."""
        plan = self.plan
        if plan.n_rows > plan.open_row:
            self.seal(plan.n_rows - plan.open_row)
        if plan.is_first_text:
            plan.n_first_sinks = min(self.config.sink_tokens, spans[-1][1])
        plan.text_end = plan.num_tokens + spans[-1][1]
        plan.sentence_ends = torch.tensor([end for _, end in spans], device=plan.n_select.device)
        # More places than the table has: `make_room` replaces its tensors by larger ones.
        self.n_resizes += make_room(self.layers, plan.n_places + len(spans))

    def advance(self, n_tokens: int):
        """All layers have seen `n_tokens` more: a part of a text, or one written token."""
        plan = self.plan
        plan.num_tokens += n_tokens
        if plan.num_tokens > plan.text_end:
            self.totals.add_token()
            plan.plan_next()
        elif plan.num_tokens == plan.text_end:
            self.end_text()

    def end_text(self):
        """All layers have read a text: its sentences can be selected."""
        plan = self.plan
        if plan.is_first_text:
            plan.n_dropped = plan.num_tokens - self.config.n_kept(plan.num_tokens)
            # The sentences of which a head keeps something: a head has its empty ones at the end.
            plan.n_places = 1 + max(int((layer.lengths > 0).sum(-1).max()) for layer in self.layers)
            self.n_resizes += make_room(self.layers, plan.n_places, shrink=True)
            self.first_text = plan.num_tokens, plan.n_places
        else:
            plan.n_places += len(plan.sentence_ends)
        plan.open_row = plan.n_rows
        self.start_writing()

    def start_writing(self):
        """After a text, the last tokens so far are the window. One more makes it full."""
        plan = self.plan
        n_recent = min(plan.n_rows - plan.n_first_sinks, self.config.recent_window - 1)
        for layer in self.layers:
            layer.fill_window(plan.n_rows - n_recent)
        self.totals.restart()
        plan.plan_next()

    def seal(self, length: int):
        """The first `length` tokens of the open sentence form a sentence. Its rows can be selected
        once they have left the window."""
        plan = self.plan
        self.n_resizes += make_room(self.layers, plan.n_places + 1)
        for layer in self.layers:
            layer.seal(length)
        self.copies.wait()  # the next token may load these rows
        plan.n_places += 1
        plan.open_row += length
        plan.plan_next()

    def truncate(self, n_tokens: int):
        """Forget all that was read and written after the first text, of `n_tokens`."""
        plan = self.plan
        first_tokens, plan.n_places = self.first_text
        assert n_tokens == first_tokens, "a cache can go back to the end of its first text only"
        plan.num_tokens = plan.text_end = n_tokens
        plan.open_row = plan.n_rows
        self.n_resizes += make_room(self.layers, plan.n_places, shrink=True)
        for layer in self.layers:
            layer.truncate(plan.n_places)
        self.start_writing()

    def report(self) -> dict:
        """Bytes held on both tiers, and bytes selected and loaded since the last text."""
        return report(self)
