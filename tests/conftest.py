"""Small random Llamas to prove things on, and the default model to prove them on again."""

import json
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as workers, before torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support.environment  # noqa: F401  before torch, which reads the variables that it sets

import benchmarks.scores  # noqa: F401  registers the scores
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model import FullCache, Llama, LlamaConfig
from weights.checkpoint import checkpoint_names, load_model
from weights.download import download

REFERENCE = Path(__file__).parent / "reference"

TINY = LlamaConfig(
    vocab_size=260, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=2048,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    return torch.device(request.param)


def random_llama(device="cpu", config=TINY) -> Llama:
    torch.manual_seed(0)
    model = Llama(config)
    for weight in model.parameters():
        if weight.dim() == 2:  # louder than the default, so that attention is far from uniform
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # not all ones
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.requires_grad_(False).to(device)


def checkpoint(model) -> dict:
    """The model's weights under their names in a checkpoint."""
    weights = {}
    for name, parts in checkpoint_names(model).items():
        weight = model.get_parameter(name)
        weights |= zip(parts, weight.split([shape[0] for shape in parts.values()]))
    return weights


def greedy(model, ids: list[int], n_new: int) -> tuple:
    """The logits after the ids (1, V), and the tokens that the full cache goes on with."""
    cache = FullCache(model.config, len(ids) + n_new, "cpu", torch.float32)
    first = logits = model.logits(model.prefill(torch.tensor(ids), cache)[-1:])
    written = []
    for _ in range(n_new):
        token = logits.argmax(dim=-1)
        written.append(token.item())
        logits = model.logits(model.decode(token, cache))
    return first, written


@pytest.fixture
def tiny(device) -> Llama:
    return random_llama(device)


@pytest.fixture(scope="session")
def default_folder() -> Path:
    return download()


@pytest.fixture(scope="session")
def default_model(default_folder) -> Llama:
    return load_model(default_folder, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def reference() -> dict:
    return json.loads((REFERENCE / "smollm2-135m-instruct.json").read_text())


@pytest.fixture
def tiny_folder(tmp_path) -> Path:
    return write_tiny_folder(tmp_path / "tiny")


def write_tiny_folder(folder: Path, model_config=TINY) -> Path:
    """A whole model folder: random weights, a byte-level tokenizer, no chat template."""
    folder.mkdir()
    config = {**vars(model_config)} | {"eos_token_id": 256}
    o_proj_bias, qk_norm = config.pop("o_proj_bias"), config.pop("qk_norm")
    near = "Qwen3" if qk_norm else "Qwen2" if config["attention_bias"] > o_proj_bias else "Llama"
    config["architectures"] = [f"{near}ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name if name.startswith("lm_head") else f"model.{name}": weight.contiguous()
               for name, weight in checkpoint(random_llama(config=model_config)).items()}
    save_file(weights, folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


TEXT = "It was late. Mr. Fox slept, dreaming of 3.14 geese! Where had they gone? " * 6


def library_tokenizer(folder: Path):
    """The tokenizer of a folder as its own library has it."""
    if (path := folder / "tokenizer.json").exists():
        return Tokenizer.from_file(str(path))
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_llama2_tokenizer(folder: Path) -> Path:
    """A tokenizer as Llama 2 has it: sentencepiece with byte fallback, BOS, a chat template."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(".")), model_prefix=str(folder / "tokenizer"),
        vocab_size=300, model_type="bpe", byte_fallback=True, character_coverage=1.0,
        hard_vocab_limit=False, minloglevel=2)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": {"content": "<s>"}, "eos_token": "</s>",
        "chat_template": "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"}))
    return folder


@pytest.fixture(scope="session")
def llama2_folder(tmp_path_factory):
    return write_llama2_tokenizer(tmp_path_factory.mktemp("llama2"))


def random_spans(n_tokens: int, longest: int = 15) -> list:
    """Sentences of 1 to `longest` tokens that tile `n_tokens`, the same every time."""
    generator = torch.Generator().manual_seed(n_tokens)
    spans, start = [], 0
    while start < n_tokens:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        spans.append((start, min(start + length, n_tokens)))
        start += length
    return spans


def random_ids(n_tokens: int, device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.randint(0, TINY.vocab_size, (n_tokens,), generator=generator).to(device)
