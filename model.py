"""A Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU, and the cache of a plain Llama.

Attention asks a cache for the keys and values to attend to: all of them (`FullCache`, below) or
those of a few sentences (`cache.SentenceKVCache`). It does not know which of the two. This file
knows nothing of text, files or the command line.

Shapes, here and in all files (one prompt at a time, so there is no batch dimension):
    T tokens, H query heads, H_kv key/value heads, G = H // H_kv query heads that share one,
    D channels of a head.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of `config.json` that matter here, under their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # the four numbers of "llama3" scaling
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @property
    def kv_shape(self) -> tuple:  # L, H_kv, D
        return self.num_hidden_layers, self.num_key_value_heads, self.head_dim


def rope_frequencies(config: LlamaConfig, device) -> torch.Tensor:
    """The angle in radians per position of each pair of channels, float32 (D/2,)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = config.rope_theta ** (-exponent / config.head_dim)
    if config.rope_scaling is None:
        return frequency
    # Llama 3.1: frequencies of at most `low` turns in the original context are divided by `factor`,
    # those of at least `high` turns are unchanged, and between the two it interpolates.
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / scaling["factor"])


def rope_table(config: LlamaConfig, positions: torch.Tensor, dtype) -> tuple:
    """cos and sin (T, D) of every position's angles, for `apply_rope`. RoFormer, 2104.09864."""
    angles = positions[:, None].float() * rope_frequencies(config, positions.device)  # (T, D/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # (a, b) becomes (a cos - b sin, b cos + a sin). The sine table holds the minus sign.
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the channel pairs (i, i + D/2) of x (heads, T, D) by the angles of their positions."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # `roll` swaps a and b


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        q_size, kv_size = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        bias = config.attention_bias
        # q_proj, k_proj and v_proj in one matrix: one larger product is faster.
        self.qkv_proj = nn.Linear(config.hidden_size, q_size + 2 * kv_size, bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias)

    def qkv(self, x, rope):
        """x (T, hidden) -> q (H, T, D), k and v (H_kv, T, D), with RoPE in q and k."""
        qkv = project(x, self.qkv_proj).view(x.shape[0], -1, self.head_dim).transpose(0, 1)
        qk, v = qkv[: -self.n_kv_heads], qkv[-self.n_kv_heads :]  # qk (H + H_kv, T, D)
        qk = apply_rope(qk, *rope)
        return qk[: self.n_heads], qk[self.n_heads :], v

    def prefill(self, x, rope, cache):
        """Causal attention over the whole prompt, x (T, hidden) -> (T, hidden)."""
        q, k, v = self.qkv(x, rope)
        with cache.stage("attention"):
            # Every block of queries reads all keys: that is faster if they are contiguous.
            k, v = k.contiguous(), v.contiguous()
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]  # (H, T, D)
        cache.prefill(self.layer, q, k, v)
        return project(out.transpose(0, 1).flatten(1), self.o_proj)

    def decode(self, x, rope, cache):
        """One token attends to what the cache returns, x (1, hidden) -> (1, hidden)."""
        return project(self.attend(*self.qkv(x, rope), cache), self.o_proj)

    def attend(self, q, k, v, cache):
        """q (H, 1, D), k and v (H_kv, 1, D) of one token -> (1, H * D)."""
        keys, values, mask = cache.decode(self.layer, q, k, v)
        with cache.stage("attention"):
            # The G query heads that share a key become G query positions: it is read once.
            grouped = q.view(len(k), -1, self.head_dim)  # (H_kv, G, D)
            mask = None if mask is None else mask[None]  # the fused kernels want four dimensions
            out = F.scaled_dot_product_attention(
                grouped[None], keys[None], values[None], attn_mask=mask)
        return out.reshape(1, -1)  # not `view`: some kernels return it transposed


class MLP(nn.Module):  # SwiGLU, arXiv 2002.05202
    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias)  # gate_proj and up_proj in one
        self.down_proj = nn.Linear(inner, hidden, bias)

    def forward(self, x):
        gate, up = project(x, self.gate_up_proj).chunk(2, dim=-1)
        return project(F.silu(gate) * up, self.down_proj)


class Block(nn.Module):
    mlp_slice = 8192  # tokens

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, attention):
        """`attention` is `self_attn.prefill` or `.decode` with its other arguments bound."""
        x = x + attention(self.input_layernorm(x))
        # A long prompt's activations take the most memory in the MLP. Slices bound it.
        for start in range(0, x.shape[0], self.mlp_slice):
            part = x[start : start + self.mlp_slice]
            part += self.mlp(self.post_attention_layernorm(part))  # in place: `part` is a view
        return x


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, cache, progress=iter) -> torch.Tensor:
        """Read the prompt, ids (T,) -> (T, hidden). `progress` wraps the layers, as tqdm does."""
        x = self.embed_tokens(ids)  # (T, hidden)
        rope = rope_table(self.config, torch.arange(len(ids), device=ids.device), x.dtype)
        for block in progress(self.layers):
            x = block(x, lambda h: block.self_attn.prefill(h, rope, cache))
        cache.advance(len(ids))
        return self.norm(x)

    @torch.inference_mode()
    def decode(self, ids: torch.Tensor, cache) -> torch.Tensor:
        """Read one more token, ids (1,), at position `cache.num_tokens`. Returns (1, hidden)."""
        states = self.step(ids, torch.full_like(ids, cache.num_tokens), cache)
        cache.advance(1)
        return states

    def step(self, ids: torch.Tensor, position: torch.Tensor, cache) -> torch.Tensor:
        """`decode` without the host's counts: what a CUDA graph can hold. ids, position (1,)"""
        x = self.embed_tokens(ids)
        rope = rope_table(self.config, position, x.dtype)
        for block in self.layers:
            x = block(x, lambda h: block.self_attn.decode(h, rope, cache))
        return self.norm(x)

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(n, hidden) -> (n, vocab). After prefill, only the last state's are needed."""
        return project(states, self.lm_head)


class FullCache:
    """The cache of a plain Llama: every key and value stays on the device. It also documents the
    protocol, what attention and `generate.py` expect of a cache:

    num_tokens                    tokens that all layers have seen: the position of the next one
    prefill(layer, q, k, v)       takes q (H, T, D), k and v (H_kv, T, D) of a layer's whole prompt
    decode(layer, q, k, v)        takes q (H, 1, D), k and v (H_kv, 1, D) of one token, returns
                                  keys and values (H_kv, n, D) to attend to, the token's own among
                                  them, and a mask (H_kv, 1, n), True where to attend, or None
    advance(n_tokens)             all layers have seen `n_tokens` more: the prompt, or one token
    seal(length)                  called between two tokens: the next `length` tokens that are in
                                  no sentence yet form one
    report()                      bytes held and moved
    stage(name)                   a context manager around a stage to be timed
    """

    def __init__(self, model_config, max_tokens: int, device, dtype, stage=nullcontext):
        self.stage, self.num_tokens = stage, 0
        layers, heads, dim = model_config.kv_shape  # kv (L, H_kv, max_tokens, 2, D)
        self.kv = torch.zeros(layers, heads, max_tokens, 2, dim, device=device, dtype=dtype)

    def prefill(self, layer: int, q, k, v):
        self.kv[layer, :, : k.shape[1]] = torch.stack((k, v), dim=2)

    def decode(self, layer: int, q, k, v) -> tuple:
        end = self.num_tokens + 1
        self.kv[layer, :, self.num_tokens : end] = torch.stack((k, v), dim=2)
        return *self.kv[layer, :, :end].unbind(dim=2), None

    def advance(self, n_tokens: int):
        self.num_tokens += n_tokens

    def seal(self, length: int):
        """Nothing to do: a full cache does not know sentences."""

    def report(self) -> dict:
        n_bytes = self.kv.untyped_storage().nbytes()
        return {"device_kv_parts": {"keys and values": n_bytes}, "device_kv_bytes": n_bytes,
                "host_kv_bytes": 0, "full_kv_bytes": self.num_tokens * self.kv[:, :, 0].nbytes,
                "selected_bytes": 0, "loaded_bytes": 0, "hit_rate": None}


def project(x: torch.Tensor, projection: nn.Linear) -> torch.Tensor:
    """`projection(x)`, x (n, in) -> (n, out), with a faster way for one token on a CPU.

    One token is bandwidth bound. In float32, a matrix times a vector runs on one thread, which does
    not reach the memory's bandwidth; a batched product runs on all threads, so each gets a block of
    rows. In 16 bits, oneDNN (the library behind PyTorch's products) rearranges the weights for
    every token; PyTorch's own kernel does not.
    """
    if x.is_cuda or x.shape[0] > 1:
        return projection(x)
    if x.dtype == torch.float32:
        n_blocks = math.gcd(projection.out_features, torch.get_num_threads())
        blocks = projection.weight.view(n_blocks, -1, x.shape[1])  # (blocks, rows, in)
        out = (blocks @ x.mT.expand(n_blocks, -1, -1)).view(1, -1)
        return out if projection.bias is None else out + projection.bias
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        return projection(x)
    finally:
        torch.backends.mkldnn.enabled = before
