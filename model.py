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
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# For one token's attention on a GPU, the fastest first (of an H200). FlashAttention takes no mask.
# cuDNN does, but one block of threads reads a head's keys, and each number of them needs a plan.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
    rope_scaling: dict | None = field(default=None, hash=False)  # four numbers of "llama3"
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
        """T tokens attend to all before them and to themselves, x (T, hidden) -> (T, hidden)."""
        q, k, v = self.qkv(x, rope)
        keys, values = cache.prefill(self.layer, q, k, v)  # (H_kv, n, D), the T new ones last
        with cache.stage("attention"):
            # Every block of queries reads all keys: that is faster if they are contiguous.
            keys, values = keys.contiguous(), values.contiguous()
            out = causal_attention(q, keys, values)  # (H, T, D)
        return project(out.transpose(0, 1).flatten(1), self.o_proj)

    def decode(self, x, rope, cache, layer):
        """One token attends to what the cache returns, x (1, hidden) -> (1, hidden). `layer` is the
        entry of `cache.layers` for this layer."""
        return project(self.attend(*self.qkv(x, rope), cache, layer), self.o_proj)

    def attend(self, q, k, v, cache, layer):
        """q (H, 1, D), k and v (H_kv, 1, D) of one token -> (1, H * D)."""
        keys, values, mask = cache.decode(layer, q, k, v)
        with cache.stage("attention"):
            # The G query heads that share a key become G query positions: it is read once.
            grouped = q.view(len(k), -1, self.head_dim)  # (H_kv, G, D)
            mask = None if mask is None else mask[None]  # the fused kernels want four dimensions
            out = F.scaled_dot_product_attention(
                grouped[None], keys[None], values[None], attn_mask=mask)
        return out.reshape(1, -1)  # not `view`: some kernels return it transposed


def causal_attention(q, keys, values, block: int = 1024):
    """q (H, T, D) of the last T of n tokens, keys and values (H_kv, n, D) -> (H, T, D)."""
    n_tokens, n_earlier = keys.shape[1], keys.shape[1] - q.shape[1]
    if n_earlier == 0:
        return F.scaled_dot_product_attention(
            q[None], keys[None], values[None], is_causal=True, enable_gqa=True)[0]
    # PyTorch's causal mask is for q and keys that begin together. Blocks bound the size of ours.
    out, grouped = [], q.unflatten(0, (len(keys), -1))  # (H_kv, G, T, D)
    for start in range(n_earlier, n_tokens, block):
        end = min(start + block, n_tokens)
        mask = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        part = grouped[:, :, start - n_earlier : end - n_earlier]
        found = F.scaled_dot_product_attention(
            part.flatten(1, 2)[None], keys[None, :, :end], values[None, :, :end],
            attn_mask=mask.repeat(part.shape[1], 1))[0]  # (H_kv, G * T, D), as in `attend`
        out.append(found.unflatten(1, part.shape[1:3]))
    return torch.cat(out, dim=2).flatten(0, 1)


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
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, attention, *arguments):
        """`attention` is `self_attn.prefill` or `.decode`."""
        x = x + attention(self.input_layernorm(x), *arguments)
        return x + self.mlp(self.post_attention_layernorm(x))

    def decode(self, x, rope, cache, layer):
        """A layer's step for one token, x (1, hidden): what `Llama.compile_step` compiles."""
        return self(x, self.self_attn.decode, rope, cache, layer)


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
        self.layer_step = Block.decode  # or compiled: see `compile_step`

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, cache, progress=iter) -> torch.Tensor:
        """Read the next T tokens, a text or a part of one, ids (T,) -> (T, hidden). `progress`
        wraps the layers, as tqdm does."""
        x = self.embed_tokens(ids)  # (T, hidden)
        positions = cache.num_tokens + torch.arange(len(ids), device=ids.device)
        rope = rope_table(self.config, positions, x.dtype)
        for block in progress(self.layers):
            x = block(x, block.self_attn.prefill, rope, cache)
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
        with sdpa_kernel(BACKENDS, set_priority=True):
            for block, layer in zip(self.layers, cache.layers):
                x = self.layer_step(block, x, rope, cache, layer)
        return self.norm(x)

    def compile_step(self):
        """Compile a layer's step once for all layers: small operations are fused. On a CPU, C++ and
        not Python calls the others."""
        torch._dynamo.config.recompile_limit = 64  # the table and the host's rows can grow
        torch.compiler.assume_constant_result(n_threads)  # it cannot be traced
        options = {"cpp_wrapper": not self.lm_head.weight.is_cuda}
        self.layer_step = torch.compile(Block.decode, fullgraph=True, options=options)

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(n, hidden) -> (n, vocab). After prefill, only the last state's are needed."""
        return project(states, self.lm_head)


class GraphedDecode:
    """`Llama.decode` as one CUDA graph, replayed for every token: a token launches about a thousand
    kernels, and launching takes longer than running them. The graph repeats them on the same
    addresses, so it is captured again for another cache, and with another `version`."""

    def __init__(self, model):
        self.model = model
        self.ids = torch.zeros(1, dtype=torch.long, device=model.embed_tokens.weight.device)
        self.position = torch.zeros_like(self.ids)
        self.warm, self.captured, self.graph, self.states = None, None, None, None

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, cache) -> torch.Tensor:
        self.ids.copy_(ids)
        self.position.fill_(cache.num_tokens)
        key = cache, cache.version
        if self.warm != key:  # kernels are compiled while a first token is decoded
            self.warm = key
            return self.model.decode(self.ids, cache)
        if self.captured != key:
            self.captured, self.graph = key, torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.states = self.model.step(self.ids, self.position, cache)
        self.graph.replay()
        cache.advance(1)
        return self.states


class FullCache:
    """The cache of a plain Llama: every key and value stays on the device. It also documents the
    protocol, what attention and `generate.py` expect of a cache:

    num_tokens                    tokens that all layers have seen: the position of the next one
    layers                        one entry for each layer, for `decode`
    prefill(layer, q, k, v)       takes the layer's number, and q (H, T, D), k and v (H_kv, T, D) of
                                  the next T tokens, returns keys and values (H_kv, n, D) of all,
                                  these last
    decode(layer, q, k, v)        takes the layer's entry, and q (H, 1, D), k and v (H_kv, 1, D) of
                                  one token, returns keys and values (H_kv, n, D) to attend to,
                                  the token's own among them, and a mask (H_kv, 1, n), True where to
                                  attend, or None
    advance(n_tokens)             all layers have seen `n_tokens` more
    seal(length)                  called between two tokens: the next `length` tokens that are in
                                  no sentence yet form one
    expect(spans)                 the next text to read has these sentences, (start, end)
    snapshot(), restore(it)       go back to what was read when the snapshot was made
    report()                      bytes held and moved
    stage(name)                   a context manager around a stage to be timed
    """

    def __init__(self, model_config, max_tokens: int, device, dtype, stage=nullcontext):
        self.stage, self.num_tokens = stage, 0
        layers, heads, dim = model_config.kv_shape  # kv (L, H_kv, max_tokens, 2, D)
        self.layers = range(layers)
        self.kv = torch.zeros(layers, heads, max_tokens, 2, dim, device=device, dtype=dtype)

    def prefill(self, layer: int, q, k, v) -> tuple:
        end = self.num_tokens + k.shape[1]
        self.kv[layer, :, self.num_tokens : end] = torch.stack((k, v), dim=2)
        return self.kv[layer, :, :end].unbind(dim=2)

    def decode(self, layer: int, q, k, v) -> tuple:
        end = self.num_tokens + 1
        self.kv[layer, :, self.num_tokens : end] = torch.stack((k, v), dim=2)
        return *self.kv[layer, :, :end].unbind(dim=2), None

    def advance(self, n_tokens: int):
        self.num_tokens += n_tokens

    def seal(self, length: int):
        """Nothing to do: a full cache does not know sentences."""

    def expect(self, spans: list):
        """Nothing to do."""

    def snapshot(self) -> dict:
        return {"num_tokens": torch.tensor(self.num_tokens)}

    def restore(self, snapshot: dict, release=None):
        self.num_tokens = snapshot["num_tokens"].item()

    def report(self) -> dict:
        n_bytes = self.kv.untyped_storage().nbytes()
        return {"device_kv_parts": {"keys and values": n_bytes}, "device_kv_bytes": n_bytes,
                "host_kv_bytes": 0, "full_kv_bytes": self.num_tokens * self.kv[:, :, 0].nbytes,
                "selected_bytes": 0, "loaded_bytes": 0, "hit_rate": None}


def project(x: torch.Tensor, projection: nn.Linear) -> torch.Tensor:
    """`projection(x)`, x (n, in) -> (n, out), with a faster way for one token on a CPU.

    One token is bandwidth bound. In float32, a matrix times a vector runs on one thread, which does
    not reach the memory's bandwidth; a batched product runs on all threads, so each gets a block of
    rows.
    """
    if x.is_cuda or x.shape[0] > 1:
        return projection(x)
    if x.dtype == torch.float32:
        n_blocks = math.gcd(projection.out_features, n_threads())
        blocks = projection.weight.view(n_blocks, -1, x.shape[1])  # (blocks, rows, in)
        out = (blocks @ x.mT.expand(n_blocks, -1, -1)).view(1, -1)
    else:
        compiling = torch.compiler.is_compiling()  # otherwise a plain call is faster
        product = torch.ops.sentencekv.product_in_16_bits if compiling else product_in_16_bits
        out = product(x, projection.weight)
    return out if projection.bias is None else out + projection.bias


def n_threads() -> int:
    return torch.get_num_threads()


def product_in_16_bits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear` of one token by PyTorch's own kernel. oneDNN, the library behind its products,
    rearranges the weights for every token."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        return F.linear(x, weight)
    finally:
        torch.backends.mkldnn.enabled = before


# `torch.compile` would ignore the setting. So for it this is one operator.
torch.library.define("sentencekv::product_in_16_bits", "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl("sentencekv::product_in_16_bits", "default", product_in_16_bits)
torch.library.register_fake("sentencekv::product_in_16_bits",
                            lambda x, weight: x.new_empty(1, len(weight)))
