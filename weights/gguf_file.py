"""A GGUF file -> a folder as the Hugging Face hub has it, which the rest of this program reads.

GGUF is the format of llama.cpp: one file with a model's weights, often quantised, its tokenizer
and its numbers. Strict as `checkpoint.py`: a tensor, or a number of the model, that is not known
here is refused by name, because leaving it out would give another model.
"""

import json
import re
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tqdm import tqdm

from support.rope import scaled
from weights.config import TYPES
from weights.folder import check, one_line, shown
from weights.gguf_reader import Tensor, read_gguf
from weights.gguf_tokenizer import check_tokenizer, stop_ids, token_id, write_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # GGUF calls a Mistral model `llama`
MOST = 2**24
LIMITS = {  # of the numbers of the model, see `weights.folder.check`; their names follow `llama.`
    "context_length": (1, 2**31), "embedding_length": (1, MOST), "feed_forward_length": (1, MOST),
    "block_count": (1, 4096), "attention.head_count": (1, 4096),
    "attention.layer_norm_rms_epsilon": (0.0, 1.0),
    # These may be absent.
    "attention.head_count_kv": (1, 4096), "attention.key_length": (2, 4096),
    "attention.value_length": (2, 4096), "attention.sliding_window": (0, 2**31),
    "attention.causal": bool, "vocab_size": (1, MOST), "rope.freq_base": (1.0, 1e12),
    "rope.dimension_count": (2, 4096), "rope.scaling.type": str,
    "rope.scaling.factor": (0.0, 1e6), "rope.scaling.original_context_length": (0, 2**31),
    "rope.scaling.finetuned": bool, "rope.scaling.yarn_beta_fast": (1e-6, 1e6),
    "rope.scaling.yarn_beta_slow": (1e-6, 1e6), "rope.scaling.attn_factor": (1.0, 1.0),
    "rope.scale_linear": (1.0, 1.0),
}
NEEDED = list(LIMITS)[:6]
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}

# GGUF's name of each tensor -> the checkpoint's; in a layer after `blk.N.` and `model.layers.N.`
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # not a weight: Llama 3.1's scaling, computed

STORED = {Kind.F32: "F32", Kind.F16: "F16", Kind.BF16: "BF16"}  # GGUF's types of floats
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes
BLOCK = 2**22  # elements that are converted at a time


def checkpoint_name(gguf_name: str) -> str:
    """ValueError if the name is not one of a model that is read here.

    >>> checkpoint_name("blk.7.attn_q.weight")
    'model.layers.7.self_attn.q_proj.weight'
    """
    found = re.fullmatch(r"(?:blk\.(\d{1,4})\.)?(\w+)\.(weight|bias)", gguf_name, re.ASCII)
    layer, name, kind = found.groups() if found else (None, None, None)
    if name not in (TENSORS if layer is None else LAYER_TENSORS):
        raise ValueError(f"the tensor {shown(gguf_name)} is not supported")
    if layer is None:
        return f"{TENSORS[name]}.{kind}"
    return f"model.layers.{layer}.{LAYER_TENSORS[name]}.{kind}"


def half_split_rows(weight, n_heads: int):
    """Undo GGUF's row order of a Llama's `q_proj` and `k_proj`.

    llama.cpp rotates neighbouring pairs of channels (0,1), (2,3), …; the checkpoint's RoPE
    rotates channel i with channel i + D/2, so GGUF interleaves each head's two halves.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, columns)  # (H, D/2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def convert(path: Path, folder: Path):
    """Write the model of a GGUF file into `folder`, an empty one. ValueError names the file."""
    try:
        if not path.is_file():
            raise ValueError("no such file")
        metadata, tensors = read_gguf(path)
        config = read_config(metadata, tensors)
        check_types(tensors)
        write_json(config, folder / "config.json")
        stop = stop_ids(metadata)
        if len(stop) > 1:
            write_json({"eos_token_id": stop}, folder / "generation_config.json")
        write_tokenizer(metadata, folder)
        write_weights(tensors, config, folder / "model.safetensors")
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def write_json(values: dict, path: Path):
    path.write_text(json.dumps(values, indent=2) + "\n")


def read_numbers(metadata: dict) -> tuple[str, dict]:
    """The architecture, and the numbers under its name.

    One that is not known and not 0 is refused: it may scale, cap or route what is computed. A 0
    is how GGUF says that there is none, and strings only describe.
    """
    check(metadata, {"general.architecture": str, "split.count": (0, 2**16)}, "metadata")
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {shown(architecture)} is not supported, only"
                         f" {', '.join(ARCHITECTURES)}")
    if metadata.get("split.count", 1) > 1:
        raise ValueError("this is one of several parts of a model: join them first")
    prefix = f"{architecture}."
    numbers = {key.removeprefix(prefix): value for key, value in metadata.items()
               if key.startswith(prefix)}
    for name, value in numbers.items():
        something = len(value) > 0 if isinstance(value, (list, np.ndarray)) else bool(value)
        if name not in LIMITS and something and not isinstance(value, str):
            raise ValueError(f"{shown(prefix + name)} is {shown(value)}, which is not supported")
    numbers |= {name: numbers.get(name, "absent") for name in NEEDED}
    check(numbers, LIMITS, architecture)
    if numbers.get("attention.causal") is False:
        raise ValueError(f"{prefix}attention.causal is false, which is not supported")
    return architecture, numbers


def read_config(metadata: dict, tensors: dict) -> dict:
    """What `config.json` says of this model."""
    architecture, numbers = read_numbers(metadata)
    check_tokenizer(metadata)
    heads = numbers["attention.head_count"]
    config = {
        "architectures": [TYPES[architecture]],
        "model_type": architecture,
        "vocab_size": vocabulary_size(metadata, numbers, tensors),
        "hidden_size": numbers["embedding_length"],
        "intermediate_size": numbers["feed_forward_length"],
        "num_hidden_layers": numbers["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": numbers.get("attention.head_count_kv", heads),
        "head_dim": head_dim(numbers),
        "max_position_embeddings": numbers["context_length"],
        "rms_norm_eps": round(numbers["attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": numbers.get("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": token_id(metadata, "bos"),
        "eos_token_id": token_id(metadata, "eos"),
        "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[
            stored_types(tensors)["token_embd.weight"]],
        "rope_scaling": rope_scaling(numbers, tensors),
    }
    if architecture != "qwen2":  # whose biases are a matter of course
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors or None
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors or None
    if window := numbers.get("attention.sliding_window"):
        if architecture != "llama":
            raise ValueError(f"{architecture}.attention.sliding_window is not supported")
        config |= {"architectures": [TYPES["mistral"]], "model_type": "mistral",
                   "sliding_window": window}
    return {name: value for name, value in config.items() if value is not None}


def vocabulary_size(metadata: dict, numbers: dict, tensors: dict) -> int:
    """Rows of the embeddings. ValueError if the file has another number of tokens."""
    if "token_embd.weight" not in tensors:
        raise ValueError("there is no tensor token_embd.weight")
    size, tokens = tensors["token_embd.weight"].shape[0], metadata.get("tokenizer.ggml.tokens", ())
    for other in (len(tokens), numbers.get("vocab_size", size)):
        if other != size:
            raise ValueError(f"{other} tokens do not fit {size} rows of embeddings")
    return size


def head_dim(numbers: dict) -> int:
    """Channels of a head. ValueError if values have others, or if RoPE turns some of them only."""
    hidden, heads = numbers["embedding_length"], numbers["attention.head_count"]
    size = numbers.get("attention.key_length", numbers.get("rope.dimension_count"))
    if size is None and hidden % heads:
        raise ValueError(f"{hidden} channels are not a multiple of {heads} heads")
    size = size or hidden // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if numbers.get(name, size) != size:
            raise ValueError(f"{name} is {numbers[name]}, but a head has {size} channels")
    return size


def rope_scaling(numbers: dict, tensors: dict) -> dict | None:
    """`rope_scaling` of the config, None if there is none."""
    kind = numbers.get("rope.scaling.type", "none")
    if ROPE_FACTORS in tensors:
        if kind != "none":
            raise ValueError(f"{ROPE_FACTORS} and RoPE scaling {shown(kind)} are both there")
        return llama3_scaling(numbers, tensors[ROPE_FACTORS])
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"RoPE scaling {shown(kind)} is not supported, only linear and yarn")
    names = {"rope.scaling.factor": "factor"}
    if kind == "yarn":
        names |= {"rope.scaling.original_context_length": "original_max_position_embeddings",
                  "rope.scaling.yarn_beta_fast": "beta_fast",
                  "rope.scaling.yarn_beta_slow": "beta_slow"}
    given = {name: numbers[key] for key, name in names.items() if numbers.get(key)}
    if "factor" not in given:
        raise ValueError(f"RoPE scaling {kind} has no factor")
    return {"rope_type": kind} | given


def llama3_scaling(numbers: dict, tensor: Tensor) -> dict | None:
    """The scaling whose factors are in `tensor` (D/2,): how much slower each pair becomes."""
    size = head_dim(numbers)
    if tensor.kind != Kind.F32 or tensor.shape != (size // 2,):
        raise ValueError(f"{ROPE_FACTORS} has shape {tensor.shape}, type {tensor.kind.name}")
    factors = torch.tensor(tensor.data.view(np.float32))
    scaling = LLAMA3 | {"factor": float(factors.max())}
    theta = numbers.get("rope.freq_base", 10000.0)
    frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    expected = frequency / scaled(frequency, scaling)
    if not torch.allclose(factors.double(), expected, rtol=1e-4, atol=0):
        raise ValueError(f"{ROPE_FACTORS} is not the scaling of Llama 3.1")
    return scaling if scaling["factor"] != 1 else None


def check_types(tensors: dict):
    """ValueError for a name that is not known, or a type that cannot be dequantised."""
    for name, tensor in tensors.items():
        if name != ROPE_FACTORS:
            checkpoint_name(name)
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.kind][1]), np.uint8),
                            tensor.kind)
        except NotImplementedError:
            raise ValueError(f"{shown(name)} has type {tensor.kind.name}, which is not"
                             " supported") from None


def stored_types(tensors: dict) -> dict:
    """By GGUF's name, the type in safetensors: that of the file if all are floats, else BF16."""
    floats = all(tensor.kind in STORED for tensor in tensors.values())
    return {name: STORED[tensor.kind] if floats else "BF16" for name, tensor in tensors.items()}


def ordered_rows(name: str, tensor: Tensor, config: dict) -> np.ndarray:
    """The tensor's bytes, (rows, bytes of a row), in the checkpoint's order."""
    n_rows, part = tensor.shape[0], name.split(".")[-2]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if config["model_type"].startswith("qwen") or part not in heads:
        return tensor.data.reshape(-1, tensor.data.shape[-1])
    if n_rows % (2 * heads[part]) or tensor.data.size % n_rows:
        raise ValueError(f"{name} has shape {tensor.shape}, which does not fit"
                         f" {heads[part]} heads")
    # A bias has one element a row.
    return half_split_rows(tensor.data.reshape(n_rows, -1), heads[part])


def blocks(rows: np.ndarray, kind: Kind, stored: str):
    """The rows' bytes as they are stored, some at a time."""
    if STORED.get(kind) == stored:
        yield rows
        return
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    step = max(1, BLOCK // (rows.shape[1] // block_bytes * block))
    for start in range(0, len(rows), step):
        weight = gguf.dequantize(rows[start:start + step], kind)  # float32
        yield torch.from_numpy(weight.copy()).bfloat16().view(torch.int16).numpy()


def write_weights(tensors: dict, config: dict, path: Path):
    """A safetensors file, tensor by tensor: they never are in memory together."""
    types = stored_types(tensors)
    # As the library has it: the widest first, so that each begins at a multiple of its width.
    order = sorted(tensors.keys() - {ROPE_FACTORS},
                   key=lambda name: (-WIDTHS[types[name]], checkpoint_name(name)))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        shape, begin = tensors[name].shape, end
        end += int(np.prod(shape)) * WIDTHS[types[name]]
        header[checkpoint_name(name)] = {"dtype": types[name], "shape": shape,
                                         "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in tqdm(order, desc="converting", unit="tensor", file=sys.stderr):
                rows = ordered_rows(name, tensors[name], config)
                for block in blocks(rows, tensors[name].kind, types[name]):
                    file.write(block.tobytes())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
