"""Where keys and values live while a Llama reads and writes: on the device and on the host.

    Plan             what all layers share: the text being read, what the next token attends to
    LayerCache       one layer: its sentences and slots on the device, its rows on the host
    SentenceKVCache  all layers, with the protocol of `model.FullCache`

A *row* is a kept token: its key and its value, side by side, so that they move together. Rows and
sentence vectors are *packed*: D channels are kept as D' numbers (`support/bits.py`). A head's rows
have numbers: its secondary sinks come first, then its other kept tokens as they are read. The
protected tokens at the end of the first text are all kept, and are no secondary sinks. If N of its
T tokens are kept, the last one is row N - 1. So for protected and all later tokens,
row = position - (T - N). All rows are on the host but those of the *open* sentence, being written.

A *slot* is room for a row on the device. While decoding, attention reads the unpacked slots of its
layer and nothing else, in any order: RoPE has put the positions into the keys.

    [ B slots for selected rows | R slots for the window: row r is in slot B + r % R ]

The *window* is the recent window, or the open sentence if that is longer. The *table* of a layer
has P places. Place 0 stands for all sinks of a head, the first and the secondary ones: it is always
selected. Each other place stands for a sentence, not always the same one in two heads.

An example, to which comments refer. τ is 16, with 3 first sinks, at most 2 secondary ones, a recent
window of 4, and at most 9 tokens in a sentence. A prompt has sentences of 9 and 8 tokens. In one
head, the tokens 11 and 12 are secondary sinks.

    rows     0 and 1            2, 3, 4      5 to 10           11 to 16
    tokens   11 and 12          0, 1, 2      3 to 8            9 10 13 14 15 16
             secondary sinks    first sinks  first sentence    second sentence

    places       0    1    2    The next token is row 17, and its window is the rows 14 to 17.
    starts       0    5   11    Place 2 has the best sentence.
    ends         5   11   17
    available    5    6    3    rows before the window
    selected     5    4    3    rows, 12 in all: τ without the window
"""

import math

import torch
import torch.nn.functional as F

from sentencekv import (SCORES, SentenceKVConfig, find_secondary_sinks, keep_tokens, order_rows,
                        select_rows, sentence_bounds, sentence_vectors, token_importance)
from support.host_rows import Copies, HostRows, load_missing
from support.memory import Totals, report
from support.reuse import make_layers
from support.slots import NO_ROW, assign_slots
from support.table import make_room, room_for


class Plan:
    """What all layers share. The cache changes it:

    before a text               `expect`     n_first_sinks, sentence_ends
    after a text or a token     `advance`    num_tokens
    at the end of a text        `end_text`   n_dropped, n_places, open_row, sentence_ends
    back to that end            `truncate`   num_tokens, n_places, open_row
    after a written sentence    `seal`       n_places, open_row
    before each written token   `plan_next`  n_select, select_end, next_slot, in_window
    """

    def __init__(self, config: SentenceKVConfig, max_tokens: int, device):
        self.config = config
        self.num_tokens = 0  # that all layers have seen: the position of the next one
        self.n_dropped = 0  # T - N: tokens of the first text that each head dropped
        self.n_first_sinks = 0  # number of first tokens that are always selected
        self.n_places = 1  # number of places in use
        self.open_row = 0  # first row without a place: of the open sentence, or of a new text
        self.sentence_ends = None  # of the text being read (S,), counted from its beginning

        # At most `max_tokens` will be read and written: a short text needs fewer slots.
        self.n_row_slots = min(config.token_budget - config.recent_window, max_tokens)  # B
        # R. `recent_window` or more is needed, and `sentence_limit` + 1: the next token is planned
        # before a seal. The sum avoids B + R = τ, often a power of two: such strides are slow.
        self.n_window_slots = config.recent_window + min(config.sentence_limit, max_tokens)
        self.window_index = torch.arange(self.n_window_slots, device=device)  # 0 to R - 1
        # For the next token, as tensors: a CUDA graph would record a number as a constant.
        self.next_slot = torch.zeros(1, device=device, dtype=torch.long)  # its slot: 12 + 17 % 13
        self.n_select = self.next_slot.int()  # rows that a head selects, sinks among them: 12
        self.select_end = self.n_select.clone()  # only rows before it can be selected: 14
        self.in_window = torch.zeros(1, self.n_window_slots, device=device, dtype=torch.bool)

    @property
    def n_rows(self) -> int:
        """Rows so far: the row of the next token. 0 while the first text is read, N after it."""
        return self.num_tokens - self.n_dropped

    @property
    def is_first_text(self) -> bool:
        return self.open_row == 0  # until the first text has ended

    def slots_of(self, first_row: int, end_row: int) -> torch.Tensor:
        """The slots of rows of the window."""
        rows = torch.arange(first_row, end_row, device=self.window_index.device)
        return self.n_row_slots + rows % self.n_window_slots

    def window_start(self) -> int:
        """The first row of the next token's window. All heads share one window. So it leaves room
        for the largest number of sinks that a head can have."""
        config, end = self.config, self.n_rows + 1
        most = config.token_budget - config.sink_tokens - config.secondary_sinks
        start = min(end - config.recent_window, self.open_row)  # recent window or open sentence
        start = max(start, end - most)  # cut to fit the budget
        # First sinks are not repeated. Where there are secondary ones, `start` is greater anyway.
        return max(start, self.n_first_sinks)

    def plan_next(self):
        """Decide what the next token attends to: its window, which ends with the token itself, and
        as many rows before the window as the budget of τ tokens allows."""
        row, start = self.n_rows, self.window_start()  # 17, 14
        n_window = row + 1 - start
        # The open rows before a window that is cut have no place, and are not attended to.
        select_end = min(start, self.open_row)
        n_select = min(self.config.token_budget - n_window, select_end)
        # Slots hold the window, and the whole open sentence until it is sealed.
        assert row - select_end < self.n_window_slots, "an open sentence needs slots: call `seal`"
        assert n_select <= self.n_row_slots, "more tokens than `max_tokens`"
        self.n_select.fill_(n_select)
        self.select_end.fill_(select_end)
        self.next_slot.fill_(self.n_row_slots + row % self.n_window_slots)
        age = (row - self.window_index) % self.n_window_slots  # (R,): of row 14 it is 3
        self.in_window.copy_(age < n_window)


class LayerCache:
    """One layer. On the device, its table per KV head:

    vectors     (H_kv, P, D')      the sentence vector
    variances   (H_kv, P)          of the sentence's keys
    lengths     (H_kv, P) float    rows of the sentence, first sinks among them, for its score
    starts      (H_kv, P)          its first row that is not a sink
    ends        (H_kv, P)          the row after its last; those before the window can be selected
    scores      (H_kv, P)          how well it matches the open sentence
    n_resident  (H_kv, P)          how many of its rows are in slots
    First sinks count for the vector and length of their sentence. They are selected with place 0:
    the first sentence has length 9, and starts at row 5. Place 0 has length 0: no share of scores.

    slots         (H_kv, B + R, 2, D')  rows
    slot_row      (H_kv, B)             the row in a slot, or NO_ROW, a high number
    slot_place    (H_kv, B)             the row's place
    slot_missing  (H_kv, B)             whether the row must be loaded
    `host.read(a, b)` brings rows to the device, (H_kv, b - a, 2, D'). A timer measures each method.
    """

    TABLE = ("vectors", "variances", "lengths", "starts", "ends", "scores", "n_resident")

    def __init__(self, plan: Plan, host: HostRows):
        # It has no reference to the cache: a cycle would delay the freeing of memory.
        self.plan, self.host, self.packing = plan, host, host.packing
        heads, capacity, device = host.heads, room_for(plan.n_places), host.device
        # While a text is read: all rows so far (H_kv, n, 2, D), each part's last queries (H, W, D).
        self.text_kv, self.last_queries = None, []
        self.vectors = self.packing.zeros(heads, capacity)
        self.variances = torch.zeros(heads, capacity, device=device)
        self.lengths, self.scores = self.variances.clone(), self.variances.clone()
        self.starts = torch.zeros_like(self.lengths, dtype=torch.int32)  # many places
        self.ends, self.n_resident = self.starts.clone(), self.starts.clone()
        n_slots = plan.n_row_slots + plan.n_window_slots
        self.slots = self.packing.zeros(heads, n_slots, 2)
        self.slot_place = torch.zeros(heads, plan.n_row_slots, device=device, dtype=torch.long)
        self.slot_row = torch.full_like(self.slot_place, NO_ROW, dtype=torch.int32)
        self.slot_missing = torch.zeros_like(self.slot_row, dtype=torch.bool)

    def prefill(self, q, k, v) -> tuple:
        """Take a text, or the next part of one. It attends to all rows so far: those of earlier
        texts come back to the device until `keep`."""
        plan, kv = self.plan, torch.stack((k, v), dim=2)  # (H_kv, T, 2, D)
        if self.text_kv is None and plan.n_rows > 0:
            self.text_kv = self.packing.unpack(self.host.read(0, plan.n_rows)).to(k.dtype)
        self.text_kv = kv if self.text_kv is None else torch.cat((self.text_kv, kv), dim=1)
        self.last_queries.append(q[:, -plan.config.observation_window :].clone())  # q is freed
        return self.text_kv.unbind(dim=2)

    def keep(self):
        """The layer has read a text: give its sentences their places, and offload its rows. All
        rows of a later text are kept, and those of the first text as the keep factor says."""
        plan, kv = self.plan, self.text_kv
        first_row = plan.n_rows  # `advance` has not counted this text yet
        if plan.is_first_text:
            kv = self.keep_first_text(kv)
        else:
            kv = self.packing.pack(kv[:, first_row:])  # without those of earlier texts
            bounds = F.pad(plan.sentence_ends, (1, 0)).expand(len(kv), -1)  # 0, and all ends
            self.add_sentences(kv[:, :, 0], bounds, first_row)
        self.offload(first_row, kv)
        self.text_kv, self.last_queries = None, []

    def keep_first_text(self, kv) -> torch.Tensor:
        """Decide what is kept, and make the sentences: kv (H_kv, T, 2, D) -> (H_kv, N, 2, D')"""
        self.packing.fit(kv)
        return self.make_sentences(kv, *self.most_important(kv[:, :, 0]))

    def most_important(self, k) -> tuple:
        """The positions that each head keeps, in reading order (H_kv, N), and which tokens are
        secondary sinks (H_kv, T). k (H_kv, T, D) of the first text"""
        config, n_tokens = self.plan.config, k.shape[1]
        secondary = find_secondary_sinks(k, config)
        if config.n_kept(n_tokens) == n_tokens:
            return torch.arange(n_tokens, device=k.device).expand(len(k), -1), secondary
        q = torch.cat(self.last_queries, dim=1)[:, -config.observation_window :]  # (H, W, D)
        return keep_tokens(token_importance(q, k), secondary, config), secondary

    def make_sentences(self, kv, kept, secondary) -> torch.Tensor:
        """Put the kept rows in order, and give the sentences of the first text their places.
        kv (H_kv, T, 2, D), kept (H_kv, N), secondary (H_kv, T) -> rows (H_kv, N, 2, D')"""
        plan, head = self.plan, torch.arange(len(kv), device=kv.device)[:, None]
        row_positions, marked = order_rows(kept, secondary)
        kv = self.packing.pack(kv[head, row_positions])  # (H_kv, N, 2, D')
        self.host.note_positions(row_positions)  # for a trace, and for a saved document
        bounds = sentence_bounds(marked, plan.sentence_ends)  # (H_kv, S + 1)
        n_secondary = bounds[:, :1]  # the rows before the first sentence: 2
        n_all_sinks = n_secondary + plan.n_first_sinks  # (H_kv, 1): 5
        self.add_sentences(kv[:, :, 0], bounds, n_all_sinks=n_all_sinks)
        self.ends[:, :1] = n_all_sinks  # place 0
        return kv

    def add_sentences(self, keys, bounds, first_row: int = 0, n_all_sinks=0):
        """Give S sentences the next places of the table. keys (H_kv, n, D') of the rows from
        `first_row` on, bounds (H_kv, S + 1) counted from it, n_all_sinks 0 or (H_kv, 1)"""
        first_place = self.plan.n_places
        places = slice(first_place, first_place + bounds.shape[-1] - 1)
        self.add_vectors(places, keys, bounds)
        self.lengths[:, places] = bounds.diff(dim=-1).float()
        # First sinks are of place 0, not of their sentence: 2, 11, 17 become 5, 11, 17.
        rows = (first_row + bounds).clamp(min=n_all_sinks)
        self.starts[:, places], self.ends[:, places] = rows[:, :-1], rows[:, 1:]

    def add_vectors(self, places: slice, keys, bounds):
        """What the score will know of these sentences."""
        vectors, self.variances[:, places] = sentence_vectors(self.packing.unpack(keys), bounds)
        self.vectors[:, places] = self.packing.pack(vectors)

    def offload(self, first_row: int, kv):
        """Copy rows (H_kv, n, 2, D') to the host: they get the numbers from this one on."""
        self.host.write(first_row, kv)

    def fill_window(self, first_row: int):
        """After a text, the rows from this one on come back from the host. Scores begin at 0."""
        n_rows = self.plan.n_rows
        self.slots[:, self.plan.slots_of(first_row, n_rows)] = self.host.read(first_row, n_rows)
        self.scores.zero_()

    def decode(self, q, k, v) -> tuple:
        """Select rows, load those that are missing, return all slots, unpacked, and a mask."""
        kv = torch.stack((k, v), dim=2)  # (H_kv, 1, 2, D)
        self.slots.index_copy_(1, self.plan.next_slot, self.packing.pack(kv))
        self.select(q.view(len(k), -1, q.shape[-1]))
        self.load()
        mask = torch.cat((self.slot_row < NO_ROW, self.plan.in_window.expand(len(k), -1)), dim=1)
        return *self.packing.unpack(self.slots).unbind(dim=2), mask.unsqueeze(1)  # (H_kv, 1, B + R)

    def select(self, q):
        """Select the rows of the best sentences, and find slots for them. q (H_kv, G, D)"""
        plan = self.plan
        # Scores add up over the open sentence, with less weight for older tokens.
        torch.add(self.score(q), self.scores, alpha=plan.config.query_decay, out=self.scores)
        self.scores[:, 0] = math.inf  # after the sum: with a decay of 0, 0 * inf would be NaN
        # The number of rows of each place before the window (H_kv, P): 5, 6, 3 in the example.
        available = plan.select_end.clamp(self.starts, self.ends) - self.starts
        # How many are selected, always the first ones: 5, 4, 3. The best B places are enough.
        selected = select_rows(self.scores, available, plan.n_select, plan.n_row_slots)
        # Of each place the first `n_resident` rows are in slots. Selected rows beyond them are
        # missing. In the example, the next token selects 5, 3, 4 rows. So row 14, which has left
        # the window, is missing. It takes the slot of row 8, which is no longer selected.
        rows, places, missing = assign_slots(
            self.slot_row, self.slot_place, self.starts, self.n_resident, selected)
        self.slot_row.copy_(rows)  # not `=`: a CUDA graph reads and writes the same tensors
        self.slot_place.copy_(places)
        self.slot_missing.copy_(missing)
        self.n_resident.copy_(selected)

    def score(self, q):
        """How well each sentence matches one token's queries (H_kv, G, D) -> (H_kv, P)."""
        vectors = self.packing.unpack(self.vectors)  # (H_kv, P, D)
        score = SCORES[self.plan.config.score]
        return score(q.to(vectors.dtype), vectors, self.variances, self.lengths)

    def load(self):
        """Copy the missing rows from the host into the slots that were found for them."""
        load_missing(self.host, self.slots, self.slot_row, self.slot_missing)

    def seal(self, length: int):
        """Give the first `length` rows of the open sentence a place, and offload them. More rows
        can be open: some ends are found when tokens of the next sentence are decoded already."""
        first_row = self.plan.open_row
        kv = self.slots[:, self.plan.slots_of(first_row, first_row + length)]  # (H_kv, n, 2, D')
        bounds = torch.tensor([[0, length]], device=kv.device).expand(len(kv), -1)
        self.add_sentences(kv[:, :, 0], bounds, first_row)
        self.offload(first_row, kv)
        self.scores.zero_()  # these tokens do not count

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
     1. The rows of a head are all its sinks, and then the rest of its sentences, without gaps.
     2. Row r of the window is in slot B + r % R.
     3. Of the rows of a place, the first `n_resident` are in slots, from `starts` on.
     4. A head selects `n_select` rows, all sinks among them. With its window they are at most τ.
     5. Only `truncate` moves the window back, and fills it again: older rows were overwritten.
     6. Slots that the mask hides are finite: attention gives them weight 0, and 0 times NaN is NaN.
     7. Tensors are reallocated between tokens, in all layers at once: `decode` can be a CUDA graph.
    """

    Layer = LayerCache  # a subclass can have layers of its own

    def __init__(self, config: SentenceKVConfig, model_config, max_tokens: int, device, dtype):
        n_layers, heads, dim = model_config.kv_shape
        self.config, self.plan = config, Plan(config, max_tokens, device)
        self.copies = Copies(device)  # one stream of copies for all layers
        hosts = (HostRows(heads, dim, config.kv_bits, dtype, self.copies) for _ in range(n_layers))
        self.layers = make_layers(self.Layer, self.plan, hosts, config.reuse_layers)
        self.first_text = None  # its number of tokens, and the places in use at its end
        self.totals = Totals(self.plan, self.layers)  # rows selected and loaded, for `report`

    @property
    def num_tokens(self) -> int:
        return self.plan.num_tokens

    def expect(self, spans: list):
        """The next text has these sentences, (start, end) in its tokens. The first text is kept as
        the keep factor says, later ones whole. A sentence that is open ends here."""
        plan = self.plan
        if plan.n_rows > plan.open_row:
            self.seal(plan.n_rows - plan.open_row)
        if plan.is_first_text:
            plan.n_first_sinks = min(self.config.sink_tokens, spans[-1][1])
        plan.sentence_ends = torch.tensor([end for _, end in spans], device=plan.n_select.device)
        make_room(self.layers, plan.n_places + len(spans))

    def advance(self, n_tokens: int):
        """All layers have seen `n_tokens` more: a text, or one written token."""
        plan = self.plan
        plan.num_tokens += n_tokens
        if plan.sentence_ends is not None:
            self.end_text()
        else:
            self.totals.add_token()
            plan.plan_next()

    def end_text(self):
        """All layers have read a text: its sentences can be selected."""
        plan = self.plan
        if plan.is_first_text:
            plan.n_dropped = plan.num_tokens - self.config.n_kept(plan.num_tokens)
            # The last places can be empty in all heads and layers: these go.
            used = (layer.lengths.any(dim=0).nonzero().max() for layer in self.layers)
            plan.n_places = 1 + max(map(int, used))
            make_room(self.layers, plan.n_places, shrink=True)
            self.first_text = plan.num_tokens, plan.n_places
        else:
            plan.n_places += len(plan.sentence_ends)
        plan.sentence_ends = None
        self.start_writing()

    def start_writing(self):
        """After a text, the last tokens so far are the window. One more makes it full."""
        plan = self.plan
        plan.open_row = plan.n_rows
        n_recent = min(plan.n_rows - plan.n_first_sinks, self.config.recent_window - 1)
        for layer in self.layers:
            layer.fill_window(plan.n_rows - n_recent)
        self.totals.restart()
        plan.plan_next()

    def seal(self, length: int):
        """The first `length` tokens of the open sentence form a sentence. Its rows can be selected
        once they have left the window."""
        plan = self.plan
        make_room(self.layers, plan.n_places + 1)
        for layer in self.layers:
            layer.seal(length)
        self.copies.wait()  # the next token may load these rows; after a text, `fill_window` waits
        plan.n_places += 1
        plan.open_row += length
        plan.plan_next()

    def truncate(self, n_tokens: int):
        """Forget all that was read and written after the first text, of `n_tokens`."""
        plan = self.plan
        first_tokens, plan.n_places = self.first_text
        assert n_tokens == first_tokens, "a cache can go back to the end of its first text only"
        plan.num_tokens = n_tokens
        make_room(self.layers, plan.n_places, shrink=True)
        for layer in self.layers:
            layer.truncate(plan.n_places)
        self.start_writing()

    def report(self) -> dict:
        """Bytes held on both tiers, and bytes selected and loaded since the last text."""
        return report(self)
