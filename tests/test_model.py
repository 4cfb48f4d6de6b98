import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE, TINY, checkpoint, random_ids, random_llama
from safetensors.torch import load_file, save_file

import model as model_module
from cache import FullCache
from generate import Tokenizer
from model import LlamaConfig, load_config, load_model

CPU = torch.device("cpu")


def full_cache(model, n_tokens):
    weight = model.embed_tokens.weight
    return FullCache(model.config, n_tokens, weight.device, weight.dtype)


def all_logits(model, ids):
    return model.logits(model.prefill(ids, full_cache(model, len(ids))))


@pytest.mark.parametrize("name", ["tiny_gqa", "tiny_llama3_rope_tied", "tiny_head_dim_sharded"])
def test_logits_equal_an_independent_implementation(name):
    expected = json.loads((REFERENCE / name / "expected.json").read_text())
    model = load_model(REFERENCE / name, CPU, torch.float32)
    logits = all_logits(model, torch.tensor(expected["ids"]))
    for position, key in ((100, "logits_at_100"), (-1, "last_logits")):
        torch.testing.assert_close(logits[position], torch.tensor(expected[key]), rtol=0, atol=1e-4)


def test_both_spellings_of_the_config_say_the_same():
    folder = REFERENCE / "tiny_llama3_rope_tied"
    new, old = (LlamaConfig.from_dict(json.loads((folder / name).read_text()))
                for name in ("config.json", "config_v4.json"))
    for config in (new, old):
        config.rope_scaling.pop("rope_theta")
        assert config.rope_scaling == {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128}
    assert new == old


def test_decoding_one_by_one_equals_one_forward(tiny, device):
    ids = random_ids(60, device)
    expected = all_logits(tiny, ids)
    for n_prompt in (1, 40):
        cache = full_cache(tiny, 60)
        states = [tiny.prefill(ids[:n_prompt], cache)]
        states += [tiny.decode(ids[i : i + 1], cache) for i in range(n_prompt, 60)]
        torch.testing.assert_close(tiny.logits(torch.cat(states)), expected, rtol=0, atol=1e-4)


def test_slices_of_the_mlp_change_nothing(tiny, device, monkeypatch):
    ids = random_ids(50, device)
    whole = all_logits(tiny, ids)
    monkeypatch.setattr(model_module, "MLP_SLICE", 7)
    torch.testing.assert_close(all_logits(tiny, ids), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
def test_a_token_alone_is_what_it_is_among_others(dtype, atol, n_threads):
    """Its projections are computed in another way, on CPUs: in a block of rows for each thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        model = random_llama(config=replace(TINY, attention_bias=True, mlp_bias=True)).to(dtype)
        ids, cache = random_ids(60, CPU), full_cache(model, 60)
        model.prefill(ids[:59], cache)
        alone = model.logits(model.decode(ids[59:], cache))[0]
        torch.testing.assert_close(alone, all_logits(model, ids)[-1], rtol=0, atol=atol)
    finally:
        torch.set_num_threads(before)
    assert torch.backends.mkldnn.enabled  # which is switched off for a while


def test_default_weights_are_the_reference_s(default_model, reference):
    state = checkpoint(default_model)
    assert torch.equal(state.pop("lm_head.weight"), state["embed_tokens.weight"])
    assert len(state) == len(reference["weights"])
    for name, expected in reference["weights"].items():
        weight = state[name.removeprefix("model.")].double()
        assert list(weight.shape) == expected["shape"]
        assert weight.sum().item() == pytest.approx(expected["sum"], abs=1e-3)
        assert weight.abs().sum().item() == pytest.approx(expected["abs_sum"], abs=1e-3)


def test_default_model_continues_like_the_reference(default_model, reference):
    for case in reference["greedy"]:
        cache = full_cache(default_model, len(case["ids"]) + len(case["continuation"]))
        logits = default_model.logits(default_model.prefill(torch.tensor(case["ids"]), cache)[-1:])
        for token, value in case["next_logits_top8"]:
            assert logits[0, token].item() == pytest.approx(value, abs=1e-3)
        written = []
        for _ in case["continuation"]:
            token = logits.argmax(dim=-1)
            written.append(token.item())
            logits = default_model.logits(default_model.decode(token, cache))
        assert written == case["continuation"]


def test_default_model_reads_a_book_like_the_reference(default_model, default_folder, reference):
    text = (REFERENCE / "walden_passage.txt").read_text(encoding="utf-8")
    expected = reference["perplexity"]
    ids = Tokenizer(default_folder).encode(text, add_bos=False)[: expected["first_tokens"]]
    ids = torch.tensor(ids)
    loss = F.cross_entropy(all_logits(default_model, ids)[:-1], ids[1:])
    assert loss.item() == pytest.approx(expected["mean_nll"], abs=1e-3)


def copy_tiny(tmp_path, name="tiny_gqa"):
    return shutil.copytree(REFERENCE / name, tmp_path / name)


def change(folder, edit):
    """Rewrite the folder's weights as `edit(name -> tensor)` leaves them."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def test_missing_unexpected_and_misshapen_tensors_are_all_named(tmp_path):
    folder = copy_tiny(tmp_path)

    def edit(weights):
        weights["model.layers.7.extra"] = weights.pop("model.layers.1.self_attn.q_proj.weight")
        weights["model.norm.weight"] = torch.ones(3)

    change(folder, edit)
    with pytest.raises(ValueError) as error:
        load_model(folder, CPU, torch.float32)
    for part in ("1 missing: layers.1.self_attn.q_proj.weight", "1 unexpected: layers.7.extra",
                 "1 mis-shaped: norm.weight (3,), config.json implies (64,)"):
        assert part in str(error.value)


def test_a_tensor_stored_twice_or_as_integers_is_refused(tmp_path):
    folder = copy_tiny(tmp_path)
    change(folder, lambda w: w.update({"norm.weight": w["model.norm.weight"].clone()}))
    with pytest.raises(ValueError, match="holds norm.weight a second time"):
        load_model(folder, CPU, torch.float32)
    change(folder, lambda w: w.update({"model.norm.weight": w.pop("norm.weight").to(torch.int8)}))
    with pytest.raises(ValueError, match="model.norm.weight is stored as I8"):
        load_model(folder, CPU, torch.float32)


def test_spare_tensors_of_older_checkpoints_are_passed_over(tmp_path):
    folder = copy_tiny(tmp_path, "tiny_llama3_rope_tied")

    def edit(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    change(folder, edit)
    load_model(folder, CPU, torch.float32)


@pytest.mark.parametrize("edit, message", [
    ({"architectures": ["MistralForCausalLM"]}, "architecture MistralForCausalLM"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE type 'yarn'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "RoPE type 'linear'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised checkpoints (gptq)"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"vocab_size": None}, "'vocab_size'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "low_freq_factor"),
    ({"rope_parameters": {"rope_theta": None}}, "no Llama's"),
    ({"num_key_value_heads": 0}, "no Llama's"),
    ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
])
def test_unsupported_configs_are_refused_by_name(tmp_path, edit, message):
    folder = copy_tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | edit
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load_config(folder)
    assert message in str(error.value)


def test_absent_and_broken_files_are_named(tmp_path):
    folder = copy_tiny(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    for content in (weights[:-1000], weights[:50], b"not safetensors at all", b""):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
            load_model(folder, CPU, torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        load_model(folder, CPU, torch.float32)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_model(folder, CPU, torch.float32)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        load_model(folder, CPU, torch.float32)


def test_a_missing_shard_is_named(tmp_path):
    folder = copy_tiny(tmp_path, "tiny_head_dim_sharded")
    (folder / "model-00003-of-00007.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model-00003-of-00007.safetensors"):
        load_model(folder, CPU, torch.float32)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="model.safetensors.index.json has no weight_map"):
        load_model(folder, CPU, torch.float32)


def test_a_head_dim_that_is_not_given_is_implied():
    raw = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    raw |= {"model_type": "llama", "head_dim": None, "num_key_value_heads": None}
    config = LlamaConfig.from_dict(raw)
    assert (config.head_dim, config.num_key_value_heads) == (48 // 6, 6)
