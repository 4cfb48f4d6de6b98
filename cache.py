"""Where keys and values live while a Llama reads and writes: on the device and on the host.

    Plan             what all layers share: the text being read, what the next token attends to
    LayerCache       one layer: its sentences and slots on the device, its rows on the host
    SentenceKVCache  all layers, with the protocol of `model.FullCache`

It asks `sentencekv.py` for every choice, and knows nothing of tokenizers, RoPE or weights.

Two coordinates. A *row* is a kept token: its key and its value, side by side (2, D), so that they
move together. All rows of a head are on the host, the head's secondary sinks first, then the other
kept tokens as they are read. Prefill may drop tokens in the middle of the first text. It drops
none of its last tokens and nothing that comes later, so there row = position - n_dropped. A *slot*
is a place for a row on the device. Attention reads the slots of its layer and nothing else:

    [ B slots for selected rows | R slots for the window: row r is in slot B + r % R ]

Shapes as in `sentencekv.py`. The table of a layer has S places. Place 0 stands for what is always
attended to, all sinks; each other place is a sentence.
"""

import math

import torch
import torch.nn.functional as F

from sentencekv import (SCORES, SentenceKVConfig, find_secondary_sinks, keep_tokens, order_rows,
                        select_rows, sentence_bounds, sentence_vectors, token_importance)
from support.host_rows import Copies, HostRows, load_missing
from support.memory import report
from support.table import resize, room_for

NO_ROW = 2**62  # the row of an empty slot; greater than any row


class Plan:
    """What all layers share. A layer holds the plan and not the cache, which holds the layers: such
    a cycle would keep their memory longer than needed."""

    def __init__(self, config: SentenceKVConfig, max_tokens: int, device):
        self.config = config
        self.num_tokens = 0  # that all layers have seen: the position of the next one
        self.n_dropped = 0  # tokens of the first text, in each head
        self.n_sinks = 0  # first tokens that are always attended to
        self.n_places = 1  # of the table, in use
        self.open_row = 0  # tokens from this row on are in no sentence yet
        self.text_end = 0  # the text being read ends at this position
        self.sentence_ends = None  # of the text being read, in its tokens (S,)

        self.n_row_slots = min(config.token_budget - config.recent_window, max_tokens)  # B
        # The window also has to hold an open sentence. R could be less, but with 512 slots a head
        # attention is 17 % slower than with 528: powers of two collide in a processor's cache.
        self.n_window_slots = config.recent_window + min(config.sentence_limit, max_tokens)  # R
        self.window_slots = torch.arange(self.n_window_slots, device=device)

        # For the next token, in tensors: a CUDA graph records a number as a constant.
        self.budget = torch.zeros(1, device=device, dtype=torch.long)  # rows to select in each head
        self.window_row = torch.zeros_like(self.budget)  # only rows before it can be selected
        self.next_slot = torch.zeros_like(self.budget)  # of the token itself
        self.in_window = torch.zeros(1, self.n_window_slots, device=device, dtype=torch.bool)
        self.n_loaded = torch.zeros_like(self.budget)  # rows since the last text, of all layers

    @property
    def n_rows(self) -> int:
        """Rows so far: the row of the next token."""
        return self.num_tokens - self.n_dropped

    @property
    def is_first_text(self) -> bool:
        return self.open_row == 0

    def slots_of(self, first_row: int, end_row: int) -> torch.Tensor:
        """The slots of rows of the window."""
        rows = torch.arange(first_row, end_row, device=self.window_slots.device)
        return self.n_row_slots + rows % self.n_window_slots

    def window_start(self) -> int:
        """The next token attends to all rows from this one to its own: the recent window, or the
        whole open sentence if that is longer, or its end if that does not fit the budget."""
        config, end = self.config, self.n_rows + 1
        room = config.token_budget - config.sink_tokens - config.secondary_sinks
        start = min(end - config.recent_window, self.open_row)
        return max(start, end - room, self.n_sinks)

    def next_token(self):
        """Decide what the next token attends to: its window, and as many rows before the window as
        the budget of τ tokens still allows, the sinks among them.

        With τ = 96, a window of 32 and 300 rows before it, 64 rows are selected in each head. If
        the open sentence has 40 tokens, its window is 40, and 56 are selected.
        """
        row, start = self.n_rows, self.window_start()
        window_row = min(start, self.open_row)
        assert row - window_row < self.n_window_slots, "a sentence is too long: call `seal`"
        window = row + 1 - start
        self.budget.fill_(min(self.config.token_budget - window, window_row))
        self.window_row.fill_(window_row)
        self.next_slot.fill_(self.n_row_slots + row % self.n_window_slots)
        age = (row - self.window_slots) % self.n_window_slots  # 0: the slot of the token itself
        self.in_window.copy_(age < window)


class LayerCache:
    """One layer. Per KV head, on the device:

    vectors    (H_kv, S, D)         the sentence vector of each place; 0 for place 0 and empty ones
    variances  (H_kv, S)            of the sentence's keys
    lengths    (H_kv, S) float      rows of the whole sentence, for the score; 0 for place 0
    starts     (H_kv, S)            its first row that may be selected: no sink
    ends       (H_kv, S)            the row after its last
    scores     (H_kv, S)            how well it matches the sentence being written
    n_resident (H_kv, S)            how many of its rows are in slots
    slots      (H_kv, B + R, 2, D)
    slot_row, slot_place, slot_missing  (H_kv, B): the row of a slot for selected rows, its place
                                    in the table, and whether it must be loaded from the host
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
        """Take the next part of a text and offload it. With the last part, make its sentences.

        All earlier rows come back to the device, for as long as the layer computes."""
        plan, kv = self.plan, torch.stack((k, v), dim=2)
        first_row, rows = plan.n_rows, kv  # to offload
        if first_row > 0:
            kv = torch.cat((self.host.read(0, first_row), kv), dim=1)  # (H_kv, n, 2, D)
        if plan.is_first_text:  # `clone`: a slice would hold all queries in memory
            self.last_queries.append(q[:, -plan.config.observation_window :].clone())
        if plan.num_tokens + k.shape[1] < plan.text_end:  # another part follows
            self.host.reserve(plan.text_end - plan.n_dropped)
        elif plan.is_first_text:
            kept, secondary = self.choose_tokens(kv[:, :, 0])
            first_row, rows = 0, self.make_sentences(kv, kept, secondary)  # in place of all parts
        else:
            ends = plan.sentence_ends.expand(len(k), -1)
            self.add_sentences(kv[:, plan.open_row :, 0], F.pad(ends, (1, 0)), plan.open_row)
        self.offload(first_row, rows)
        return kv.unbind(dim=2)

    def choose_tokens(self, k) -> tuple:
        """k (H_kv, T, D) of the first text -> the positions that each head keeps (H_kv, N), in
        reading order, and which tokens are secondary sinks (H_kv, T)"""
        config, n_tokens = self.plan.config, k.shape[1]
        secondary = find_secondary_sinks(k, config)
        q = torch.cat(self.last_queries, dim=1)[:, -config.observation_window :]
        self.last_queries = []
        if config.n_kept(n_tokens) == n_tokens:
            return torch.arange(n_tokens, device=k.device).expand(len(k), -1), secondary
        return keep_tokens(token_importance(q, k), secondary, config), secondary

    def make_sentences(self, kv, kept, secondary) -> torch.Tensor:
        """Put the kept rows in order, and give the sentences of the first text their places.
        kv (H_kv, T, 2, D), and the results of `choose_tokens` -> the kept rows (H_kv, N, 2, D)"""
        plan, head = self.plan, torch.arange(len(kv), device=kv.device)[:, None]
        order, positions = order_rows(kept, secondary)
        rows = kv[head, order]
        self.host.note_positions(order)
        bounds = sentence_bounds(positions, plan.sentence_ends)
        self.add_sentences(rows[:, :, 0], bounds)
        # The first rows are all sinks. They are place 0, and may not be selected a second time.
        n_always = bounds[:, :1] + plan.n_sinks  # secondary sinks and first tokens
        self.starts[:, 1:].clamp_(min=n_always)
        self.ends[:, 1:].clamp_(min=n_always)
        self.ends[:, :1] = n_always
        return rows

    def add_sentences(self, keys, bounds, first_row: int = 0):
        """Give sentences the next places of the table. keys (H_kv, n, D) of the rows from
        `first_row` on, bounds (H_kv, m + 1) of m sentences among them"""
        first = self.plan.n_places
        places = slice(first, first + bounds.shape[-1] - 1)
        self.vectors[:, places], self.variances[:, places] = sentence_vectors(keys, bounds)
        self.lengths[:, places] = bounds.diff(dim=-1).float()
        self.starts[:, places] = first_row + bounds[:, :-1]
        self.ends[:, places] = first_row + bounds[:, 1:]

    def offload(self, first_row: int, rows):
        """Copy rows (H_kv, n, 2, D) to the host, beside the computation that follows."""
        self.host.write(first_row, rows)

    def start_window(self, first_row: int):
        """After a text, the window's first rows come from the host."""
        n_rows = self.plan.n_rows
        self.slots[:, self.plan.slots_of(first_row, n_rows)] = self.host.read(first_row, n_rows)
        self.scores.zero_()

    def decode(self, q, k, v) -> tuple:
        """Select rows, load those that are missing (Section 3.3), return all slots and a mask."""
        plan = self.plan
        self.slots.index_copy_(1, plan.next_slot, torch.stack((k, v), dim=2))
        self.select(q.view(len(k), -1, q.shape[-1]))  # (H_kv, G, D)
        self.load()
        mask = torch.cat((self.slot_row < NO_ROW, plan.in_window.expand(len(k), -1)), dim=1)
        return *self.slots.unbind(dim=2), mask.unsqueeze(1)

    def select(self, q):
        """Select the rows of the best sentences, and find slots for them. q (H_kv, G, D)"""
        plan = self.plan
        # Scores add up over the sentence being written, with less weight for older tokens.
        torch.add(self.score(q), self.scores, alpha=plan.config.query_decay, out=self.scores)
        self.scores[:, 0] = math.inf  # after the sum: a decay of 0 times infinity is not a number
        available = plan.window_row.clamp(self.starts, self.ends) - self.starts  # (H_kv, S)
        selected = select_rows(self.scores, available, plan.budget, plan.n_row_slots)
        rows, places, missing = assign_slots(
            self.slot_row, self.slot_place, self.starts, self.n_resident, selected)
        self.slot_row.copy_(rows)
        self.slot_place.copy_(places)
        self.slot_missing.copy_(missing)
        self.n_resident.copy_(selected)
        plan.n_loaded += missing.sum()

    def score(self, q):
        """How well each sentence matches one token's queries (H_kv, G, D) -> (H_kv, S)."""
        return SCORES[self.plan.config.score](q, self.vectors, self.variances, self.lengths)

    def load(self):
        """Copy the missing rows from the host into the slots that were found for them. The other
        selected rows are in slots already."""
        load_missing(self.host, self.slots, self.slot_row, self.slot_missing)

    def seal(self, length: int):
        """Make the first `length` rows of the open sentence a sentence of the table, and offload
        them."""
        first_row = self.plan.open_row
        kv = self.slots[:, self.plan.slots_of(first_row, first_row + length)]  # (H_kv, n, 2, D)
        bounds = torch.tensor([[0, length]], device=kv.device).expand(len(kv), -1)
        self.add_sentences(kv[:, :, 0], bounds, first_row)
        self.offload(first_row, kv)
        self.scores.zero_()  # what stays open after the end no longer counts

    def truncate(self, n_places: int):
        """Forget all places of the table from this one on, and what is in slots."""
        for table in (self.lengths, self.starts, self.ends):
            table[:, n_places:] = 0
        self.slot_row.fill_(NO_ROW)
        for tensor in (self.slot_place, self.slot_missing, self.n_resident):
            tensor.zero_()


class SentenceKVCache:
    """Every kept row on the host; all sinks, selected rows and the window in slots on the device.

    The protocol is that of `model.FullCache`. Invariants, which tests/test_cache.py checks after
    every step:
     1. The rows of a head are its secondary sinks, and then its sentences without gaps.
     2. Row r of the window is in slot B + r % R.
     3. The rows of a place in slots are its first `n_resident` ones, from `starts` on.
     4. Selected rows and window do not overlap: at most `token_budget` tokens. In each head,
        min(`budget`, rows before the window) are selected, all sinks among them.
     5. The window never moves back, so a row that may be selected once may be from then on.
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
        self.first_text = None  # its tokens, and the places in use after it
        self.n_always = 0  # sinks of all heads and layers
        self.n_selected = torch.zeros_like(self.plan.n_loaded)  # since the last text, without sinks

    @property
    def num_tokens(self) -> int:
        return self.plan.num_tokens

    @property
    def version(self) -> int:
        """Changes when a tensor is reallocated: a graph captured before must not be replayed."""
        return self.n_resizes + sum(layer.host.n_moves for layer in self.layers)

    def make_room(self, n_places: int, shrink: bool = False):
        """Have a table with room for so many places."""
        capacity = self.layers[0].vectors.shape[1]
        if n_places > capacity or shrink and room_for(n_places) < capacity:
            self.n_resizes += 1
            for layer in self.layers:
                resize(layer, layer.TABLE, room_for(n_places))

    def expect(self, spans: list):
        """The next text has these sentences, (start, end) in its tokens. The first text is kept as
        the keep factor says, later ones whole. A sentence that is open ends here."""
        plan = self.plan
        if plan.n_rows > plan.open_row:
            self.seal(plan.n_rows - plan.open_row)
        if plan.is_first_text:
            plan.n_sinks = min(self.config.sink_tokens, spans[-1][1])
        plan.text_end = plan.num_tokens + spans[-1][1]
        plan.sentence_ends = torch.tensor([end for _, end in spans], device=plan.budget.device)
        self.make_room(plan.n_places + len(spans))

    def advance(self, n_tokens: int):
        """All layers have seen `n_tokens` more: a part of a text, or one token."""
        plan = self.plan
        reading = plan.num_tokens < plan.text_end
        plan.num_tokens += n_tokens
        if not reading:
            n_heads = len(self.layers) * self.layers[0].host.heads
            self.n_selected += n_heads * plan.budget - self.n_always
            plan.next_token()
            return
        self.copies.wait()
        if plan.num_tokens == plan.text_end:
            self.end_text()

    def end_text(self):
        """All layers have read a text: its sentences can be selected."""
        plan = self.plan
        plan.n_places += len(plan.sentence_ends)
        if plan.is_first_text:
            plan.n_dropped = plan.num_tokens - self.config.n_kept(plan.num_tokens)
            used = torch.stack([(layer.lengths > 0).sum(dim=-1).max() for layer in self.layers])
            plan.n_places = 1 + int(used.max())  # the sentences of which a head keeps something
            self.make_room(plan.n_places, shrink=True)
            self.first_text = plan.num_tokens, plan.n_places
        self.start_window()

    def start_window(self):
        """After a text, its last tokens are the window. One more makes it full."""
        plan = self.plan
        plan.open_row = plan.n_rows
        n_recent = min(plan.n_rows - plan.n_sinks, self.config.recent_window - 1)
        for layer in self.layers:
            layer.start_window(plan.n_rows - n_recent)
        self.n_selected.zero_()
        # The sinks are loaded once, with the first token. They are not counted as loaded.
        always = torch.stack([layer.ends[:, 0] for layer in self.layers])
        resident = torch.stack([layer.n_resident[:, 0] for layer in self.layers])
        self.n_always = int(always.sum())
        plan.n_loaded.copy_((resident - always).sum())
        plan.next_token()

    def seal(self, length: int):
        """The first `length` tokens of the sentence being written form a sentence. Its rows can be
        selected once they have left the window."""
        plan = self.plan
        self.make_room(plan.n_places + 1)
        for layer in self.layers:
            layer.seal(length)
        self.copies.wait()
        plan.n_places += 1
        plan.open_row += length
        plan.next_token()

    def truncate(self, n_tokens: int):
        """Forget all that was read and written after the first text, of `n_tokens`."""
        plan = self.plan
        first_tokens, plan.n_places = self.first_text
        assert n_tokens == first_tokens, "only the first text can be gone back to"
        plan.num_tokens = plan.text_end = n_tokens
        self.make_room(plan.n_places, shrink=True)
        for layer in self.layers:
            layer.truncate(plan.n_places)
        self.start_window()

    def report(self) -> dict:
        """Bytes held on both tiers, and bytes selected and loaded since the last text."""
        return report(self)


def assign_slots(rows, places, starts, n_resident, selected) -> tuple:
    """The row that each slot holds next, that row's place in the table, and whether the row must be
    loaded. A slot whose row is still selected keeps it. The other slots are free, and the i-th free
    slot takes the i-th row to load.

    rows, places (H_kv, B) of the slots; starts, n_resident and selected (H_kv, S) of the places,
    the last two in rows -> rows, places, missing (H_kv, B)

    Rows 4 and 5 of place 0 and row 8 of place 1 are in slots. Rows 8, 9 and 12 are selected:

        slot                     0    1    2
        its row                  5    8    4
        free?                  yes   no  yes      rows 5 and 4 are not selected any more
        number of a free slot    1         2
        rows to load             9        12      the first of place 1, the second of place 2

    >>> assign_slots(rows=torch.tensor([[5, 8, 4]]), places=torch.tensor([[0, 1, 0]]),
    ...     starts=torch.tensor([[4, 8, 12]]), n_resident=torch.tensor([[2, 1, 0]]),
    ...     selected=torch.tensor([[0, 2, 1]]))
    (tensor([[ 9,  8, 12]]), tensor([[1, 1, 2]]), tensor([[ True, False,  True]]))
    """
    ends = starts + selected  # 4, 10, 13: selected rows of a place are before it
    free = rows >= ends.gather(-1, places)  # also where a slot is empty
    number = free.cumsum(dim=-1)  # from 1; unused at slots that are not free
    loads = (selected - n_resident).clamp(min=0).cumsum(dim=-1)  # up to each place: 0, 1, 2
    place = torch.searchsorted(loads, number).clamp(max=selected.shape[-1] - 1)
    # The last row to load of a place has number == loads, and is its end - 1: count back from it.
    row = (ends - loads).gather(-1, place) + number - 1
    missing = free & (number <= loads[:, -1:])
    rows = torch.where(missing, row, rows.masked_fill(free, NO_ROW))
    return rows, torch.where(free, place, places), missing
