"""A Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU, and the cache of a plain Llama.

Attention asks the cache of its layer for the keys and values to attend to: all of them
(`FullLayer`, below) or those of a few sentences (`cache.LayerCache`). It does not know which of the
two: `FullCache` says what all caches have in common. This file knows nothing of text or files.

Shapes, here and in all files (one prompt at a time, so there is no batch dimension):
    T tokens, H query heads, H_kv key/value heads, G = H // H_kv query heads that share one,
    D channels of a head.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import sdpa_kernel

from support.attention import BACKENDS  # which of PyTorch's kernels attend for one token
from support.attention import causal_attention  # of several tokens
from support.linear import Linear  # an nn.Linear that is faster for one token on a CPU
from support.rope import attention_scale, scaled  # for models adapted to longer contexts


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
    rope_scaling: dict | None = field(default=None, hash=False)  # see `support/rope.py`
    attention_bias: bool = False  # of q_proj, k_proj and v_proj
    o_proj_bias: bool = False  # not in config.json: Qwen2's o_proj has none where the others do
    qk_norm: bool = False  # not in config.json: Qwen3 has it
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @property
    def kv_shape(self) -> tuple:  # L, H_kv, D
        return self.num_hidden_layers, self.num_key_value_heads, self.head_dim


def rope_frequencies(config: LlamaConfig, device) -> torch.Tensor:
    """The angle in radians per position of each pair of channels, float32 (D/2,)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = config.rope_theta ** (-exponent / config.head_dim)
    return frequency if config.rope_scaling is None else scaled(frequency, config.rope_scaling)


def rope_table(config: LlamaConfig, positions: torch.Tensor, dtype) -> tuple:
    """cos and sin (T, D) of every position's angles, for `apply_rope`. RoFormer, 2104.09864."""
    angles = positions[:, None].float() * rope_frequencies(config, positions.device)  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    if config.rope_scaling is not None:
        scale = attention_scale(config.rope_scaling)
        cos, sin = cos * scale, sin * scale
    cos, sin = cos.to(dtype), sin.to(dtype)
    # (a, b) becomes (a cos - b sin, b cos + a sin). The sine table holds the minus sign.
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the channel pairs (i, i + D/2) of x (heads, T, D) by the angles of their positions."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # `roll` swaps a and b


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        q_size, kv_size = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        # q_proj, k_proj and v_proj in one matrix: one larger product is faster.
        self.qkv_proj = Linear(config.hidden_size, q_size + 2 * kv_size, config.attention_bias)
        self.o_proj = Linear(q_size, config.hidden_size, config.o_proj_bias)
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)

    def qkv(self, x, rope):
        """x (T, hidden) -> q (H, T, D), k and v (H_kv, T, D), with RoPE in q and k."""
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim).transpose(0, 1)
        qk, v = qkv[: -self.n_kv_heads], qkv[-self.n_kv_heads :]  # qk (H + H_kv, T, D)
        if self.qk_norm:  # each head's q and k get the length √D, times the norm's weights
            qk = torch.cat((self.q_norm(qk[: self.n_heads]), self.k_norm(qk[self.n_heads :])))
        qk = apply_rope(qk, *rope)
        return qk[: self.n_heads], qk[self.n_heads :], v

    def prefill(self, x, rope, layer_cache):
        """T tokens attend to all before them and to themselves, x (T, hidden) -> (T, hidden)."""
        q, k, v = self.qkv(x, rope)
        keys, values = layer_cache.prefill(q, k, v)  # (H_kv, n, D), the T given ones last
        return self.o_proj(self.attend_causally(q, keys, values))

    def decode(self, x, rope, layer_cache):
        """One token attends to what the cache returns, x (1, hidden) -> (1, hidden)."""
        q, k, v = self.qkv(x, rope)
        keys, values, mask = layer_cache.decode(q, k, v)
        return self.o_proj(self.attend(q, keys, values, mask))

    def attend_causally(self, q, keys, values):
        """q (H, T, D) of the last T of n tokens, keys and values (H_kv, n, D) -> (T, H * D)."""
        return causal_attention(q, keys, values).transpose(0, 1).flatten(1)

    def attend(self, q, keys, values, mask):
        """Attention of one token. q (H, 1, D), keys and values (H_kv, n, D), mask (H_kv, 1, n),
        True where to attend, or None -> (1, H * D)."""
        # The G query heads that share a key become G query positions: each key is read once.
        grouped = q.view(len(keys), -1, self.head_dim).to(keys.dtype)  # (H_kv, G, D)
        mask = None if mask is None else mask[None]  # the fused kernels want four dimensions
        out = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], mask)
        return out.reshape(1, -1).to(q.dtype)  # not `view`: some kernels return it transposed


class MLP(nn.Module):  # SwiGLU, arXiv 2002.05202
    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(hidden, 2 * inner, bias)  # gate_proj and up_proj in one
        self.down_proj = Linear(inner, hidden, bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def prefill(self, x, rope, layer_cache):
        x = x + self.self_attn.prefill(self.input_layernorm(x), rope, layer_cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def decode(self, x, rope, layer_cache):
        x = x + self.self_attn.decode(self.input_layernorm(x), rope, layer_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A cache of this model is a `FullCache` or another object with the protocol of one."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, cache, progress=iter, part_ends=()) -> torch.Tensor:
        """Read a text, ids (T,) -> (T, hidden). A layer reads all of it before the next layer does.
        It can do so in parts, which end at the positions `part_ends`: this takes less memory.
        `progress` wraps the layers, as tqdm does."""
        x, (cos, sin) = self.embed(ids, cache)
        # Of each part (x, cos, sin), views of the whole: a layer's output replaces its input in x.
        parts = [*zip(*(tensor.tensor_split(part_ends) for tensor in (x, cos, sin)))]
        for block, layer_cache in zip(progress(self.layers), cache.layers):
            for x_part, *rope in parts:
                x_part.copy_(block.prefill(x_part, rope, layer_cache))
            layer_cache.keep()
        cache.advance(len(ids))
        return self.norm(x)

    @torch.inference_mode()
    @sdpa_kernel(BACKENDS, set_priority=True)  # PyTorch's own choice is slow for one query on a GPU
    def decode(self, ids: torch.Tensor, cache) -> torch.Tensor:
        """Read one more token, ids (1,) -> (1, hidden)."""
        x = self.decode_layers(self.layers, *self.embed(ids, cache), cache.layers)
        cache.advance(1)
        return self.norm(x)

    @staticmethod
    def decode_layers(blocks, x, rope, layer_caches):
        """One token through some layers, x (1, hidden) -> (1, hidden)."""
        for block, layer_cache in zip(blocks, layer_caches):
            x = block.decode(x, rope, layer_cache)
        return x

    def embed(self, ids: torch.Tensor, cache) -> tuple:
        """The embeddings of the next tokens (T, hidden), and RoPE's table for their positions."""
        x = self.embed_tokens(ids)
        positions = cache.num_tokens + torch.arange(len(ids), device=ids.device)
        return x, rope_table(self.config, positions, x.dtype)

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(n, hidden) -> (n, vocab). After prefill, only the last state's are needed."""
        return self.lm_head(states)


class FullCache:
    """The cache of a plain Llama: every key and value stays on the device. It is also the protocol,
    what a Llama and `generate.py` expect of a cache. For a text they call `expect`, `prefill` and
    `keep` of each layer, `advance`; for a written token `seal` if a sentence has ended, `decode` of
    each layer, `advance`.

    num_tokens           tokens that all layers have seen: the position of the next one
    layers               an object for each layer, with three methods:
      .prefill(q, k, v)  takes q (H, T, D), k and v (H_kv, T, D) of a text or its next part, returns
                         keys and values (H_kv, n, D) of all that are kept, the given ones last
      .keep()            the layer has read all parts: decide what is kept of the text
      .decode(q, k, v)   takes q (H, 1, D), k and v (H_kv, 1, D) of one token, returns keys and
                         values (H_kv, n, D) to attend to, the token's own among them, and a mask
                         (H_kv, 1, n), True where to attend, or None
    advance(n_tokens)    all layers have seen `n_tokens` more
    expect(spans)        call it before each text: `spans` are the text's sentences, (start, end) in
                         its tokens. A text is a prompt or a question
    seal(length)         between two tokens: the first `length` tokens of the open sentence, which
                         is being written, form a sentence
    truncate(n_tokens)   forget everything after the first text: `n_tokens` is its length
    report()             a dict: bytes on device and host, bytes that a full cache would have,
                         bytes selected and loaded, and the fraction of the selected ones that
                         was on the device already
    """

    def __init__(self, model_config, max_tokens: int, device, dtype):
        n_layers, heads, dim = model_config.kv_shape
        self.num_tokens = 0
        self.layers = [FullLayer(torch.zeros(heads, max_tokens, 2, dim, device=device, dtype=dtype))
                       for _ in range(n_layers)]

    def advance(self, n_tokens: int):
        self.num_tokens += n_tokens

    def expect(self, spans: list):
        """Nothing to do: a full cache does not know sentences."""

    def seal(self, length: int):
        """Nothing to do."""

    def truncate(self, n_tokens: int):
        self.num_tokens = n_tokens
        for layer in self.layers:
            layer.n_tokens = n_tokens

    def report(self) -> dict:
        n_bytes = sum(layer.kv.untyped_storage().nbytes() for layer in self.layers)
        token_bytes = sum(layer.kv[:, 0].nbytes for layer in self.layers)
        return {"device_kv_parts": {"keys and values": n_bytes}, "device_kv_bytes": n_bytes,
                "host_kv_bytes": 0, "full_kv_bytes": self.num_tokens * token_bytes,
                "selected_bytes": 0, "loaded_bytes": 0, "hit_rate": None}


class FullLayer:
    """All keys and values of one layer, side by side: kv (H_kv, max_tokens, 2, D)."""

    def __init__(self, kv: torch.Tensor):
        self.kv, self.n_tokens = kv, 0

    def prefill(self, q, k, v) -> tuple:
        end = self.n_tokens + k.shape[1]
        self.kv[:, self.n_tokens : end] = torch.stack((k, v), dim=2)
        self.n_tokens = end
        return self.kv[:, :end].unbind(dim=2)

    def keep(self):
        """Nothing to do: everything is kept."""

    def decode(self, q, k, v) -> tuple:
        return *self.prefill(q, k, v), None
