"""Where keys and values live while a Llama reads and writes.

`FullCache` keeps all of them on the device. `SentenceKVCache` has two tiers: the host holds every
kept token, and the device holds a fixed number of slots, filled per KV head with

    [ working set: rows fetched from the host | sinks | recent window + sentence being written ]

Attention runs over these slots and has nothing else. A mask admits the sinks, the recent tokens
and the rows selected for this token, of which those selected for the last one are here already.
The slots' order does not matter, because positions are already in the keys. This file knows
nothing of tokenizers, RoPE or weights, and leaves the scoring of sentences to `sentencekv`.

A row is what one token leaves in one KV head: its key and its value, side by side (2, D), so that
they move together. `kv` is always such data, `rows` are indices of it on the host. Shapes:
    L layers, H_kv KV heads, G query heads a KV head, D channels, T prompt tokens,
    N rows on the host, S sentences, B working-set slots.
"""

import os
from contextlib import nullcontext

import torch

try:  # comes with PyTorch where there is a GPU
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from sentencekv import (
    SCORES,
    SentenceKVConfig,
    keep_tokens,
    sentence_bounds,
    sentence_vectors,
    take_best,
    token_importance,
)

NO_ROW = 2**62  # greater than any row
SENTENCE_BLOCK = 64  # sentences; the room for generated ones grows by as many at a time


class FullCache:
    """Every key and value on the device, as in a plain Llama: what SentenceKV is compared with.

    `stage(name)` gives a context manager to put around a timed stage.
    """

    def __init__(self, model_config, max_tokens: int, device, dtype, stage=nullcontext):
        self.stage = stage
        self.num_tokens = 0
        layers, heads, dim = kv_shape(model_config)
        self.kv = torch.zeros(layers, heads, max_tokens, 2, dim, device=device, dtype=dtype)

    def prefill(self, layer: int, q, k, v):
        """q (H, T, D), k and v (H_kv, T, D) of one layer's whole prompt."""
        self.kv[layer, :, : k.shape[1]] = torch.stack((k, v), dim=2)

    def decode(self, layer: int, q, k, v) -> tuple:
        """q (H, 1, D), k and v (H_kv, 1, D) -> keys and values (H_kv, n, D), mask or None."""
        end = self.num_tokens + 1
        self.kv[layer, :, self.num_tokens : end] = torch.stack((k, v), dim=2)
        return *self.kv[layer, :, :end].unbind(dim=2), None

    def advance(self, n_tokens: int):
        """All layers have seen `n_tokens` more."""
        self.num_tokens += n_tokens

    def end_sentence(self, length: int):
        """A full cache has no use for sentences."""

    def report(self) -> dict:
        """What is held and what was moved, in bytes."""
        n_bytes = self.kv.untyped_storage().nbytes()
        return {
            "device_kv_parts": {"keys and values": n_bytes},
            "device_kv_bytes": n_bytes,
            "host_kv_bytes": 0,
            "full_kv_bytes": self.num_tokens * self.kv[:, :, 0].nbytes,
            "loaded_bytes": 0,
            "hit_rate": None,
        }


class SentenceKVCache:
    """Kept tokens on the host; sinks, recent tokens and the sentences asked for on the device.

    `spans` are the prompt's sentences as (start, end) token positions. While decoding, at most
    `token_budget` tokens are attended to in every KV head: the sinks, the last `recent_window`
    tokens (the sentence being written, if that is longer), and fetched rows for the rest.
    """

    def __init__(self, config: SentenceKVConfig, model_config, spans: list, max_new_tokens: int,
                 device, dtype, stage=nullcontext):
        self.config, self.stage, self.device = config, stage, torch.device(device)
        layers, heads, dim = kv_shape(model_config)
        n_prompt = spans[-1][1]
        self.sentence_ends = torch.tensor([end for _, end in spans], device=device)  # (S,)

        # Positions count tokens of the text; rows count tokens kept on the host. They differ by
        # what prefill dropped, which is never among the sinks or the last tokens.
        self.num_tokens = 0
        self.n_sinks = min(config.sink_tokens, n_prompt)
        self.recent_start = 0  # position of the token in the first recent slot
        self.open_start = 0  # position where the sentence being written begins
        self.n_rows = config.kept_tokens(n_prompt)
        self.n_sentences = len(spans)

        # Token before head, so that a sentence is one block; pinned, so that offloading can run
        # beside the computation (torch rounds pinned memory up to a power of two).
        on_gpu = self.device.type == "cuda"
        self.host = torch.empty(
            layers, self.n_rows + max_new_tokens, heads, 2, dim, dtype=dtype, pin_memory=on_gpu
        )
        self.copy_stream = torch.cuda.Stream(device) if on_gpu else None
        self.leaving = None  # what is being copied to the host

        # Head before token, as attention wants it. Masked slots still enter the product, with
        # weight 0, so they must never hold a NaN.
        self.load_slots = min(config.load_slots, self.host.shape[1])  # B
        self.sink_slot = self.load_slots
        self.recent_slot = self.sink_slot + config.sink_tokens
        n_slots = self.recent_slot + config.recent_window + config.sentence_limit
        self.slots = torch.zeros(layers, heads, n_slots, 2, dim, device=device, dtype=dtype)
        # Of each working-set slot: the row in it, its sentence, and whether it was not here yet.
        self.rows = torch.full((layers, heads, self.load_slots), NO_ROW, device=device)
        self.sentences = torch.zeros_like(self.rows)
        self.missing = torch.zeros_like(self.rows, dtype=torch.bool)

        # By sentence: semantic vector, spread, rows, first row (and the next one's), score so far,
        # and how many of its rows are in slots, which are always its first.
        capacity = self.n_sentences + SENTENCE_BLOCK
        self.vectors = torch.zeros(layers, heads, capacity, dim, device=device, dtype=dtype)
        self.spreads = torch.zeros(layers, heads, capacity, device=device)
        self.lengths = torch.zeros_like(self.spreads)
        self.bounds = torch.zeros(layers, heads, capacity + 1, device=device, dtype=torch.long)
        self.scores = torch.zeros_like(self.spreads)
        self.taken = torch.zeros_like(self.bounds[..., 1:])

        # The plan for the next token, in tensors that keep their place: `decode` has no numbers of
        # its own that change from token to token, so it can be captured as a CUDA graph.
        self.here = torch.zeros(1, device=device, dtype=torch.long)  # slot of the token
        # Of each sentence, the first row that may be fetched, and how many.
        self.starts, self.loadable = torch.zeros_like(self.taken), torch.zeros_like(self.taken)
        self.room = torch.zeros_like(self.here)  # rows that may be fetched
        self.mask = torch.zeros(heads, 1, n_slots, device=device, dtype=torch.bool)
        self.n_wanted = 0  # rows, all in all
        self.n_loaded = torch.zeros((), device=device, dtype=torch.long)  # rows that were not here

    def prefill(self, layer: int, q, k, v):
        """q (H, T, D), k and v (H_kv, T, D): keep, make sentence vectors, offload (Section 3.2)."""
        kv = torch.stack((k, v), dim=2)  # (H_kv, T, 2, D)
        n_tokens = k.shape[1]
        sinks = kv[:, : self.n_sinks]
        recent = kv[:, max(self.n_sinks, n_tokens - self.config.recent_window) :]
        self.slots[layer, :, self.sink_slot : self.sink_slot + sinks.shape[1]] = sinks
        self.slots[layer, :, self.recent_slot : self.recent_slot + recent.shape[1]] = recent
        kept = torch.arange(n_tokens, device=k.device).expand(len(k), -1).contiguous()
        if self.n_rows < n_tokens:
            with self.stage("importance"):
                importance = token_importance(q[:, -self.config.observation_window :], k)
                kept = keep_tokens(importance, n_tokens, self.config)  # (H_kv, N)
                kv = kv[torch.arange(len(k), device=k.device)[:, None], kept]  # (H_kv, N, 2, D)
        with self.stage("sentence vectors"):
            n = self.n_sentences
            bounds = sentence_bounds(kept, self.sentence_ends)
            self.bounds[layer, :, : n + 1] = bounds
            self.bounds[layer, :, n + 1 :] = self.n_rows  # empty, until sentences are written
            self.lengths[layer, :, :n] = bounds.diff(dim=-1)
            self.vectors[layer, :, :n], self.spreads[layer, :, :n] = sentence_vectors(
                kv[:, :, 0], bounds)
        with self.stage("offload"):
            self.offload(layer, 0, kv)

    def offload(self, layer: int, first_row: int, kv):
        """Copy kv (H_kv, n, 2, D) to the host, on a GPU while the next layer computes."""
        kv = kv.transpose(0, 1).contiguous()  # (n, H_kv, 2, D), one block as on the host
        target = self.host[layer, first_row : first_row + len(kv)]
        if self.copy_stream is None:
            target.copy_(kv)
            return
        self.finish_offload()
        self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copy_stream):
            target.copy_(kv, non_blocking=True)
        self.leaving = kv

    def finish_offload(self):
        """From here on the computation waits for the copy, whose source may be written over.

        So no more than one layer is ever on its way, however slow the link to the host is.
        """
        if self.copy_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copy_stream)
            self.leaving = None

    def advance(self, n_tokens: int):
        """All layers have seen `n_tokens` more: the prompt, or one token."""
        if self.num_tokens == 0:
            self.finish_offload()
            self.open_start = n_tokens
            self.recent_start = max(self.n_sinks, n_tokens - self.config.recent_window)
            if self.n_rows < n_tokens:  # of some sentences nothing was kept
                self.n_sentences = int((self.bounds.diff(dim=-1) > 0).sum(dim=-1).max())
                self.make_room()
        else:
            self.n_wanted += self.n_fetched * self.bounds[:, :, 0].numel()
            self.n_loaded += self.missing.sum()
        self.num_tokens += n_tokens
        self.plan_next_token()

    def window_start(self) -> int:
        """First position of the recent window, or of the sentence being written if longer."""
        start = min(self.num_tokens + 1 - self.config.recent_window, self.open_start)
        return max(start, self.recent_start)

    def plan_next_token(self):
        """Set what the token at position `num_tokens` attends to, and what it may ask for."""
        config, n_tokens = self.config, self.num_tokens + 1
        budget = config.token_budget - self.n_sinks
        start = max(self.window_start(), n_tokens - budget)  # of a long sentence, only what fits
        # Finished sentences can be loaded from the sinks to the window, both of which are here.
        end = max(self.n_rows - max(self.open_start - start, 0), self.n_sinks)
        bounds = self.bounds.clamp(self.n_sinks, end)
        self.starts.copy_(bounds[..., :-1])
        self.loadable.copy_(bounds.diff(dim=-1))
        self.n_fetched = min(budget - (n_tokens - start), end - self.n_sinks, self.load_slots)
        self.room.fill_(self.n_fetched)
        first, last = start - self.recent_start, n_tokens - self.recent_start
        self.mask[..., self.sink_slot :] = False
        self.mask[..., self.sink_slot : self.sink_slot + self.n_sinks] = True
        self.mask[..., self.recent_slot + first : self.recent_slot + last] = True
        self.here.fill_(self.recent_slot + last - 1)

    def decode(self, layer: int, q, k, v) -> tuple:
        """q (H, 1, D), k and v (H_kv, 1, D) of the token at position `num_tokens` (Section 3.3).

        Returns keys and values (H_kv, n_slots, D) and the mask (H_kv, 1, n_slots) of the slots
        to attend to.
        """
        here = self.num_tokens - self.recent_start
        assert here < self.config.recent_window + self.config.sentence_limit, "end_sentence is due"
        self.slots[layer].index_copy_(1, self.here, torch.stack((k, v), dim=2))
        with self.stage("select"):
            self.select(layer, q)
        with self.stage("load"):
            self.load(layer)
        return *self.slots[layer].unbind(dim=2), self.mask

    def select(self, layer: int, q):
        """Give the slots to rows of the sentences that the sentence being written asks for."""
        self.add_scores(layer, q.view(self.bounds.shape[1], -1, q.shape[-1]))  # (H_kv, G, D)
        taken = take_best(self.scores[layer], self.loadable[layer], self.room)
        assign_slots(self.rows[layer], self.sentences[layer], self.missing[layer],
                     self.starts[layer], self.taken[layer], taken)
        self.taken[layer] = taken
        torch.lt(self.rows[layer], NO_ROW, out=self.mask[:, 0, : self.load_slots])

    def add_scores(self, layer: int, q):
        """Scores add up from one sentence's sealing to the next.

        So an end that is found late also takes away the scores of tokens written after it.
        """
        score = SCORES[self.config.score]
        self.scores[layer] += score(
            q, self.vectors[layer], self.spreads[layer], self.lengths[layer])

    def load(self, layer: int):
        """Bring the missing rows from the host into their slots; the others are there already."""
        fetch_rows(self.host[layer], self.slots[layer], self.rows[layer], self.missing[layer])

    def end_sentence(self, length: int):
        """The first `length` tokens since the last sentence have become a sentence themselves.

        They move to the host and get a semantic vector. As soon as they have left the recent
        window, they can be fetched like any others.
        """
        with self.stage("seal"):
            if self.n_sentences == self.capacity:
                self.make_room()
            recent = self.slots[:, :, self.recent_slot :]
            first = self.open_start - self.recent_start
            kv = recent[:, :, first : first + length]  # (L, H_kv, length, 2, D)
            for layer in range(len(kv)):
                self.offload(layer, self.n_rows, kv[layer])
            self.finish_offload()
            n = self.n_sentences
            keys = kv[:, :, :, 0].flatten(0, 1)  # (L * H_kv, length, D)
            bounds = torch.tensor([[0, length]], device=self.device).expand(len(keys), -1)
            vectors, spreads = sentence_vectors(keys, bounds.contiguous())
            self.vectors[:, :, n] = vectors.view_as(self.vectors[:, :, n])
            self.spreads[:, :, n] = spreads.view_as(self.spreads[:, :, n])
            self.lengths[:, :, n] = length
            self.n_rows += length
            self.bounds[:, :, n + 1 :] = self.n_rows
            self.scores.zero_()
            self.n_sentences += 1
            self.open_start += length
            self.slide_window(recent)

    @property
    def capacity(self) -> int:
        """Sentences there is room for. While it is the same, every tensor keeps its address."""
        return self.vectors.shape[2]

    @torch.inference_mode(False)  # what is made in it may not be changed outside
    def make_room(self):
        """Room for some sentences more than there are, and no more."""
        more = self.n_sentences + SENTENCE_BLOCK - self.capacity
        pad = torch.nn.functional.pad  # which can cut off as well
        self.vectors = pad(self.vectors, (0, 0, 0, more))
        for name in ("spreads", "lengths", "scores", "taken"):
            setattr(self, name, pad(getattr(self, name), (0, more)))
        self.bounds = pad(self.bounds, (0, more))  # `end_sentence` fills them in
        self.starts, self.loadable = torch.zeros_like(self.taken), torch.zeros_like(self.taken)

    def slide_window(self, recent):
        """Move the recent window, and the sentence being written, to the first recent slots."""
        start = self.window_start()
        n_tokens, shift = self.num_tokens - start, start - self.recent_start
        recent[:, :, :n_tokens] = recent[:, :, shift : shift + n_tokens].clone()
        self.recent_start = start
        self.plan_next_token()

    def report(self) -> dict:
        """What is held and what was moved, in bytes, measured on the tensors themselves."""
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, torch.Tensor)}
        sizes = {name: t.untyped_storage().nbytes() for name, t in tensors.items()}
        host, slots, vectors = sizes.pop("host"), sizes.pop("slots"), sizes.pop("vectors")
        wanted, loaded = self.n_wanted, self.n_loaded.item()
        return {
            "device_kv_parts": {"slots": slots, "sentence vectors": vectors,
                                "bookkeeping": sum(sizes.values())},
            "device_kv_bytes": slots + vectors + sum(sizes.values()),
            "host_kv_bytes": host,
            "full_kv_bytes": self.num_tokens * self.host[:, 0].nbytes,
            "loaded_bytes": loaded * self.host[0, 0, 0].nbytes,
            "hit_rate": 1 - loaded / wanted if wanted else None,
        }


def fetch_rows(host, kv, rows, missing):
    """Copy the missing rows into their slots.

    host (N, H_kv, 2, D), kv (H_kv, n_slots, 2, D), rows and missing (H_kv, B), of the first slots
    """
    if triton and (kv.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        heads, n_rows = rows.shape
        size = kv[0, 0].numel()
        copy_missing[n_rows, heads](host, kv, rows, missing, kv.shape[1], size,
                                    triton.next_power_of_2(size), num_warps=1)
        return
    # On a GPU this waits for it: the host has to know which rows, to gather them.
    head, slot = missing.nonzero(as_tuple=True)
    kv[head, slot] = host[rows[head, slot].to(host.device), head.to(host.device)].to(kv.device)


if triton:

    @triton.jit
    def copy_missing(host, kv, rows, missing, n_slots, size, BLOCK: tl.constexpr):
        """One program for each of a head's B slots. The GPU reads pinned host memory by itself."""
        slot, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
        here = head * tl.num_programs(0) + slot
        if tl.load(missing + here):
            channel = tl.arange(0, BLOCK)
            source = host + (tl.load(rows + here) * heads + head) * size + channel
            target = kv + (head * n_slots + slot) * size + channel
            tl.store(target, tl.load(source, mask=channel < size), mask=channel < size)


def kv_shape(model_config) -> tuple:
    """Layers, KV heads, channels of a head."""
    return (model_config.num_hidden_layers, model_config.num_key_value_heads, model_config.head_dim)


def assign_slots(rows, sentences, missing, starts, before, taken):
    """Let the slots of rows that are still wanted keep them, and the others take the missing rows.

    The first `before` rows of each sentence are in slots, and the first `taken` are wanted: the
    i-th free slot takes the i-th row that is wanted and not here. Static shapes and no value read
    back: a GPU never waits here.

    rows, sentences, missing (H_kv, B): of the slots, set here; the row of an empty one is NO_ROW
    starts, before, taken (H_kv, S): of the sentences

    >>> rows, sentences = torch.tensor([[5, 8, 4]]), torch.tensor([[0, 1, 0]])
    >>> missing, starts = torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[4, 8, 12]])
    >>> before, taken = torch.tensor([[2, 1, 0]]), torch.tensor([[0, 2, 1]])
    >>> assign_slots(rows, sentences, missing, starts, before, taken)
    >>> rows.tolist(), sentences.tolist(), missing.tolist()
    ([[9, 8, 12]], [[1, 1, 2]], [[True, False, True]])
    """
    ends = starts + taken
    free = rows >= ends.gather(-1, sentences)
    turn = free.cumsum(dim=-1)  # 1 at the first free slot, 2 at the second
    absent = (taken - before).clamp(min=0).cumsum(dim=-1)  # rows not here, up to a sentence's end
    # The sentence of the `turn`-th of them is the first with that many up to its end.
    sentence = torch.searchsorted(absent, turn).clamp(max=taken.shape[-1] - 1)
    row = (ends - absent).gather(-1, sentence) + turn - 1
    torch.logical_and(free, turn <= absent[:, -1:], out=missing)
    rows.masked_fill_(free, NO_ROW)
    torch.where(missing, row, rows, out=rows)
    torch.where(free, sentence, sentences, out=sentences)
