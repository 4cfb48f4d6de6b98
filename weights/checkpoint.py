"""A checkpoint folder -> `Llama` on a device: reads safetensors, strictly.

Whatever does not fit `config.json` is refused with a ValueError that names it.
"""

import hashlib
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import Llama, LlamaConfig
from support.huge_pages import use_huge_pages
from support.ranks import RANKS, connect, own_part, own_slice, read_part
from support.report import say
from weights.config import load_config, unknown_fields
from weights.contents import weight_files
from weights.folder import one_line, read_json

BLOCK = 2**20  # bytes that are read at a time
# The model's joined projections, and their parts in a checkpoint, in their order.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def fingerprint(folder: Path) -> str:
    """A hash of all bytes of the model's configuration and weights."""
    digest = hashlib.sha256()
    for path in (folder / "config.json", *weight_files(folder)):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
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
                    # Llama 2 checkpoints also store RoPE's frequencies, tied ones the head again.
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


def has_own_head(files: list[Path]) -> bool:
    """Whether the files, which are whole, hold a head that differs from the embeddings."""
    with ExitStack() as stack:
        places = {}
        for path in files:
            file = stack.enter_context(safe_open(path, framework="pt"))
            places |= {name.removeprefix("model."): file.get_slice(name) for name in file.keys()}
        head, embeddings = places.get("lm_head.weight"), places.get("embed_tokens.weight")
        return bool(head and embeddings) and not equal(head, embeddings)


def equal(a, b, n_rows: int = 1024) -> bool:
    """Compare two stored tensors, so many rows at a time."""
    if a.get_shape() != b.get_shape():
        return False
    starts = range(0, (a.get_shape() or [0])[0], n_rows)
    return all(torch.equal(*(x[i : i + n_rows].float() for x in (a, b))) for i in starts)


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
    ranks, each loads its part. Raises ValueError with the missing, unexpected and wrongly shaped
    tensors, up to four names each.
    """
    config, files = load_config(folder), weight_files(folder)
    if unknown := unknown_fields(read_json(folder / "config.json")):
        say("config.json has fields that are not known, and may change what is computed:"
            f" {unknown}")
    stored = read_tensors(files, config, stored_shape)
    if config.tie_word_embeddings and has_own_head(files):
        say("config.json ties the head to the embeddings, but lm_head.weight differs from them: it"
            " is used as it is stored")
        config = replace(config, tie_word_embeddings=False)
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
    if not model.lm_head.weight.is_cuda:
        use_huge_pages()
    return model
