"""A Llama to read: RMSNorm, RoPE, grouped-query attention, SwiGLU, and strict weight loading.

Attention asks a cache for the keys and values to attend to. Whether the cache hands back all of
them or a few sentences fetched from the host is the cache's business: this file knows nothing of
text, of sentences, of memory tiers.

Shapes, here and below (one prompt at a time, so there is no batch dimension):
    T tokens, H query heads, H_kv key/value heads, G = H // H_kv query heads that share one,
    D channels of a head.
"""

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of `config.json` that decide the computation, under their Hugging Face names."""

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

    @classmethod
    def from_dict(cls, raw: dict) -> "LlamaConfig":
        """Read a parsed `config.json`; ValueError for whatever this file does not compute."""
        refuse_unsupported(raw)
        rope = rope_settings(raw)
        given = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        given |= {"rope_theta": rope["rope_theta"]}
        given |= {"rope_scaling": rope if rope["rope_type"] == "llama3" else None}
        if heads := raw.get("num_attention_heads"):
            given.setdefault("num_key_value_heads", heads)
            given.setdefault("head_dim", raw.get("hidden_size", 0) // heads)
        try:
            config = cls(**given)
        except TypeError as error:  # names the fields that are missing
            raise ValueError(f"config.json: {str(error).partition(') ')[2]}") from None
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(f"num_attention_heads {config.num_attention_heads} is no multiple of"
                             f" num_key_value_heads {config.num_key_value_heads}")
        return config


def refuse_unsupported(raw: dict) -> None:
    architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
    if architecture not in ("LlamaForCausalLM", "llama"):
        raise ValueError(f"architecture {architecture} is not supported, only LlamaForCausalLM")
    if method := raw.get("quantization_config"):
        raise ValueError(f"quantised checkpoints ({method.get('quant_method')}) are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")


def rope_settings(raw: dict) -> dict:
    """`rope_theta`, `rope_type` and the scaling's numbers, from either spelling of the config.

    Newer files gather them in `rope_parameters`; the Llama 3.x checkpoints have `rope_theta` at
    the top level and the rest in `rope_scaling`.
    """
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), "rope_type": "default"}
    for nested in (raw.get("rope_scaling"), raw.get("rope_parameters")):
        rope |= nested or {}
    kind = rope.pop("type", rope["rope_type"])  # the oldest files say `type`
    if kind not in ("default", "llama3"):
        raise ValueError(f"RoPE type {kind!r} is not supported, only 'default' and 'llama3'")
    return rope | {"rope_type": kind}


def rope_frequencies(config: LlamaConfig, device) -> torch.Tensor:
    """Radians by which each pair of channels turns per position, float32 (D/2,)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = config.rope_theta ** (-exponent / config.head_dim)
    if config.rope_scaling is None:
        return frequency
    # Llama 3.1: turns that fit the original context `low` times or less are slowed by `factor`,
    # those that fit `high` times or more are left alone, and between the two it blends.
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / scaling["factor"])


def rope_table(config: LlamaConfig, positions: torch.Tensor, dtype) -> tuple:
    """cos and sin (T, D) of every position's angles, for `rotate`. RoFormer, arXiv 2104.09864."""
    angles = positions[:, None].float() * rope_frequencies(config, positions.device)  # (T, D/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # (a, b) turns to (a cos - b sin, b cos + a sin): the minus is kept here, with the sine.
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each head's channel pairs (i, i + D/2) of x (heads, T, D) by their position's angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


@contextmanager
def onednn_for(n_tokens: int):
    """oneDNN multiplies many tokens fast; for one it would first rearrange the weights, each time.

    It is the library behind PyTorch's half-precision products on CPUs; PyTorch has its own, too.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and n_tokens > 1
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class Linear(nn.Linear):
    """One projection, or several of the same input in one matrix, which is read faster.

    `parts` are their names in a checkpoint and their outputs.
    """

    def __init__(self, in_features: int, bias: bool, **parts: int):
        super().__init__(in_features, sum(parts.values()), bias)
        self.parts = parts

    def forward(self, x):
        if x.is_cuda or x.shape[0] > 1 or x.dtype != torch.float32:
            return super().forward(x)
        # A token takes as long as the weights take to be read. In float32 PyTorch leaves a matrix
        # times a vector to one CPU thread, which cannot read as fast as the memory gives; a batch
        # of such products it shares out. So each thread gets a block of rows.
        n_blocks = math.gcd(self.out_features, torch.get_num_threads())
        blocks = self.weight.unflatten(0, (n_blocks, -1))  # (blocks, rows, in)
        out = (blocks @ x.mT.expand(n_blocks, -1, -1)).view(1, -1)
        return out if self.bias is None else out + self.bias


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        q_size, kv_size = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        bias = config.attention_bias
        self.qkv_proj = Linear(config.hidden_size, bias, q_proj=q_size, k_proj=kv_size,
                               v_proj=kv_size)
        self.o_proj = Linear(q_size, bias, o_proj=config.hidden_size)

    def heads(self, x, rope):
        """x (T, hidden) -> q (H, T, D), k and v (H_kv, T, D), positions already in q and k."""
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim).transpose(0, 1)
        qk, v = qkv[: -self.n_kv_heads], qkv[-self.n_kv_heads :]
        qk = rotate(qk, *rope)
        return qk[: self.n_heads], qk[self.n_heads :], v

    def prefill(self, x, rope, cache):
        q, k, v = self.heads(x, rope)
        with cache.stage("attention"):
            # A head's keys are gone over again for every few queries: faster if they lie together.
            k, v = k.contiguous(), v.contiguous()
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=True
            )[0]  # (H, T, D)
        cache.prefill(self.layer, q, k, v)
        return self.o_proj(out.transpose(0, 1).flatten(1))

    def decode(self, x, rope, cache):
        return self.o_proj(self.attend(*self.heads(x, rope), cache))

    def attend(self, q, k, v, cache):
        """q (H, 1, D), k and v (H_kv, 1, D) of one token -> what it reads (1, H * D)."""
        # keys, values (H_kv, n, D); mask (H_kv, 1, n) is True where to attend, or None: everywhere
        keys, values, mask = cache.decode(self.layer, q, k, v)
        with cache.stage("attention"):
            # The G query heads of a group stand in for G query positions, so that each key and
            # value is read once and never repeated.
            grouped = q.view(len(k), -1, self.head_dim)  # (H_kv, G, D)
            # The fused kernels want all four dimensions, of the mask too.
            mask = None if mask is None else mask[None]
            out = F.scaled_dot_product_attention(
                grouped[None], keys[None], values[None], attn_mask=mask
            )
        return out.reshape(1, -1)  # some kernels return it transposed


MLP_SLICE = 8192  # tokens


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(hidden, bias, gate_proj=inner, up_proj=inner)
        self.down_proj = Linear(inner, bias, down_proj=hidden)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, attend):
        """`attend` is the attention's `prefill` or `decode` with its other arguments bound."""
        x = x + attend(self.input_layernorm(x))
        # In slices, or a long prompt's activations, widest in the MLP, would set the memory's peak.
        for start in range(0, x.shape[0], MLP_SLICE):
            part = x[start : start + MLP_SLICE]
            part += self.mlp(self.post_attention_layernorm(part))
        return x


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, False, lm_head=config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, cache, progress=iter) -> torch.Tensor:
        """Run the prompt, ids (T,), through all layers. Returns the final states (T, hidden).

        The cache is told of every layer's q, k and v as soon as its attention is done.
        `progress` wraps the walk over the layers, to show it.
        """
        x = self.embed_tokens(ids)  # (T, hidden)
        rope = rope_table(self.config, torch.arange(len(ids), device=ids.device), x.dtype)
        for block in progress(self.layers):
            x = block(x, lambda h: block.self_attn.prefill(h, rope, cache))
        cache.advance(len(ids))
        return self.norm(x)

    @torch.inference_mode()
    def decode(self, ids: torch.Tensor, cache) -> torch.Tensor:
        """Run one more token, ids (1,), at position `cache.num_tokens`. Returns (1, hidden)."""
        states = self.step(ids, torch.full_like(ids, cache.num_tokens), cache)
        cache.advance(1)
        return states

    @onednn_for(1)
    def step(self, ids: torch.Tensor, position: torch.Tensor, cache) -> torch.Tensor:
        """`decode`, as far as it runs on the device alone. ids and position (1,)"""
        x = self.embed_tokens(ids)
        rope = rope_table(self.config, position, x.dtype)
        for block in self.layers:
            x = block(x, lambda h: block.self_attn.decode(h, rope, cache))
        return self.norm(x)

    @torch.inference_mode()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(n, hidden) -> (n, vocab). Prefill needs those of its last state alone."""
        with onednn_for(len(states)):
            return self.lm_head(states)


class GraphedDecode:
    """`Llama.decode` as one CUDA graph, replayed for every token.

    The cache's tensors must stay in place while its `capacity` is the same; when that changes, the
    step is captured again. A token is a thousand small kernels, and to start them one by one takes
    the host longer than most of them run. Stages inside a graph cannot be timed.
    """

    def __init__(self, model: Llama, cache):
        self.model, self.cache = model, cache
        self.ids = torch.zeros(1, dtype=torch.long, device=model.embed_tokens.weight.device)
        self.position = torch.zeros_like(self.ids)
        self.graph = self.capacity = None

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, cache) -> torch.Tensor:
        assert cache is self.cache
        self.ids.copy_(ids)
        self.position.fill_(cache.num_tokens)
        if self.capacity is None:  # the first token runs plainly, for what has to be compiled
            self.capacity = 0
            return self.model.decode(self.ids, cache)
        if self.capacity != cache.capacity:  # its tensors have moved
            self.capacity, self.graph = cache.capacity, torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.states = self.model.step(self.ids, self.position, cache)
        self.graph.replay()
        cache.advance(1)
        return self.states


def read_json(path: Path) -> dict:
    """The object in a JSON file. ValueError if the file is absent or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def load_config(folder: Path) -> LlamaConfig:
    """Raises ValueError if `folder` has no `config.json` of a Llama that this file computes."""
    raw = read_json(folder / "config.json")
    try:
        config = LlamaConfig.from_dict(raw)
        rope_frequencies(config, "cpu")  # here a number that is missing would be missed
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder / 'config.json'} is no Llama's: {error!r}") from None
    return config


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's one safetensors file, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.exists() and not files[0].exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} has no weight_map")
        files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.exists():
            raise ValueError(f"{folder} has no {file.name}")
    return files


def checkpoint_names(model: Llama) -> dict:
    """Parameter -> {name in a checkpoint: shape}, its parts in their order."""
    names = {}
    for name, weight in model.named_parameters():  # a tied head is the embeddings
        path, _, kind = name.rpartition(".")
        parent, _, own = path.rpartition(".")
        parts = getattr(model.get_submodule(path), "parts", {own: len(weight)})
        names[name] = {".".join(filter(None, (parent, part, kind))): (size, *weight.shape[1:])
                       for part, size in parts.items()}
    return names


def check_names_and_shapes(found: dict, expected: dict) -> None:
    """Compare two dicts of name -> shape; ValueError lists every kind of difference."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "mis-shaped": [f"{name} {found[name]}, config.json implies {shape}"
                       for name, shape in expected.items() if found.get(name, shape) != shape],
    }
    parts = [f"{len(names)} {kind}: {'; '.join(names[:4])}{'; …' if len(names) > 4 else ''}"
             for kind, names in problems.items() if names]
    if parts:
        raise ValueError(f"the weights do not fit config.json: {', '.join(parts)}")


def stored_shape(file, name: str) -> tuple:
    """ValueError if the tensor does not hold floats of 16 bits or more."""
    stored = file.get_slice(name)
    kind = stored.get_dtype()
    if kind not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"{name} is stored as {kind}: quantised weights are not supported")
    return tuple(stored.get_shape())


def read_tensors(files: list[Path], config: LlamaConfig, read) -> dict:
    """`read(open_file, name)` for every weight in `files`, keyed by this file's module names."""
    tensors = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    # Llama 2 checkpoints also store RoPE's frequencies, tied ones a second head.
                    spare = "rotary_emb.inv_freq" in name
                    spare |= name == "lm_head.weight" and config.tie_word_embeddings
                    short = name.removeprefix("model.")
                    if short in tensors:
                        raise ValueError(f"{path} holds {short} a second time")
                    if not spare:
                        tensors[short] = read(file, name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return tensors


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Llama:
    """Load the Llama in `folder`, its weights as `dtype` on `device`.

    They are joined one at a time, so that they are never held twice. Raises ValueError with the
    missing, unexpected and mis-shaped tensors, up to four names each.
    """
    config = load_config(folder)
    with torch.device("meta"):  # the shapes without the memory
        model = Llama(config)
    files, names = weight_files(folder), checkpoint_names(model)
    expected = {name: shape for parts in names.values() for name, shape in parts.items()}
    check_names_and_shapes(read_tensors(files, config, stored_shape), expected)

    def read(file, name):
        return file.get_tensor(name).to(device, dtype)

    tensors = read_tensors(files, config, read)
    # `cat` copies, also where there is one part: else the weights would stay pages of the file.
    weights = {name: torch.cat([tensors.pop(part) for part in parts])
               for name, parts in names.items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    del weights
    model.requires_grad_(False).eval()
    return model
