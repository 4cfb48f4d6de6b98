"""GGUF files: small ones of our own making, and what comes of them."""

import doctest
import json
import random
import struct
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import (REFERENCE, ROOT, TEXT, checkpoint, greedy, library_tokenizer, random_ids,
                      random_llama, write_tiny_folder)
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.torch import load_file
from test_generate import run

from model import FullCache, LlamaConfig
from support.rope import scaled
from weights import gguf_file, gguf_reader, gguf_tokenizer, models
from weights.checkpoint import load_model
from weights.download import DEFAULT, MODELS, download, is_whole
from weights.gguf_file import LAYER_TENSORS, TENSORS, convert, half_split_rows
from weights.models import model_folder
from weights.pieces import byte_alphabet
from weights.tokenizer import Tokenizer

SIZES = LlamaConfig(vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                    max_position_embeddings=2048)
NUMBERS = {"context_length": 2048, "embedding_length": 64, "feed_forward_length": 96,
           "block_count": 2, "attention.head_count": 4, "attention.head_count_kv": 2,
           "attention.layer_norm_rms_epsilon": 1e-6, "rope.dimension_count": 16}
BPE = {"model": "gpt2", "pre": "gpt-2", "merges": ["h e", "l l", "he ll"],
       "tokens": [*sorted(byte_alphabet()), "he", "ll", "hell", "hello", "<s>", "</s>", "<tool>",
                  "<|eot|>"],
       "token_type": [1] * 260 + [3, 3, 4, 3], "bos_token_id": 260, "eos_token_id": 261}


def gguf_name(name: str) -> str:
    """What `checkpoint_name` undoes."""
    names = {ours: theirs for theirs, ours in (TENSORS | LAYER_TENSORS).items()}
    *module, kind = name.removeprefix("model.").split(".")
    if module[0] == "layers":
        return f"blk.{module[1]}.{names['.'.join(module[2:])]}.{kind}"
    return f"{names.get('.'.join(module)) or names[f'model.{module[0]}']}.{kind}"


def interleaved(weight, n_heads: int):
    """What llama.cpp's converter does to a projection, or to its bias."""
    halves = weight.reshape(n_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors_of(config=SIZES, architecture="llama") -> dict:
    """A random model's weights as GGUF has them: name -> float32."""
    tensors = {gguf_name(name): weight.numpy()
               for name, weight in checkpoint(random_llama(config=config)).items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name in tensors if architecture == "llama" else ():
        if (part := name.split(".")[-2]) in heads:
            tensors[name] = interleaved(tensors[name], heads[part])
    return tensors


def write_gguf(path, tensors, numbers=NUMBERS, tokenizer=BPE, architecture="llama", kinds={},
               others={}):
    """A GGUF file. A tensor is stored as `kinds` says of its name, else as float32; one that is
    bytes is stored as it is. A value that is None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    values = {f"{architecture}.{name}": value for name, value in numbers.items()}
    values |= {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()} | others
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array}
    for key, value in values.items():
        if value is not None:
            add[type(value)](key, value)
    for name, tensor in tensors.items():
        kind = kinds.get(name, Kind.F32)
        data = tensor if tensor.dtype == np.uint8 else gguf.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tensors() -> dict:
    return tensors_of()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def test_docstrings():
    for module in (gguf_file, gguf_reader, gguf_tokenizer):
        assert doctest.testmod(module).failed == 0


def test_rows_come_back_to_the_half_split_order():
    weight = np.random.default_rng(0).normal(size=(24, 5))
    assert (half_split_rows(interleaved(weight, 3), 3) == weight).all()


def test_a_llama_computes_the_same(tmp_path, folder, tensors):
    convert(write_gguf(tmp_path / "m.gguf", tensors), folder)
    ours = load_model(folder, torch.device("cpu"), torch.float32)
    ids = random_ids(50, "cpu")
    logits = [model.logits(model.prefill(ids, FullCache(SIZES, 50, "cpu", torch.float32)))
              for model in (ours, random_llama(config=SIZES))]
    assert ours.config == SIZES and torch.equal(*logits)


def test_floats_are_stored_as_they_are(tmp_path, folder, tensors):
    kinds = dict(zip(tensors, [Kind.F16, Kind.F32, Kind.BF16, Kind.F32, Kind.F16]))
    path = write_gguf(tmp_path / "m.gguf", tensors, kinds=kinds)
    convert(path, folder)
    assert stored(folder / "model.safetensors") == {
        gguf_file.checkpoint_name(name): kinds.get(name, Kind.F32).name for name in tensors}
    found = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        weight = torch.tensor(weight).to(found[gguf_file.checkpoint_name(name)].dtype)
        if name.split(".")[-2] not in ("attn_q", "attn_k"):
            assert torch.equal(found[gguf_file.checkpoint_name(name)], weight)


def stored(path) -> dict:
    with safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind in gguf.quants._type_traits
                                  and kind != Kind.BF16], ids=lambda kind: kind.name)
def test_every_quantisation_is_read(tmp_path, folder, tensors, kind):
    """Bytes by chance; in llama.cpp's K-quants a row is a multiple of 256 values."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (96, max(block, 64) // block * block_bytes)
    data = np.random.default_rng(0).integers(0, 60, shape, np.uint8)
    name = "blk.1.ffn_up.weight"
    convert(write_gguf(tmp_path / "m.gguf", tensors | {name: data}, kinds={name: kind}), folder)
    found = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    expected = torch.tensor(gguf.dequantize(data, kind)).bfloat16()
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"].view(torch.int16),
                       expected.view(torch.int16))


def test_blocks_of_a_large_tensor_are_joined(tmp_path, folder, tensors, monkeypatch):
    monkeypatch.setattr(gguf_file, "BLOCK", 200)  # 3 rows of 64
    kinds = {"token_embd.weight": Kind.Q8_0, "blk.0.attn_q.weight": Kind.Q8_0}
    convert(write_gguf(tmp_path / "m.gguf", tensors, kinds=kinds), folder)
    found = load_file(folder / "model.safetensors")
    for name, heads in (("token_embd.weight", None), ("blk.0.attn_q.weight", 4)):
        weight = gguf.dequantize(gguf.quantize(tensors[name], Kind.Q8_0), Kind.Q8_0)
        weight = half_split_rows(weight, heads) if heads else weight
        assert torch.equal(found[gguf_file.checkpoint_name(name)], torch.tensor(weight).bfloat16())


@pytest.mark.parametrize("architecture, model_type, bias", [
    ("llama", "llama", True), ("qwen2", "qwen2", True), ("qwen3", "qwen3", False)])
def test_rows_and_biases_of_each_architecture(tmp_path, folder, architecture, model_type, bias):
    config = LlamaConfig(**vars(SIZES) | {"attention_bias": bias})
    tensors = tensors_of(config, architecture)
    if architecture == "qwen3":
        tensors |= {f"blk.{i}.attn_{x}_norm.weight": np.full(16, i, np.float32)
                    for i in range(2) for x in "qk"}
    convert(write_gguf(tmp_path / "m.gguf", tensors, architecture=architecture), folder)
    found = load_file(folder / "model.safetensors")
    for name, weight in checkpoint(random_llama(config=config)).items():
        assert torch.equal(found[name if name.startswith("lm_head") else f"model.{name}"], weight)
    made = json.loads((folder / "config.json").read_text())
    assert made["model_type"] == model_type
    assert made["architectures"] == [f"{model_type.capitalize()}ForCausalLM"]
    assert made.get("attention_bias", False) == (bias and architecture == "llama")
    assert ("model.layers.1.self_attn.q_norm.weight" in found) == (architecture == "qwen3")


def config_of(tmp_path, folder, numbers={}, tensors=None, **how) -> dict:
    path = write_gguf(tmp_path / "m.gguf", tensors or tensors_of(), NUMBERS | numbers, **how)
    convert(path, folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("numbers, expected", [
    ({}, {"num_key_value_heads": 2, "head_dim": 16, "rope_theta": 10000.0, "bos_token_id": 260,
          "torch_dtype": "float32", "model_type": "llama"}),
    ({"rope.freq_base": 5e5, "rope.dimension_count": None, "vocab_size": 264},
     {"rope_theta": 5e5, "head_dim": 16, "vocab_size": 264}),
    ({"attention.key_length": 16, "attention.value_length": 16}, {"head_dim": 16}),
    ({"attention.sliding_window": 128},
     {"sliding_window": 128, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}),
    ({"attention.sliding_window": 0, "expert_count": 0, "logit_scale": 0.0, "expert_used": False,
      "tensor_data_layout": "Meta AI original pth"}, {"model_type": "llama"}),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
     {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True,
      "rope.scaling.original_context_length": 512, "rope.scaling.yarn_beta_fast": 16.0},
     {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0,
                       "original_max_position_embeddings": 512}}),
])
def test_numbers_become_the_config(tmp_path, folder, numbers, expected):
    made = config_of(tmp_path, folder, numbers)
    assert {name: made[name] for name in expected} == expected
    assert ("rope_scaling" in made) == ("rope_scaling" in expected)


def test_a_head_of_its_own_is_told_from_the_embeddings(tmp_path, folder, tensors):
    assert not config_of(tmp_path, folder)["tie_word_embeddings"]
    tied = {name: tensor for name, tensor in tensors.items() if name != "output.weight"}
    assert config_of(tmp_path, folder, tensors=tied)["tie_word_embeddings"]


def rope_factors(factor: float, low=1.0) -> np.ndarray:
    """(D/2,), as llama.cpp's converter makes them of Llama 3.1's config."""
    frequency = 5e5 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    scaling = gguf_file.LLAMA3 | {"factor": factor, "low_freq_factor": low}
    return (frequency / scaled(frequency, scaling)).float().numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0, 1.0])
def test_factors_of_frequencies_are_llama_3_s_scaling(tmp_path, folder, tensors, factor):
    tensors = tensors | {"rope_freqs.weight": rope_factors(factor)}
    made = config_of(tmp_path, folder, {"rope.freq_base": 5e5}, tensors)
    expected = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert made.get("rope_scaling") == (expected if factor > 1 else None)
    assert set(load_file(folder / "model.safetensors")) == {
        gguf_file.checkpoint_name(name) for name in tensors if name != "rope_freqs.weight"}
    load_model(folder, torch.device("cpu"), torch.float32)


F32 = np.float32
REFUSED = [  # what is written otherwise, and the line
    ({"architecture": "gemma3"},
     "architecture 'gemma3' is not supported, only llama, qwen2, qwen3"),
    ({"numbers": {"block_count": None}}, "llama: block_count is 'absent', must be an integer"),
    ({"numbers": {"attention.head_count": [4, 4]}}, "llama: attention.head_count is array"),
    ({"numbers": {"embedding_length": 2**31}}, "embedding_length is 2147483648, must be"),
    ({"numbers": {"attention.head_count": 3, "rope.dimension_count": None}},
     "64 channels are not a multiple of 3 heads"),
    ({"numbers": {"rope.dimension_count": 8, "attention.key_length": 16}},
     "rope.dimension_count is 8, but a head has 16 channels"),
    ({"numbers": {"attention.value_length": 32}}, "value_length is 32, but a head has 16 channels"),
    ({"numbers": {"expert_count": 8}}, "'llama.expert_count' is 8, which is not supported"),
    ({"numbers": {"logit_scale": 0.5}}, "'llama.logit_scale' is 0.5, which is not supported"),
    ({"numbers": {"attn_logit_softcapping": 50.0}}, "'llama.attn_logit_softcapping' is 50.0"),
    ({"numbers": {"anything": [1, 2]}}, "'llama.anything' is array"),
    ({"numbers": {"attention.causal": False}}, "attention.causal is false"),
    ({"numbers": {"attention.sliding_window": 8}, "architecture": "qwen2"},
     "qwen2.attention.sliding_window is not supported"),
    ({"numbers": {"rope.scaling.type": "longrope"}}, "RoPE scaling 'longrope' is not supported"),
    ({"numbers": {"rope.scaling.type": "yarn"}}, "RoPE scaling yarn has no factor"),
    ({"numbers": {"rope.scaling.attn_factor": 2.0}}, "rope.scaling.attn_factor is 2.0, must be"),
    ({"tensors": {"rope_freqs.weight": rope_factors(8.0, low=2.0)}},
     "rope_freqs.weight is not the scaling of Llama 3.1"),
    ({"tensors": {"rope_freqs.weight": np.full(8, np.nan, F32)}}, "not the scaling of Llama 3.1"),
    ({"tensors": {"rope_freqs.weight": np.ones(4, F32)}}, r"rope_freqs.weight has shape \(4,\)"),
    ({"tensors": {"rope_freqs.weight": rope_factors(8.0)},
      "numbers": {"rope.scaling.type": "linear"}}, "are both there"),
    ({"tensors": {"blk.0.ffn_gate_exps.weight": np.ones((2, 2), F32)}},
     "the tensor 'blk.0.ffn_gate_exps.weight' is not supported"),
    ({"tensors": {"blk.0.attn_q.scale": np.ones(1, F32)}}, "'blk.0.attn_q.scale' is not supported"),
    ({"tensors": {"attn_q.weight": np.ones(1, F32)}}, "'attn_q.weight' is not supported"),
    ({"tensors": {"blk.0.attn_k.weight": np.ones((30, 64), F32)}}, "does not fit 2 heads"),
    ({"tensors": {"blk.0.attn_k.bias": np.ones(30, F32)}}, "does not fit 2 heads"),
    ({"tensors": {"token_embd.weight": np.ones((100, 64), F32)}},
     "264 tokens do not fit 100 rows of embeddings"),
    ({"numbers": {"vocab_size": 300}}, "300 tokens do not fit 264 rows"),
    ({"tensors": {"output_norm.weight": np.ones(4, np.uint8)},
      "kinds": {"output_norm.weight": Kind.I8}}, "has type I8, which is not supported"),
    ({"others": {"split.count": [2]}}, "split.count is array"),
    ({"others": {"split.count": 2}}, "one of several parts of a model"),
    ({"tokenizer": {"model": "bert"}}, "tokenizer 'bert' is not supported, only gpt2 and llama"),
    ({"tokenizer": {"model": None}}, "tokenizer None is not supported"),
    ({"tokenizer": {"model": 7}}, "tokenizer.ggml.model is 7, must be a string"),
    ({"tokenizer": {"tokens": 7}}, "tokenizer.ggml.tokens is 7, must be a list"),
    ({"tokenizer": {"tokens": [7]}}, "tokenizer.ggml.tokens is array"),
    ({"tokenizer": {"tokens": None}}, "0 tokens do not fit 264 rows"),
    ({"tokenizer": {"pre": "tekken"}}, "pre-tokenizer 'tekken' is not supported, only smollm"),
    ({"tokenizer": {"pre": None}}, "pre-tokenizer None is not supported"),
    ({"tokenizer": {"token_type": [1] * 263}}, "token_type is not a list of 264 numbers"),
    ({"tokenizer": {"token_type": [1.0] * 264}}, "token_type is not a list of 264 numbers"),
    ({"tokenizer": {"tokens": BPE["tokens"][:263] + ["he"]}}, "the token 'he' is there twice"),
    ({"tokenizer": {"tokens": BPE["tokens"][:255] + ["日"] + BPE["tokens"][256:]}},
     "'日' is not of a byte-level vocabulary"),
    ({"tokenizer": {"merges": ["h e l"]}}, "the merge 'h e l' is not of two tokens"),
    ({"tokenizer": {"merges": ["h i"]}}, "the merges do not fit the tokens"),
    ({"tokenizer": {"eos_token_id": 264}}, "eos_token_id is 264, must be an integer from 0 to 263"),
    ({"tokenizer": {"add_bos_token": True, "bos_token_id": None}}, "bos_token_id is None"),
    ({"tokenizer": {"add_eos_token": True}}, "add_eos_token is not supported"),
    ({"tokenizer": {"model": "llama"}}, "scores is not a list of 264 numbers"),
    ({"tokenizer": {"model": "llama", "scores": [0.0] * 264}}, "cannot read the tokenizer of "),
    ({"tokenizer": {"model": "llama", "scores": [float("inf")] * 264}}, "not finite"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_is_not_computed_is_refused_in_one_line(tmp_path, folder, tensors, changes, message):
    changes = {"tensors": {}, "numbers": {}, "tokenizer": {}} | changes
    path = write_gguf(tmp_path / "m.gguf", tensors | changes.pop("tensors"),
                      NUMBERS | changes.pop("numbers"), BPE | changes.pop("tokenizer"), **changes)
    with pytest.raises(ValueError, match=message) as raised:
        convert(path, folder)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_a_file_that_is_cut_or_spoiled_is_one_line(tmp_path, folder, tensors):
    """Every length but the whole one is refused; a byte that changed may be harmless."""
    whole = write_gguf(tmp_path / "m.gguf", tensors).read_bytes()
    path, choose = tmp_path / "spoiled.gguf", random.Random(0)
    begin = whole.index(b"general.architecture") + 9000  # of the tensors' descriptions, about
    for i in range(300):
        if i < 150:
            content = whole[:choose.randrange(len(whole) if i % 2 else begin)]
        else:
            place = choose.randrange(begin)
            content = whole[:place] + bytes([choose.randrange(256)]) + whole[place + 1:]
        path.write_bytes(content)
        try:
            convert(path, folder)
            assert i >= 150
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def header(n_tensors=0, n_keys=0, version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def description(shape, kind=0, offset=0) -> bytes:
    name = b"output.weight"
    return (struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
            + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset))


@pytest.mark.parametrize("content, message", [
    (b"", "this is not a GGUF file"),
    (b"{}", "this is not a GGUF file"),
    (b"GGUF", "the file ends too early"),
    (header(version=1), "version 1 is not supported, only 2 and 3"),
    (header(version=3 << 24), "version 50331648 is not supported"),
    (header(), "architecture None is not supported"),
    (header(n_keys=1) + key(b"general.architecture", 9, struct.pack("<IQI", 4, 1, 7)),
     "general.architecture is array"),
    (header(n_keys=2**64 - 1), "the file ends too early"),
    (header(n_tensors=2**64 - 1), "the file ends too early"),
    (header(n_keys=1) + struct.pack("<Q", 2**63), "the file ends too early"),
    (header(n_keys=1) + key(b"\xff", 4, bytes(4)), "can't decode byte"),
    (header(n_keys=1) + key(b"a", 99, b""), "a value has type 99"),
    (header(n_keys=1) + key(b"a", 9, struct.pack("<IQ", 9, 1)), "a value has type 9"),
    (header(n_keys=1) + key(b"a", 9, struct.pack("<IQ", 8, 2**61)), "the file ends too early"),
    (header(n_keys=1) + key(b"a", 9, struct.pack("<IQ", 4, 2**62)), "the file ends too early"),
    (header(n_keys=2) + key(b"a", 0, b"1") * 2, "the key 'a' is there twice"),
    (header(n_tensors=1) + description([]), "'output.weight' has 0 dimensions"),
    (header(n_tensors=1) + description([1] * 5), "'output.weight' has 5 dimensions"),
    (header(n_tensors=1) + description([2**63, 2**63]), "'output.weight' is not whole"),
    (header(n_tensors=1) + description([8, 0]), r"has shape \(0, 8\)"),
    (header(n_tensors=1) + description([8], kind=2), r"has shape \(8,\), type Q4_0"),
    (header(n_tensors=1) + description([1], kind=77), "has type 77"),
    (header(n_tensors=1) + description([8], offset=2**64 - 1) + bytes(64), "is not whole"),
    (header(n_tensors=2) + description([8]) * 2 + bytes(64), "'output.weight' is there twice"),
    (header(n_keys=1) + key(b"general.alignment", 4, bytes(4)), "general.alignment is 0"),
])
def test_absurd_numbers_take_no_memory(tmp_path, folder, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert(path, folder)


def test_data_that_two_tensors_share_is_refused(tmp_path, folder):
    """Else a small file could make a large one."""
    first = description([16], offset=0)
    second = first.replace(b"output", b"outpux")
    (tmp_path / "m.gguf").write_bytes(header(n_tensors=2) + first + second + bytes(100))
    with pytest.raises(ValueError, match="'outpux.weight' is not whole"):
        convert(tmp_path / "m.gguf", folder)


def tokenizer_of(tmp_path, folder, **changes) -> Tokenizer:
    convert(write_gguf(tmp_path / "m.gguf", tensors_of(), tokenizer=BPE | changes), folder)
    return Tokenizer(folder)


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    """How the text is split before the merges."""
    model = library_tokenizer(tokenizer.folder)
    text = model.normalizer.normalize_str(text) if model.normalizer else text
    return [text[start:end] for _, (start, end) in model.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("name, expected", [
    ("gpt-2", ["I", "'m", " at", " 12345", ".", "\n", "\n", "DON", "'", "T", " ", " ;"]),
    ("smollm", ["I", "'m", " at", " ", "1", "2", "3", "4", "5", ".", "\n", "\n", "DON", "'", "T",
                " ", " ;"]),
    ("llama-bpe", ["I", "'m", " at", " ", "123", "45", ".\n\n", "DON", "'T", " ", " ;"]),
    ("llama3", ["I", "'m", " at", " ", "123", "45", ".\n\n", "DON", "'T", " ", " ;"]),
    ("qwen2", ["I", "'m", " at", " ", "1", "2", "3", "4", "5", ".\n\n", "DON", "'T", " ", " ;"]),
    ("default", ["I", "'", "m", " at", " ", "123", "45", ".", "\n", "\n", "DON", "'", "T", "  ",
                 ";"]),
])
def test_texts_are_split_as_the_name_of_the_pre_tokenizer_says(tmp_path, folder, name, expected):
    tokenizer = tokenizer_of(tmp_path, folder, pre=name)
    text = "I'm at 12345.\n\nDON'T  ;"
    assert words(tokenizer, text) == expected
    assert "".join(tokenizer.pieces(tokenizer.encode(text, add_bos=False))) == text


def test_words_go_before_merges_for_llama_3_alone(tmp_path, folder):
    for name, expected in (("llama-bpe", ["hello"]), ("gpt-2", ["hell", "o"])):
        tokenizer = tokenizer_of(tmp_path, folder, pre=name)
        assert tokenizer.pieces(tokenizer.encode("hello", add_bos=False)) == expected


def test_composed_characters_for_qwen_alone(tmp_path, folder):
    for name, expected in (("qwen2", "é"), ("gpt-2", "e\u0301")):
        tokenizer = tokenizer_of(tmp_path, folder, pre=name)
        assert "".join(tokenizer.pieces(tokenizer.encode("e\u0301", add_bos=False))) == expected


def test_control_tokens_are_special_and_others_are_not(tmp_path, folder):
    tokenizer = tokenizer_of(tmp_path, folder)
    assert tokenizer.encode("<tool></s>", add_bos=False) == [262, 261]
    assert tokenizer.special == {260, 261, 263}
    assert tokenizer.pieces([262, 261]) == ["<tool>", "\n\n"]


@pytest.mark.parametrize("changes, expected", [
    ({}, []), ({"add_bos_token": True}, [260]), ({"add_bos_token": False}, []),
    ({"pre": "llama-bpe"}, [260]), ({"pre": "llama-bpe", "add_bos_token": False}, []),
])
def test_the_token_before_a_text(tmp_path, folder, changes, expected):
    tokenizer = tokenizer_of(tmp_path, folder, **changes)
    assert tokenizer.encode("he", add_bos=True) == [*expected, 256]
    assert tokenizer.encode("he", add_bos=False) == [256]


def test_several_tokens_end_an_answer(tmp_path, folder):
    assert tokenizer_of(tmp_path, folder, eot_token_id=261).stop_tokens() == {261}
    assert not (folder / "generation_config.json").exists()
    tokenizer = tokenizer_of(tmp_path, folder, eot_token_id=263, eom_token_id=260)
    assert tokenizer.stop_tokens() == {260, 261, 263}


def test_the_chat_template_may_be_absent(tmp_path, folder):
    assert tokenizer_of(tmp_path, folder).chat_template is None
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    convert(write_gguf(tmp_path / "m.gguf", tensors_of(),
                       others={"tokenizer.chat_template": template}), folder)
    assert Tokenizer(folder).prompt_ids("he") == [260, 256, 261]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A SentencePiece tokenizer as Llama 2 has it."""
    prefix = tmp_path_factory.mktemp("original") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(".")), model_prefix=str(prefix), vocab_size=320,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["<tool>", "▁▁▁"], control_symbols=["<|end|>"])
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def spm(original, **changes) -> dict:
    """Its tokenizer in GGUF, as llama.cpp's converter writes it."""
    ids = range(len(original))
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    types = [next((kind for name, kind in kinds.items() if getattr(original, name)(i)), 1)
             for i in ids]
    tokens = [original.id_to_piece(i) for i in ids]
    for token in ("<tool>", "▁▁▁"):
        types[tokens.index(token)] = 4
    tokens[tokens.index("▁▁▁")] = "   "
    return {"model": "llama", "tokens": tokens, "token_type": types, "bos_token_id": 1,
            "eos_token_id": 2, "scores": [original.get_score(i) for i in ids]} | changes


def write_spm(tmp_path, folder, original, **changes) -> Tokenizer:
    tensors = tensors_of(LlamaConfig(**vars(SIZES) | {"vocab_size": len(original)}))
    convert(write_gguf(tmp_path / "m.gguf", tensors, tokenizer=spm(original, **changes)), folder)
    return Tokenizer(folder)


@pytest.mark.parametrize("text", [
    TEXT, "", " ", "  two  spaces   three ", "<tool>x<tool> </s>", "naïve 🙂 日本\n\ttab",
    "▁ ▁▁▁"])
def test_sentencepiece_encodes_like_the_original(tmp_path, folder, original, text):
    tokenizer = write_spm(tmp_path, folder, original)
    made = library_tokenizer(folder)
    assert not (folder / "tokenizer.json").exists()
    assert made.encode(text) == original.encode(text)
    assert made.decode(made.encode(text)) == original.decode(original.encode(text))
    assert [made.id_to_piece(i) for i in range(len(made))] == [
        original.id_to_piece(i) for i in range(len(original))]
    assert (made.unk_id(), made.bos_id(), made.eos_id(), made.pad_id()) == (0, 1, 2, -1)
    assert tokenizer.special == {1, 2, original.piece_to_id("<|end|>")}
    assert tokenizer.stop_tokens() == {2}


def test_sentencepiece_without_a_space_or_a_token_before_the_text(tmp_path, folder, original):
    tokenizer = write_spm(tmp_path, folder, original)
    assert "".join(tokenizer.pieces(tokenizer.encode("It was", add_bos=True))) == "\n\nIt was"
    tokenizer = write_spm(tmp_path, folder, original, add_space_prefix=False, add_bos_token=False)
    assert "".join(tokenizer.pieces(tokenizer.encode("It was", add_bos=True))) == "It was"


@pytest.fixture
def gguf_path(tmp_path, tensors):
    return write_gguf(tmp_path / "tiny.Q8_0.gguf", tensors)


def test_a_file_is_converted_once(gguf_path, monkeypatch):
    folder = model_folder(gguf_path)
    assert folder == gguf_path.parent / "tiny.Q8_0-gguf"
    assert {path.name for path in gguf_path.parent.iterdir()} == {folder.name, gguf_path.name}
    monkeypatch.setattr(models, "convert", lambda *_: pytest.fail("converted again"))
    assert model_folder(gguf_path) == model_folder(folder) == folder


def test_the_folder_of_another_file_is_not_taken_for_it(gguf_path, tensors):
    folder = model_folder(gguf_path)
    write_gguf(gguf_path, tensors | {"output_norm.weight": np.zeros(64, F32)})
    with pytest.raises(ValueError, match="Q8_0-gguf is something else, or not whole: move it away"):
        model_folder(gguf_path)
    assert model_folder(folder) == folder  # by its own name it is a folder like others


def test_a_file_is_known_by_its_first_bytes(gguf_path):
    path = gguf_path.rename(gguf_path.with_name("blob-1.5"))
    assert model_folder(path) == path.with_name("blob-1.5-gguf")


def test_an_interrupted_conversion_leaves_nothing(gguf_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_file, "write_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model_folder(gguf_path)
    assert list(gguf_path.parent.iterdir()) == [gguf_path]


def test_a_place_that_cannot_be_written_is_one_line(gguf_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(ValueError, match="cannot write .*tiny.Q8_0-gguf: Permission denied"):
        model_folder(gguf_path)


FULL = """
import resource, signal, sys
from pathlib import Path
from weights.models import model_folder

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    model_folder(Path(sys.argv[1]))
except (ValueError, OSError) as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("most", [100, 1000, 5000, 100_000])
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(gguf_path, most):
    done = subprocess.run([sys.executable, "-c", FULL, gguf_path, str(most)], cwd=ROOT,
                          capture_output=True, text=True)
    assert "File too large" in done.stdout and done.stdout.count("\n") == 1, done.stderr
    assert list(gguf_path.parent.iterdir()) == [gguf_path]


@pytest.mark.parametrize("kind, message", [
    ("absent", "no such folder, no such GGUF file, and not one of the names smollm2-135m-instr"),
    ("text", "is a file that is not GGUF"),
    ("pipe", "is a file that is not GGUF"),
    ("folder", "say which GGUF file, such as .*x/a.gguf"),
])
def test_what_is_no_model_is_one_line(tmp_path, kind, message):
    path = tmp_path / "x"
    if kind == "text":
        path.write_text("GGU")
    elif kind == "pipe":
        subprocess.run(["mkfifo", path], check=True)
    elif kind == "folder":
        path.mkdir()
        (path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=message):
        model_folder(path)


def test_a_name_is_a_model_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "download", lambda name: f"downloaded {name}")
    monkeypatch.chdir(tmp_path)
    path = models.Path("qwen2.5-coder-0.5b")
    assert model_folder(None) == f"downloaded {DEFAULT}"
    assert model_folder(path) == "downloaded qwen2.5-coder-0.5b"
    write_tiny_folder(path)
    assert model_folder(path) == path


def test_a_gguf_file_answers(capfd, gguf_path, tmp_path):
    (tmp_path / "prompt").write_text(TEXT)
    status, out, err = run(capfd, "--prompt", tmp_path / "prompt", "--model", gguf_path,
                           "--token-budget", 96, "--max-new-tokens", 4, "--device", "cpu")
    assert status == 0 and out, err
    gguf_path.write_bytes(gguf_path.read_bytes()[:1000])
    status, out, err = run(capfd, "--prompt", tmp_path / "prompt", "--model", gguf_path)
    assert (status, out) == (2, "") and err.count("\n") == 1 and "not whole: move it away" in err


SECOND = "qwen2.5-coder-0.5b"


@pytest.fixture(scope="module")
def second() -> tuple:
    """The second model's folder, if it was downloaded, and what transformers says of it."""
    folder = gguf_file.Path(models.__file__).parent / MODELS[SECOND].folder
    if not is_whole(folder):
        pytest.skip(f"python weights/download.py {SECOND} was not run")
    return download(SECOND), json.loads((REFERENCE / f"{SECOND}-instruct.json").read_text("utf-8"))


def test_the_second_model_makes_the_reference_s_ids(second):
    tokenizer, expected = Tokenizer(second[0]), second[1]
    for text, ids in expected["tokens"].items():
        assert tokenizer.encode(text, add_bos=False) == ids, text
    for case in expected["greedy"]:
        assert tokenizer.render_chat(case["prompt"]) == case["rendered"]
        assert tokenizer.prompt_ids(case["prompt"]) == case["ids"]


@pytest.mark.slow
def test_the_second_model_has_the_reference_s_weights(second):
    weights = load_file(second[0] / "model.safetensors")
    assert weights.keys() == second[1]["weights"].keys()
    for name, (shape, total, absolute) in second[1]["weights"].items():
        weight = weights[name].double()
        assert list(weight.shape) == shape
        assert weight.sum().item() == pytest.approx(total, abs=1e-6 * absolute + 1e-3), name
        assert weight.abs().sum().item() == pytest.approx(absolute, rel=1e-6, abs=1e-3), name


@pytest.mark.slow
def test_the_second_model_computes_what_the_reference_says(second):
    folder, expected = second
    model = load_model(folder, torch.device("cpu"), torch.float32)
    for case in expected["greedy"]:
        logits, written = greedy(model, case["ids"], len(case["continuation"]))
        for token, value in case["top8"]:
            assert logits[0, token].item() == pytest.approx(value, abs=2e-3)
        assert written == case["continuation"]
    text = (REFERENCE / "walden_passage.txt").read_text(encoding="utf-8")
    ids = torch.tensor(Tokenizer(folder).encode(text, add_bos=False)[:1024])
    assert ids.sum() == expected["nll"]["ids_sum"]
    cache = FullCache(model.config, 1024, "cpu", torch.float32)
    loss = torch.nn.functional.cross_entropy(model.logits(model.prefill(ids, cache))[:-1], ids[1:])
    assert loss.item() == pytest.approx(expected["nll"]["mean"], abs=1e-3)
