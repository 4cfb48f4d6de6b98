import doctest
import json
import math
import shutil
import sys

import pytest
import torch
from conftest import REFERENCE, TINY, checkpoint
from safetensors.torch import load_file, save_file

from support import rope
from weights import checkpoint as module
from weights import config as config_module
from weights.checkpoint import load_model
from weights.config import load_config, parse_config

CPU = torch.device("cpu")


def test_docstrings():
    assert doctest.testmod(module).failed == doctest.testmod(config_module).failed == 0


def test_both_spellings_of_the_config_say_the_same():
    folder = REFERENCE / "tiny_llama3_rope_tied"
    new, old = (parse_config(json.loads((folder / name).read_text()))
                for name in ("config.json", "config_v4.json"))
    for config in (new, old):
        config.rope_scaling.pop("rope_theta")
        assert config.rope_scaling == {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128}
    assert new == old


def test_default_weights_are_the_reference_s(default_model, reference):
    state = checkpoint(default_model)
    assert torch.equal(state.pop("lm_head.weight"), state["embed_tokens.weight"])
    assert len(state) == len(reference["weights"])
    for name, expected in reference["weights"].items():
        weight = state[name.removeprefix("model.")].double()
        assert list(weight.shape) == expected["shape"]
        assert weight.sum().item() == pytest.approx(expected["sum"], abs=1e-3)
        assert weight.abs().sum().item() == pytest.approx(expected["abs_sum"], abs=1e-3)


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
                 "1 of the wrong shape: norm.weight (3,), config.json implies (64,)"):
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
    load_model(folder, "cpu", torch.float32)  # a device by its name, too


@pytest.mark.parametrize("place", [0, 40, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_its_own_is_used_though_the_config_is_tied(tmp_path, capsys, place, dtype):
    folder = copy_tiny(tmp_path, "tiny_llama3_rope_tied")
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].to(dtype)
    head[place, place] += 1
    change(folder, lambda weights: weights.update({"lm_head.weight": head}))
    model = load_model(folder, CPU, torch.float32)
    assert torch.equal(model.lm_head.weight, head.float())
    assert not torch.equal(model.lm_head.weight, model.embed_tokens.weight)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "lm_head.weight differs from them: it is used" in said


def test_a_head_of_another_shape_is_refused_though_the_config_is_tied(tmp_path):
    folder = copy_tiny(tmp_path, "tiny_llama3_rope_tied")
    change(folder, lambda weights: weights.update({"lm_head.weight": torch.ones(3, 4)}))
    with pytest.raises(ValueError, match=r"1 of the wrong shape: lm_head.weight \(3, 4\)"):
        load_model(folder, CPU, torch.float32)


@pytest.mark.parametrize("edit, message", [
    ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM is not supported"),
    ({"architectures": None, "model_type": "phi3"}, "architecture phi3 is not supported"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE type 'longrope' is not supported"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "factor is 'absent', must be"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, "factor is 0.5, must be"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 1}},
     "rope_theta is 1, must be above 1"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     "RoPE's 'partial_rotary_factor' 0.5 is not supported"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2, "mrope_section": [1, 2]}},
     "RoPE's 'mrope_section' [1, 2] is not supported"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2, "twist": 3}}, "RoPE's 'twist' 3"),
    *(({name: value}, f"{name} {value!r} is not supported, only ") for name, value in (
        ("partial_rotary_factor", 0.75), ("rope_interleaved", True), ("use_sliding_window", True),
        ("attention_multiplier", 0.015625), ("logits_scaling", 8.0), ("residual_multiplier", 0.22),
        ("embedding_multiplier", 12.0), ("no_rope_layers", [1, 0]), ("clip_qkv", 8.0),
        ("attn_logit_softcapping", 50.0), ("use_qk_norm", True), ("num_local_experts", 8))),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
     "layer_types has 'sliding_attention', only 'full_attention'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised checkpoints ('gptq')"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"vocab_size": None}, "'vocab_size'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor is 'absent'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8,
                          "low_freq_factor": 4, "high_freq_factor": 4,
                          "original_max_position_embeddings": 128}},
     "low_freq_factor is not below high_freq_factor"),
    *(({name: value}, f"config.json: {name} is {shown}, must be ") for name, value, shown in (
        ("vocab_size", "8", "'8'"), ("hidden_size", 1.5, "1.5"), ("head_dim", -1, "-1"),
        ("head_dim", 2**64, "18446744073709551616"), ("num_hidden_layers", 0, "0"),
        ("num_hidden_layers", 10**6, "1000000"), ("rope_theta", -1, "-1"),
        ("rope_theta", 10.0**30, "1e+30"), ("rms_norm_eps", float("nan"), "nan"),
        ("num_key_value_heads", 0, "0"), ("num_attention_heads", True, "True"),
        ("tie_word_embeddings", 1, "1"), ("rope_scaling", [], "[]"),
        ("architectures", "x", "'x'"))),
    ({"intermediate_size": 10**5000}, "is not JSON: Exceeds the limit"),
    ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan, must be"),
    ({"head_dim": 7}, "head_dim is 7, must be even"),
    ({"architectures": [{}]}, "architecture {} is not supported"),
    ({"num_key_value_heads": 3},
     "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
])
def test_unsupported_configs_are_refused_by_name(tmp_path, edit, message):
    folder = copy_tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | edit
    sys.set_int_max_str_digits(6000)
    (folder / "config.json").write_text(json.dumps(config))
    sys.set_int_max_str_digits(4300)
    with pytest.raises(ValueError) as error:
        load_config(folder)
    assert message in str(error.value)


def edited(name, **fields):
    return parse_config(json.loads((REFERENCE / name / "config.json").read_text()) | fields)


def test_what_an_architecture_implies():
    """Defaults of its code, where the file does not say it."""
    assert edited("tiny_qwen2").attention_bias and not edited("tiny_qwen2").o_proj_bias
    assert edited("tiny_qwen3", head_dim=None).head_dim == 128
    assert edited("tiny_mistral", num_attention_heads=16, num_key_value_heads=None,
                  architectures=None).num_key_value_heads == 8
    assert edited("tiny_gqa", attention_bias=True).o_proj_bias


@pytest.mark.parametrize("name, fields, expected", [
    ("tiny_mistral", {"sliding_window": 300}, 300),
    ("tiny_mistral", {"sliding_window": 4096}, 512),
    ("tiny_qwen2", {"sliding_window": 300}, 512),  # use_sliding_window is false
    ("tiny_qwen2_yarn", {"max_position_embeddings": 128}, 512),
    ("tiny_gqa", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 512),
    ("tiny_gqa", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0,
                                      "original_max_position_embeddings": 128}}, 128),
])
def test_a_model_has_as_many_positions_as_are_computed(name, fields, expected):
    assert edited(name, **fields).max_position_embeddings == expected


def test_dynamic_scaling_is_plain_up_to_its_positions():
    config = edited("tiny_gqa", rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    assert config == edited("tiny_gqa")


@pytest.mark.parametrize("settings, expected", [
    ({}, 0.1 * math.log(4) + 1), ({"attention_factor": 0.7}, 0.7), ({"factor": 1.0}, 1.0),
    ({"mscale": 1.0, "mscale_all_dim": 0.5},
     (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
])
def test_the_scale_of_attention_is_yarn_s(settings, expected):
    scaling = {"rope_type": "yarn", "factor": 4.0} | settings
    assert rope.attention_scale(scaling) == pytest.approx(expected)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_pairs_and_slows_slow_ones(truncate):
    frequency = 10000.0 ** -(torch.arange(32) / 32)
    kept = rope.yarn_kept(frequency, {"original_max_position_embeddings": 4096,
                                      "rope_theta": 10000.0, "truncate": truncate})
    turns = 4096 * frequency / (2 * math.pi)
    assert (kept[turns > 40] == 1).all() and (kept[turns < 0.8] == 0).all()
    assert (kept.diff() <= 0).all() and 0 < kept[turns.log().sub(math.log(6)).abs().argmin()] < 1


def test_a_field_that_is_not_known_is_told(tmp_path, capsys):
    folder = copy_tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {
        "name": "tiny", "use_magic": False, "twist": 0.5, "depth_scales": {"a": [1]}}))
    load_model(folder, CPU, torch.float32)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("depth_scales ({'a': [1]}), twist (0.5)\n")


@pytest.mark.parametrize("files, message", [
    (["pytorch_model.bin"],
     "it has its weights in pytorch_model.bin: pickled weights are not read"),
    (["adapter_config.json", "adapter_model.safetensors"], "it is an adapter"),
    (["model.q4.gguf"], "say which GGUF file, such as "),
    (["model-00001-of-00002.safetensors"], "it has shards, and no model.safetensors.index.json"),
])
def test_a_folder_without_weights_says_what_it_has(tmp_path, files, message):
    folder = copy_tiny(tmp_path)
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).write_text("{}")
    with pytest.raises(ValueError) as error:
        load_model(folder, CPU, torch.float32)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_absent_and_broken_files_are_named(tmp_path):
    folder = copy_tiny(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    for content in (weights[:-1000], weights[:50], b"not safetensors at all", b""):
        (folder / "model.safetensors").write_bytes(content)
        message = "model.safetensors is not a complete safetensors file"
        with pytest.raises(ValueError, match=message):
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
    config = parse_config(raw)
    assert (config.head_dim, config.num_key_value_heads) == (48 // 6, 6)
