"""Where keys and values live while a Llama reads and writes: on the host and on the device.

    HostTier         CPU memory: the keys and values of all kept tokens
    SentenceTable    on the device: each sentence's vector, its rows, its score
    SentenceKVCache  on the device: the slots that attention reads, and what moves between the tiers

This file knows nothing of tokenizers, RoPE or weights, and asks `sentencekv.py` for every choice.
`kv` is always the data of rows: key and value side by side (2, D), so that they move together.
Shapes as in `sentencekv.py`, and L layers, B slots for rows.
"""

import os
from contextlib import nullcontext

import torch
import torch.nn.functional as F

try:  # comes with PyTorch where there is a GPU
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from sentencekv import (SCORES, SentenceKVConfig, find_secondary_sinks, keep_tokens, order_rows,
                        select_rows, sentence_bounds, sentence_vectors, token_importance)

NO_ROW = 2**62  # the row of an empty slot; greater than any row
SENTENCE_BLOCK = 64  # the table's capacity is a multiple of it: a GPU wants aligned rows
ROW_BLOCK = 256  # the least room on the host for rows after the first text


class HostTier:
    """All kept rows in CPU memory: `first` (L, N, H_kv, 2, D) are those of the first text, `later`
    those of what is read and written after it. The rows of `later` follow those of `first`.

    For a GPU both are pinned: a copy runs beside the computation, and kernels can read them.
    """

    def __init__(self, kv_shape: tuple, device: torch.device, dtype):
        self.kv_shape, self.device, self.dtype, self.n_moves = kv_shape, device, dtype, 0
        self.first, self.later = self.empty(0), self.empty(0)
        self.release = None  # of a mapped file: gives back the memory of a layer's rows
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.in_flight = None  # keeps the source of a copy alive until the copy is done

    @torch.inference_mode(False)  # a tensor made in inference mode cannot be changed outside it
    def empty(self, n_rows: int) -> torch.Tensor:
        layers, heads, dim = self.kv_shape
        return torch.empty(layers, n_rows, heads, 2, dim, dtype=self.dtype,
                           pin_memory=self.device.type == "cuda")

    def hold(self, first):
        """Have these rows (L, N, H_kv, 2, D) as those of the first text."""
        if first is not self.first:
            self.first, self.n_moves = first, self.n_moves + 1

    def reserve(self, n_rows: int):
        """Make room for so many rows in all. `later` doubles, so that it seldom moves."""
        n_later = n_rows - self.first.shape[1]
        if n_later > self.later.shape[1]:
            if self.copy_stream is not None:
                self.copy_stream.synchronize()
            grown = self.empty(max(n_later, 2 * self.later.shape[1], ROW_BLOCK))
            grown[:, : self.later.shape[1]] = self.later
            self.later, self.n_moves = grown, self.n_moves + 1

    def trim(self, n_rows: int):
        """Keep only so many rows of the first text, and give back the memory of the others."""
        if n_rows < self.first.shape[1]:
            self.hold(self.empty(n_rows).copy_(self.first[:, :n_rows]))

    def write(self, layer: int, first_row: int, kv):
        """Start to copy one layer's kv (H_kv, n, 2, D) to the rows from `first_row` on. At most one
        copy is in flight, so at most one layer is held back on the device by a slow bus."""
        kv = kv.transpose(0, 1).contiguous()  # (n, H_kv, 2, D), one block as on the host
        n_first = self.first.shape[1]
        part, start = (self.first, 0) if first_row < n_first else (self.later, n_first)
        target = part[layer, first_row - start : first_row - start + len(kv)]
        if self.copy_stream is None:
            target.copy_(kv)
            return
        self.wait()
        self.copy_stream.wait_stream(torch.cuda.current_stream(self.copy_stream.device))
        with torch.cuda.stream(self.copy_stream):
            target.copy_(kv, non_blocking=True)
        self.in_flight = kv

    def wait(self):
        """Later work on the current stream waits for the copy in flight."""
        if self.copy_stream is not None:
            torch.cuda.current_stream(self.copy_stream.device).wait_stream(self.copy_stream)
            self.in_flight = None

    def read(self, layer: int, begin: int, end: int, *after) -> torch.Tensor:
        """Rows `begin` to `end` of a layer on the device, and kv (H_kv, n, 2, D) `after` them."""
        if self.copy_stream is not None:
            self.copy_stream.synchronize()
        n_first, later = self.first.shape[1], self.later[layer]
        parts = self.first[layer, begin:end], later[max(begin - n_first, 0) : max(end - n_first, 0)]
        kv = torch.cat((*(p.to(self.device).transpose(0, 1) for p in parts), *after), dim=1)
        if self.release:
            self.release(layer)
        return kv


def load_rows(first, later, slots, rows, missing):
    """Copy the missing ones of `rows` (H_kv, B) into the first B `slots` (H_kv, n, 2, D), from one
    layer of a host tier's `first` and `later` (N, H_kv, 2, D)."""
    if triton and (slots.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):  # 1: in tests
        (heads, n_row_slots), size = rows.shape, slots[0, 0].numel()
        copy_missing[n_row_slots, heads](
            first, later, len(first), slots, rows, missing, slots.shape[1], size,
            triton.next_power_of_2(size), num_warps=1)
        return
    head, slot = missing.nonzero(as_tuple=True)  # the CPU waits for a GPU, then gathers
    place = (rows[head, slot] * len(rows) + head).to(first.device)  # as if the parts were one
    first, later = first.flatten(0, 1), later.flatten(0, 1)
    found = first.index_select(0, place.clamp(max=len(first) - 1))  # (n, 2, D)
    is_later = place >= len(first)
    if is_later.any():
        others = later.index_select(0, (place - len(first)).clamp(min=0))
        found = others.where(is_later[:, None, None], found)
    place = head * slots.shape[1] + slot
    slots.view(-1, *slots.shape[2:]).index_copy_(0, place, found.to(slots.device))


# For `torch.compile` it is one operator, whose inside it does not see.
torch.library.define("sentencekv::load_rows", "(Tensor first, Tensor later, Tensor(a!) slots,"
                     " Tensor rows, Tensor missing) -> ()")
torch.library.impl("sentencekv::load_rows", "default", load_rows)
torch.library.register_fake("sentencekv::load_rows", lambda *tensors: None)


if triton:
    @triton.jit
    def copy_missing(first, later, n_first, slots, rows, missing, n_slots, size,
                     BLOCK: tl.constexpr):
        """One program for each of a head's B slots. It reads pinned host memory directly."""
        slot, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
        here = head * tl.num_programs(0) + slot
        if tl.load(missing + here):
            channel, row = tl.arange(0, BLOCK), tl.load(rows + here)
            target = slots + (head * n_slots + slot) * size + channel
            if row < n_first:
                source = first + (row * heads + head) * size + channel
            else:
                source = later + ((row - n_first) * heads + head) * size + channel
            tl.store(target, tl.load(source, mask=channel < size), mask=channel < size)


def room_for(n_sentences: int) -> int:
    """A capacity of the table: one more block is free, so that it seldom grows."""
    return (n_sentences // SENTENCE_BLOCK + 2) * SENTENCE_BLOCK


class SentenceTable:
    """What the device knows of each sentence, per layer and KV head. S is the capacity: the first
    `n_sentences` are in use by at least one head, with `n_rows` rows a head. Others are empty.

    vectors        (L, H_kv, S, D)   the sentence vector
    variances      (L, H_kv, S)      of the sentence's keys
    bounds         (L, H_kv, S + 1)  its first row, and after it the next sentence's
    scores         (L, H_kv, S)      how well it matches the sentence being written
    n_resident     (L, H_kv, S)      how many of its retrievable rows are in slots
    lengths        (L, H_kv, S)      how many rows it has, retrievable or not; float, for logarithms
    starts         (L, H_kv, S)      its first retrievable row: no sink, not in the window
    n_retrievable  (L, H_kv, S)      how many are retrievable. `limit` sets the last three.
    """

    def __init__(self, kv_shape: tuple, capacity: int, device, dtype):
        layers, heads, dim = kv_shape
        self.n_sentences = self.n_rows = self.n_resizes = 0
        self.vectors = torch.zeros(layers, heads, capacity, dim, device=device, dtype=dtype)
        self.variances = torch.zeros(layers, heads, capacity, device=device)
        self.scores, self.lengths = self.variances.clone(), self.variances.clone()
        self.n_resident = torch.zeros_like(self.variances, dtype=torch.long)
        self.starts, self.n_retrievable = self.n_resident.clone(), self.n_resident.clone()
        self.bounds = F.pad(self.n_resident, (0, 1))

    @property
    def capacity(self) -> int:
        return self.vectors.shape[2]

    def put(self, layer: int, keys, bounds):
        """Add sentences after those in use: keys (H_kv, n, D), bounds (H_kv, m + 1) within them."""
        first, last = self.n_sentences, self.n_sentences + bounds.shape[-1] - 1
        vectors, variances = sentence_vectors(keys, bounds)
        self.vectors[layer, :, first:last] = vectors
        self.variances[layer, :, first:last] = variances
        self.bounds[layer, :, first : last + 1] = self.n_rows + bounds
        self.bounds[layer, :, last + 1 :] = self.n_rows + keys.shape[1]

    def commit(self, n_rows: int):
        """All layers have put sentences, with `n_rows` rows a head. Count those with a kept token
        in at least one head, and adjust the capacity."""
        self.n_rows += n_rows
        self.n_sentences = self.count()
        free = self.capacity - self.n_sentences
        if not 0 < free < 2 * SENTENCE_BLOCK:
            self.resize(room_for(self.n_sentences))

    def count(self) -> int:
        return int((self.bounds.diff(dim=-1) > 0).sum(dim=-1).max())

    @torch.inference_mode(False)  # as in `HostTier.empty`
    def resize(self, capacity: int):
        """Only here are tensors reallocated, and only for another capacity."""
        more = capacity - self.capacity  # negative padding removes entries
        if more == 0:
            return
        self.n_resizes += 1
        self.vectors = F.pad(self.vectors, (0, 0, 0, more))
        self.bounds = F.pad(self.bounds, (0, more), value=self.n_rows)
        for name in ("variances", "scores", "n_resident", "lengths", "starts", "n_retrievable"):
            setattr(self, name, F.pad(getattr(self, name), (0, more)))

    def snapshot(self) -> dict:
        """What is known of the sentences in use."""
        return {name: getattr(self, name).clone() for name in ("vectors", "variances", "bounds")}

    def restore(self, snapshot: dict, n_rows: int):
        """Know the sentences of a snapshot, with `n_rows` rows, and no others."""
        self.n_rows = n_rows
        self.resize(snapshot["vectors"].shape[2])
        for name in ("vectors", "variances", "bounds"):
            getattr(self, name).copy_(snapshot[name])
        self.n_sentences = self.count()
        self.n_resident.zero_()

    @property
    def n_secondary(self) -> torch.Tensor:
        """Secondary sinks of each head (L, H_kv, 1): the rows before its first sentence."""
        return self.bounds[..., :1]

    def limit(self, first_row: torch.Tensor, end_row: int):
        """Rows from `first_row` (L, H_kv, 1) to `end_row` are retrievable for the next token."""
        self.lengths.copy_(self.bounds.diff(dim=-1))
        retrievable = self.bounds.clamp(max=end_row).maximum(first_row)
        self.starts.copy_(retrievable[..., :-1])
        self.n_retrievable.copy_(retrievable.diff(dim=-1))


class CacheLayer:
    """One layer of a cache: views of the tensors that a decode step reads and writes, under their
    names there. So a step is a function of tensors, the same for all layers, and compiled once.

    As an index it is the layer's number, for subclasses of the cache with tensors of their own.
    """

    def __init__(self, number: int, cache):
        self.number = number
        for part, names in (
                (cache, ("slots", "slot_row", "slot_sentence", "slot_missing", "row_budget",
                         "mask")),
                (cache.table, ("vectors", "variances", "scores", "n_resident", "lengths", "starts",
                               "n_retrievable")),
                (cache.host, ("first", "later"))):
            for name in names:
                setattr(self, name, getattr(part, name)[number])

    def __index__(self) -> int:
        return self.number


class SentenceKVCache:
    """Every kept row on the host; sinks, recent tokens and selected rows in slots on the device.

    The slots of one layer and KV head. A mask says which of them attention reads:

        [ B slots for secondary sinks and selected rows | sinks | recent window, open sentence ]

    Three coordinates: a *position* is a token of the text; a *row* is the place of a kept token on
    the host, secondary sinks first and then in reading order; a *slot* is a place on the device.
    `row_of` and `slot_of` convert. Invariants, which tests/test_cache.py checks after every step:
     1. The rows of a head are its secondary sinks, and then its sentences without gaps.
     2. The token at position `recent_start` + i is in slot `recent_slot` + i.
     3. The rows of a sentence in slots are its first retrievable ones, `n_resident` of them.
     4. All sinks, selected rows and window do not overlap: at most `token_budget` tokens.
     5. The window never moves back, so a retrievable row stays retrievable.
     6. Masked slots are finite: attention gives them weight 0, and 0 times NaN is NaN.
     7. Tensors are reallocated only with another `version`: `decode` can be a CUDA graph.
    The protocol is that of `model.FullCache`. `spans` are the prompt's sentences as positions."""

    def __init__(self, config: SentenceKVConfig, model_config, spans: list, max_new_tokens: int,
                 device, dtype, stage=nullcontext):
        self.config, self.stage = config, stage
        device = torch.device(device)
        layers, heads, dim = kv_shape = model_config.kv_shape
        n_prompt = spans[-1][1]
        self.n_kept = config.n_kept(n_prompt)
        self.host = HostTier(kv_shape, device, dtype)
        self.table = SentenceTable(kv_shape, room_for(len(spans)), device, dtype)

        self.num_tokens = self.open_start = 0  # tokens from `open_start` on are in no sentence yet
        self.n_sinks = self.recent_start = min(config.sink_tokens, n_prompt)
        queries = torch.empty(model_config.num_attention_heads, 0, dim, device=device, dtype=dtype)
        self.last_queries = [queries] * layers  # of the text so far (H, at most W, D)
        self.sentence_ends = torch.tensor([end for _, end in spans], device=device)  # (S,)
        self.positions = None  # or a list: `keep` adds the positions of a layer's rows (H_kv, N)
        self.text_end = n_prompt  # of the text that is read

        # Recent slots hold the window, and then an open sentence of up to `sentence_limit` tokens.
        most = config.token_budget - config.sink_tokens - config.recent_window
        self.n_row_slots = min(most, self.n_kept + max_new_tokens)  # B
        self.sink_slot = self.n_row_slots
        self.recent_slot = self.sink_slot + config.sink_tokens
        longest = min(config.sentence_limit, max_new_tokens)
        n_slots = self.recent_slot + config.recent_window + longest
        self.slots = torch.zeros(layers, heads, n_slots, 2, dim, device=device, dtype=dtype)
        # Of each of the B slots: its row, that row's sentence, and whether the row must be loaded.
        self.slot_row = torch.full((layers, heads, self.n_row_slots), NO_ROW, device=device)
        self.slot_sentence = torch.zeros_like(self.slot_row)
        self.slot_missing = torch.zeros_like(self.slot_row, dtype=torch.bool)

        # The plan for the next token, in tensors: a CUDA graph records a number as a constant.
        self.row_budget = torch.zeros(layers, heads, 1, device=device, dtype=torch.long)
        self.next_slot = torch.zeros(1, device=device, dtype=torch.long)  # of the token itself
        self.mask = torch.zeros(layers, heads, 1, n_slots, device=device, dtype=torch.bool)
        self.total_selected = torch.zeros((), device=device, dtype=torch.long)  # since a text
        self.total_loaded = torch.zeros_like(self.total_selected)
        self.views = self.views_version = None  # see `layers`

    @property
    def version(self) -> int:
        """Changes when a tensor is reallocated: a graph captured before must not be replayed."""
        return self.table.n_resizes + self.host.n_moves

    @property
    def layers(self) -> list:
        """One entry for each layer, for `decode`."""
        if self.views_version != self.version:
            self.views = [CacheLayer(number, self) for number in range(len(self.slots))]
            self.views_version = self.version
        return self.views

    def row_of(self, position: int) -> int:
        """The row of a position from `recent_start` to `open_start`. Prefill drops and reorders
        nothing there, so rows and positions run in parallel: the last row is `open_start` - 1."""
        assert self.recent_start <= position <= self.open_start
        return self.table.n_rows - (self.open_start - position)

    def slot_of(self, position: int) -> int:
        """The slot of a position in the recent window."""
        return self.recent_slot + position - self.recent_start

    def expect(self, spans: list):
        """The next text to read has these sentences: spans (start, end) in its tokens. It is kept
        whole, whatever the keep factor. A sentence that is open ends here."""
        if self.num_tokens > self.open_start:
            self.seal(self.num_tokens - self.open_start)
        ends = [self.num_tokens + end for _, end in spans]
        self.sentence_ends = torch.tensor(ends, device=self.slots.device)
        self.text_end = ends[-1]
        self.host.reserve(self.table.n_rows + spans[-1][1])
        n_sentences = self.table.n_sentences + len(ends)
        if n_sentences >= self.table.capacity:
            self.table.resize(room_for(n_sentences))
        self.views = self.views_version = None  # they would keep what was replaced

    def prefill(self, layer: int, q, k, v) -> tuple:
        """Take the next part of a text and offload it. With the last part, make its sentences.

        All earlier rows come back to the device, for as long as the layer computes."""
        kv, n_text = torch.stack((k, v), dim=2), self.num_tokens - self.open_start  # read before
        first_row = self.table.n_rows + n_text
        if first_row > 0:
            kv = self.host.read(layer, 0, first_row, kv)  # (H_kv, n, 2, D)
        elif layer == 0:
            self.host.hold(self.host.empty(self.text_end))
        rows, window = kv[:, first_row:], self.config.observation_window
        q = torch.cat((self.last_queries[layer], q[:, -window:]), dim=1)[:, -window:]
        self.last_queries[layer] = q
        if self.num_tokens + k.shape[1] == self.text_end:
            if self.table.n_rows == 0:
                first_row, rows = 0, self.keep(layer, q, kv)
            else:
                bounds = F.pad(self.sentence_ends - self.open_start, (1, 0)).expand(len(k), -1)
                self.table.put(layer, kv[:, self.table.n_rows :, 0], bounds)
        with self.stage("offload"):
            self.host.write(layer, first_row, rows)
        return kv.unbind(dim=2)

    def keep(self, layer: int, q, kv) -> torch.Tensor:
        """Keep tokens and make sentence vectors, of the whole prompt (Section 3.2). q of its last W
        tokens (H, W, D), kv (H_kv, T, 2, D) -> kv of the kept rows (H_kv, N, 2, D)"""
        k, n_tokens = kv[:, :, 0], kv.shape[1]
        with self.stage("secondary sinks"):
            secondary = find_secondary_sinks(k, self.config)  # (H_kv, T)
        kept = torch.arange(n_tokens, device=k.device).expand(len(k), -1)
        if self.n_kept < n_tokens:
            with self.stage("importance"):
                importance = token_importance(q, k)
                kept = keep_tokens(importance, secondary, self.config)  # (H_kv, N)
        with self.stage("sentence vectors"):
            kept, marked = order_rows(kept, secondary)
            if self.positions is not None:
                self.positions.append(kept.int().cpu())
            kv = kv[torch.arange(len(k), device=k.device)[:, None], kept]  # (H_kv, N, 2, D)
            bounds = sentence_bounds(marked, self.sentence_ends)
            self.table.put(layer, kv[:, :, 0], bounds)
        return kv

    def advance(self, n_tokens: int):
        """All layers have seen `n_tokens` more: a part of a text, or one token."""
        reading = self.num_tokens < self.text_end
        self.num_tokens += n_tokens
        if not reading:
            self.total_selected += self.row_budget.sum()
            self.total_loaded += self.slot_missing.sum()
            self.plan()
            return
        self.host.wait()
        if self.num_tokens == self.text_end:
            is_first = self.table.n_rows == 0
            self.table.commit(self.n_kept if is_first else self.num_tokens - self.open_start)
            if is_first:
                self.host.trim(self.n_kept)
                self.hold_sinks()
            self.start_window()

    def hold_sinks(self):
        """Put each head's secondary sinks into its first slots for good: `assign_slots` frees only
        what a sentence selected. The sinks, the rows after them, have slots of their own."""
        n_secondary, n_most = self.table.n_secondary, self.config.secondary_sinks
        row = torch.arange(min(n_most, self.n_kept), device=self.slots.device)
        self.slot_row[:, :, : len(row)] = row.where(row < n_secondary, NO_ROW)
        sinks = n_secondary + torch.arange(self.n_sinks, device=row.device)  # (L, H_kv, n_sinks)
        for layer, slots in enumerate(self.slots):
            kv = self.host.read(layer, 0, n_most + self.n_sinks)
            slots[:, : len(row)] = kv[:, : len(row)]
            heads = torch.arange(len(kv), device=row.device)[:, None]
            slots[:, self.sink_slot : self.sink_slot + self.n_sinks] = kv[heads, sinks[layer]]

    def start_window(self):
        """After a text, its last tokens come from the host. One more makes the window full."""
        n_recent = min(self.num_tokens - self.n_sinks, self.config.recent_window - 1)
        self.open_start, self.recent_start = self.num_tokens, self.num_tokens - n_recent
        n_rows = self.table.n_rows
        for layer, slots in enumerate(self.slots):
            slots[:, self.recent_slot : self.slot_of(self.num_tokens)] = self.host.read(
                layer, n_rows - n_recent, n_rows)
        self.last_queries = [queries[:, :0].clone() for queries in self.last_queries]
        for tensor in (self.table.scores, self.total_selected, self.total_loaded):
            tensor.zero_()
        self.plan()

    def snapshot(self) -> dict:
        """What is kept of the first text, in tensors. Nothing may have been read or written since.
        The rows are not copied: `restore` also serves another cache, and another process."""
        assert self.num_tokens == self.text_end == self.open_start
        assert self.table.n_rows == self.host.first.shape[1]
        snapshot = {"num_tokens": torch.tensor(self.num_tokens), "kv": self.host.first,
                    **self.table.snapshot()}
        if self.positions is not None:
            snapshot["positions"] = torch.stack(tuple(self.positions))
        return snapshot

    def restore(self, snapshot: dict, release=None):
        """Forget what was read and written, and go on from a snapshot as if it had just been read.
        The settings must be those of the snapshot, but for budget, score, decay, and a recent
        window that is not longer. `release(layer)` gives back the memory of mapped rows."""
        self.num_tokens = self.text_end = snapshot["num_tokens"].item()
        self.host.hold(snapshot["kv"])
        self.host.release, self.positions = release, snapshot.get("positions")
        self.table.restore(snapshot, self.host.first.shape[1])
        self.slot_row.fill_(NO_ROW)
        self.slot_sentence.zero_()
        self.slot_missing.zero_()
        self.hold_sinks()
        self.start_window()

    def window_start(self, end: int) -> int:
        """First position of the recent window of the token at `end` - 1, or of the sentence being
        written if that is earlier."""
        return max(min(end - self.config.recent_window, self.open_start), self.n_sinks)

    def attended_from(self, end: int) -> int:
        """The token at `end` - 1 attends to the sinks and to all positions from this one on. If the
        sentence being written is very long, only its end fits. All heads have the same start, which
        leaves room for the most secondary sinks."""
        room = self.config.token_budget - self.config.sink_tokens - self.config.secondary_sinks
        return max(self.window_start(end), end - room)

    def plan(self):
        """Decide what the token at position `num_tokens` attends to: the sinks, the positions from
        `start` to the token itself, and how many rows each head may select besides."""
        end, n_secondary = self.num_tokens + 1, self.table.n_secondary
        start = self.attended_from(end)
        assert self.slot_of(end) <= self.slots.shape[2], "a sentence is too long: call `seal`"
        end_row = self.row_of(min(start, self.open_start))
        first_row = n_secondary + self.n_sinks  # rows: secondary sinks, sinks, the rest
        n_free = self.config.token_budget - self.config.sink_tokens - (end - start)
        n_free = min(n_free, self.n_row_slots) - n_secondary
        self.row_budget.copy_(n_free.minimum(end_row - first_row))
        self.next_slot.fill_(self.slot_of(end - 1))
        self.table.limit(first_row, end_row)
        self.mask[..., self.sink_slot :] = False
        self.mask[..., self.sink_slot : self.sink_slot + self.n_sinks] = True
        self.mask[..., self.slot_of(start) : self.slot_of(end)] = True

    def decode(self, layer: CacheLayer, q, k, v) -> tuple:
        """Select rows, load those that are missing (Section 3.3), return all slots and the mask."""
        layer.slots.index_copy_(1, self.next_slot, torch.stack((k, v), dim=2))
        with self.stage("select"):
            self.select(layer, q.view(len(k), -1, q.shape[-1]))  # (H_kv, G, D)
        with self.stage("load"):  # the other selected rows are in slots already
            self.load(layer)
        return *layer.slots.unbind(dim=2), layer.mask

    def select(self, layer: CacheLayer, q):
        """Select the rows of the best sentences, and find slots for them. q (H_kv, G, D)"""
        # Scores add up over the sentence being written, with less weight for older tokens. `seal`
        # sets them to zero: what stays open after it no longer counts.
        torch.add(self.score(layer, q), layer.scores, alpha=self.config.query_decay,
                  out=layer.scores)
        selected = select_rows(layer.scores, layer.n_retrievable, layer.row_budget,
                               self.n_row_slots)
        rows, sentences, missing = assign_slots(
            layer.slot_row, layer.slot_sentence, layer.starts, layer.n_resident, selected)
        layer.slot_row.copy_(rows)
        layer.slot_sentence.copy_(sentences)
        layer.slot_missing.copy_(missing)
        layer.n_resident.copy_(selected)
        layer.mask[:, 0, : self.n_row_slots] = rows < NO_ROW

    def score(self, layer: CacheLayer, q):
        """How well each sentence matches one token's queries (H_kv, G, D) -> (H_kv, S)."""
        return SCORES[self.config.score](q, layer.vectors, layer.variances, layer.lengths)

    def load(self, layer: CacheLayer):
        """Copy the missing rows from the host into the slots that were found for them."""
        compiling = torch.compiler.is_compiling()  # otherwise a plain call is faster
        load = torch.ops.sentencekv.load_rows if compiling else load_rows
        load(layer.first, layer.later, layer.slots, layer.slot_row, layer.slot_missing)

    def seal(self, length: int):
        """Offload the first `length` tokens of the sentence being written, and make them a sentence
        of the table. Its rows can be selected once they have left the recent window."""
        with self.stage("seal"):
            first, end = self.open_start, self.open_start + length
            kv = self.slots[:, :, self.slot_of(first) : self.slot_of(end)]  # (L, H_kv, n, 2, D)
            bounds = torch.tensor([[0, length]], device=kv.device).repeat(kv.shape[1], 1)
            self.host.reserve(self.table.n_rows + length)
            for layer in range(len(kv)):
                self.table.put(layer, kv[layer, :, :, 0], bounds)
                self.host.write(layer, self.table.n_rows, kv[layer])
            self.host.wait()
            self.table.commit(length)
            self.table.scores.zero_()
            self.open_start = end
            self.move_window(self.window_start(self.num_tokens + 1))
            self.plan()

    def move_window(self, start: int):
        """Move the positions from `start` to the last into the first recent slots."""
        kept = self.slots[:, :, self.slot_of(start) : self.slot_of(self.num_tokens)].clone()
        self.recent_start = start  # `slot_of` changes here
        self.slots[:, :, self.slot_of(start) : self.slot_of(self.num_tokens)] = kept

    def report(self) -> dict:
        """Bytes held, measured on the tensors themselves, and bytes selected and loaded since the
        last text. On the host, rows of a mapped file count whether they have been read or not."""
        table, host = self.table, self.host
        held = {"slots": [self.slots], "sentence vectors": [table.vectors], "bookkeeping": [
            table.variances, table.bounds, table.scores, table.n_resident, table.lengths,
            table.starts, table.n_retrievable, self.sentence_ends, self.slot_row, self.mask,
            self.slot_sentence, self.slot_missing, self.row_budget, self.next_slot,
            self.total_selected, self.total_loaded]}
        parts = {name: sum(tensor.untyped_storage().nbytes() for tensor in tensors)
                 for name, tensors in held.items()}
        selected, loaded = self.total_selected.item(), self.total_loaded.item()
        (layers, heads, _), row = host.kv_shape, self.slots[0, 0, 0]
        return {"device_kv_parts": parts, "device_kv_bytes": sum(parts.values()),
                "host_kv_bytes": host.first.nbytes + host.later.nbytes,
                "full_kv_bytes": self.num_tokens * layers * heads * row.nbytes,
                "selected_bytes": selected * row.nbytes, "loaded_bytes": loaded * row.nbytes,
                "hit_rate": 1 - loaded / selected if selected else None}


def assign_slots(rows, sentences, starts, n_resident, selected) -> tuple:
    """The row that each slot holds next, that row's sentence, and whether the row must be loaded.

    The slot of a row that is still selected keeps it. The other slots are free, and the i-th free
    slot takes the i-th row to load. rows, sentences (H_kv, B) of the slots. starts, n_resident and
    selected (H_kv, S) of the sentences, counted in rows -> rows, sentences, missing (H_kv, B)

    >>> assign_slots(rows=torch.tensor([[5, 8, 4]]), sentences=torch.tensor([[0, 1, 0]]),
    ...     starts=torch.tensor([[4, 8, 12]]), n_resident=torch.tensor([[2, 1, 0]]),
    ...     selected=torch.tensor([[0, 2, 1]]))  # rows 8, 9 and 12
    (tensor([[ 9,  8, 12]]), tensor([[1, 1, 2]]), tensor([[ True, False,  True]]))
    """
    ends = starts + selected
    free = rows >= ends.gather(-1, sentences)  # empty, or no longer selected
    number = free.cumsum(dim=-1)  # the i of the i-th free slot, from 1; unused at other slots
    loads = (selected - n_resident).clamp(min=0).cumsum(dim=-1)  # in sentences 0 to s
    sentence = torch.searchsorted(loads, number).clamp(max=selected.shape[-1] - 1)
    # The last row to load of a sentence, with number == loads, is its end - 1: count back from it.
    row = (ends - loads).gather(-1, sentence) + number - 1
    missing = free & (number <= loads[:, -1:])
    rows = torch.where(missing, row, rows.masked_fill(free, NO_ROW))
    return rows, torch.where(free, sentence, sentences), missing
