"""A checkpoint folder -> `Llama` on a device: reads `config.json` and safetensors, strictly.

Whatever `model.py` does not compute, and whatever does not fit, is refused with a ValueError that
names it.
"""

import hashlib
import re
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import Llama, LlamaConfig
from weights.folder import check, find, need, one_line, read_json, shown
from support.ranks import RANKS, connect, own_part, own_slice, read_part

MOST = 2**24
SAMPLE = 2**16  # bytes, of which a fingerprint reads 64 times
LIMITS = {  # of config.json: what a value may be, see `weights.folder.check`
    "vocab_size": (1, MOST), "hidden_size": (1, MOST), "intermediate_size": (1, MOST),
    "num_hidden_layers": (1, 4096), "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096), "head_dim": (2, 4096),
    "max_position_embeddings": (1, 2**31), "rms_norm_eps": (0.0, 1.0), "rope_theta": (1.0, 1e12),
    "attention_bias": bool, "mlp_bias": bool, "tie_word_embeddings": bool, "hidden_act": str,
    "model_type": str, "architectures": list, "quantization_config": dict, "rope_scaling": dict,
    "rope_parameters": dict,
}
SCALING = {"factor": (1.0, 1e6), "low_freq_factor": (1e-6, 1e6), "high_freq_factor": (1e-6, 1e6),
           "original_max_position_embeddings": (1, 2**31)}

# The model's joined projections, and their parts in a checkpoint, in their order.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def load_config(folder: Path) -> LlamaConfig:
    """Raises ValueError if `folder` has no `config.json` of a Llama that `model.py` computes."""
    path = need(folder, "config.json")
    return parse_config(read_json(path), path)


def parse_config(raw: dict, where="config.json") -> LlamaConfig:
    """A parsed `config.json` -> LlamaConfig. ValueError for what `model.py` does not compute."""
    check(raw, LIMITS, where)
    refuse_unsupported(raw)
    rope = rope_settings(raw)
    check(rope, LIMITS, where)
    given = {f.name: raw[f.name] for f in fields(LlamaConfig) if raw.get(f.name) is not None}
    given |= {"rope_theta": float(rope["rope_theta"]), "rope_scaling": None}
    if rope["rope_type"] == "llama3":
        check(rope | {name: rope.get(name, "absent") for name in SCALING}, SCALING, where)
        if rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise ValueError(f"{where}: low_freq_factor is not below high_freq_factor")
        given["rope_scaling"] = rope
    if (heads := raw.get("num_attention_heads")) and (hidden := raw.get("hidden_size")):
        given.setdefault("num_key_value_heads", heads)
        given.setdefault("head_dim", hidden // heads)
    try:
        config = LlamaConfig(**given)
    except TypeError as error:  # names the fields that are missing
        raise ValueError(f"{where}: {str(error).partition(') ')[2]}") from None
    if config.head_dim < 2 or config.head_dim % 2:
        raise ValueError(f"{where}: head_dim is {config.head_dim}, must be even: RoPE turns pairs")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"num_attention_heads {config.num_attention_heads} is not a multiple of"
                         f" num_key_value_heads {config.num_key_value_heads}")
    return config


def refuse_unsupported(raw: dict) -> None:
    architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
    architecture = architecture if isinstance(architecture, str) else shown(architecture)
    if architecture not in ("LlamaForCausalLM", "llama"):
        raise ValueError(f"architecture {architecture} is not supported, only LlamaForCausalLM")
    if method := raw.get("quantization_config"):
        raise ValueError(f"quantised checkpoints ({shown(method.get('quant_method'))}) are not"
                         " supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {shown(raw['hidden_act'])} is not supported, only 'silu'")


def rope_settings(raw: dict) -> dict:
    """`rope_theta`, `rope_type` and the scaling's numbers, from either spelling of the config.

    Newer files gather them in `rope_parameters`; the Llama 3.x checkpoints have `rope_theta` at
    the top level and the rest in `rope_scaling`.
    """
    rope = {"rope_theta": raw.get("rope_theta"), "rope_type": "default"}
    for nested in (raw.get("rope_scaling"), raw.get("rope_parameters")):
        rope |= nested or {}
    rope["rope_theta"] = 10000.0 if rope["rope_theta"] is None else rope["rope_theta"]
    kind = rope.pop("type", rope["rope_type"])  # the oldest files say `type`
    if kind not in ("default", "llama3"):
        raise ValueError(f"RoPE type {shown(kind)} is not supported, only 'default' and 'llama3'")
    return rope | {"rope_type": kind}


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's one safetensors file, or the shards that its index names."""
    whole = find(folder, "model.safetensors")
    index = find(folder, "model.safetensors.index.json")
    if whole or not index:
        return [need(folder, "model.safetensors")]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise ValueError(f"{index} has no weight_map from names to files")
    return [need(folder, name) for name in sorted(set(shards.values()))]


def fingerprint(folder: Path) -> str:
    """A hash of the model's configuration and of 64 samples of every file of weights."""
    digest = hashlib.sha256()
    for path in (folder / "config.json", *weight_files(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(size * i // 64)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def checkpoint_names(model: Llama) -> dict:
    """Parameter -> {name in a checkpoint: shape}, the parts of a joined one in their order.

    >>> config = LlamaConfig(10, 8, 16, 1, 2, 1, 4, 32)
    >>> checkpoint_names(Llama(config))["layers.0.mlp.gate_up_proj.weight"]
    {'layers.0.mlp.gate_proj.weight': (16, 8), 'layers.0.mlp.up_proj.weight': (16, 8)}
    """
    config = model.config
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    rows = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size,
            "gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
    names = {}
    for name, weight in model.named_parameters():  # a tied head is the embeddings
        *parent, module, kind = name.split(".")
        names[name] = {".".join((*parent, part, kind)): (rows.get(part, len(weight)),
                                                         *weight.shape[1:])
                       for part in JOINED.get(module, (module,))}
    return names


def check_names_and_shapes(found: dict, expected: dict) -> None:
    """Compare two dicts of name -> shape; ValueError lists every kind of difference."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of the wrong shape": [f"{name} {found[name]}, config.json implies {shape}"
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
    """`read(open_file, name)` for every weight in `files`, by its name without `model.`"""
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
            raise ValueError(f"{path} is not a complete safetensors file:"
                             f" {one_line(error)}") from None
    return tensors


def pick_device(name: str) -> torch.device:
    """The device of this name, made the current one. ValueError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):
        raise ValueError(f"--device {name} is not one of auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if device.index >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"--device {name}: this machine has {gpus} CUDA GPUs")
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name. `auto` is bfloat16 where the hardware computes in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # Ampere and later; others emulate bfloat16
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    return torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16") else torch.float32


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Llama:
    """Load the Llama in `folder`, its weights as `dtype` on `device`.

    Joined projections are copied one at a time, so the weights are never held twice. Of several
    ranks, each loads its part. Raises
    ValueError with the missing, unexpected and wrongly shaped tensors, up to four names each.
    """
    config, files = load_config(folder), weight_files(folder)
    stored = read_tensors(files, config, stored_shape)
    if config.num_hidden_layers > len(stored):  # a module a layer would take long to make
        raise ValueError(f"the weights do not fit config.json: {config.num_hidden_layers} layers,"
                         f" and {len(stored)} tensors")
    with torch.device("meta"):  # the shapes without the memory
        names = checkpoint_names(Llama(config))
        model = Llama(config) if RANKS == 1 else connect(Llama(own_part(config)))
    expected = {name: shape for parts in names.values() for name, shape in parts.items()}
    check_names_and_shapes(stored, expected)

    def read(file, name):
        tensor = file.get_tensor(name) if RANKS == 1 else read_part(file, name)
        return tensor.to(device, dtype)

    tensors = read_tensors(files, config, read)
    # `cat` copies a single part as well: otherwise the weight would stay a page of the file.
    weights = {name: torch.cat([tensors.pop(part) for part in parts])
               for name, parts in names.items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"][own_slice(config.vocab_size)]
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval()
    return model
