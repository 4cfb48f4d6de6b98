"""`config.json` -> `LlamaConfig`: which models are a Llama, or close enough for `model.py`.

Nothing that changes the arithmetic is passed over in silence. Of every field it is known that
`model.py` computes it (`LIMITS`), that it is computed for one value only (`PLAIN`), or that it
changes nothing here (`HARMLESS`). Any other field that holds a number gets a warning.
"""

from dataclasses import fields, replace
from pathlib import Path

from model import LlamaConfig
from weights.folder import check, need, plain, read_json, shown

MOST = 2**24
LIMITS = {  # what a value may be, see `weights.folder.check`
    "vocab_size": (1, MOST), "hidden_size": (1, MOST), "intermediate_size": (1, MOST),
    "num_hidden_layers": (1, 4096), "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096), "head_dim": (2, 4096),
    "max_position_embeddings": (1, 2**31), "rms_norm_eps": (0.0, 1.0), "rope_theta": (1.0, 1e12),
    "attention_bias": bool, "mlp_bias": bool, "tie_word_embeddings": bool, "hidden_act": str,
    "model_type": str, "architectures": list, "quantization_config": dict, "rope_scaling": dict,
    "rope_parameters": dict, "sliding_window": (1, 2**31), "use_sliding_window": bool,
    "layer_types": list,
}
COMPUTED = [f.name for f in fields(LlamaConfig) if f.name in LIMITS]
# Architecture -> what its code says and its config.json does not: first what is always so, then
# what is so unless the file says something else.
ARCHITECTURES = {
    "LlamaForCausalLM": ({}, {}),
    "MistralForCausalLM": ({"attention_bias": False, "mlp_bias": False},
                           {"num_key_value_heads": 8}),
    "Qwen2ForCausalLM": ({"attention_bias": True, "o_proj_bias": False, "mlp_bias": False},
                         {"num_key_value_heads": 32}),
    "Qwen3ForCausalLM": ({"qk_norm": True, "mlp_bias": False},
                         {"num_key_value_heads": 32, "head_dim": 128}),
}
TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
         "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # where none is named
ROPE = {  # the types of RoPE, and the numbers that each must have
    "default": (), "dynamic": (), "linear": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROPE_NUMBERS = {
    "rope_theta": (1.0, 1e12), "original_max_position_embeddings": (1, 2**31),
    "factor": (1.0, 1e6), "low_freq_factor": (1e-6, 1e6), "high_freq_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6), "beta_slow": (1e-6, 1e6), "attention_factor": (1e-6, 1e6),
    "mscale": (0.0, 1e6), "mscale_all_dim": (0.0, 1e6), "truncate": bool,
}
PLAIN = {  # the value that a plain Llama has: `model.py` computes no other
    "hidden_act": "silu", "hidden_activation": "silu", "partial_rotary_factor": 1, "rotary_pct": 1,
    "rope_interleaved": False, "rope_interleave": False, "use_sliding_window": False,
    "logits_scaling": 1, "logit_scale": 1, "residual_multiplier": 1, "embedding_multiplier": 1,
    "scale_emb": 1, "scale_depth": None, "dim_model_base": None, "attention_multiplier": None,
    "query_pre_attn_scalar": None, "no_rope_layers": [], "no_rope_layer_interval": 0,
    "clip_qkv": None, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "attn_temperature_tuning": False, "attention_chunk_size": None, "mrope_section": None,
    "rope_local_base_freq": None, "use_mrope": False, "use_alibi": False, "alibi": False,
    "use_qk_norm": False, "qk_layernorm": False, "qk_norm": False, "bias": False,
    "qkv_bias": False, "add_bias_linear": False, "use_bias": False, "o_proj_bias": False,
    "parallel_attn": False, "use_parallel_residual": False, "is_encoder_decoder": False,
    "num_experts": 0, "num_local_experts": 0, "n_routed_experts": 0, "num_shared_experts": 0,
    "cross_attention_layers": [], "add_cross_attention": False,
}
HARMLESS = frozenset("""
    _attn_implementation _name_or_path attention_dropout attn_implementation bos_token_id dtype
    eos_token_id hidden_dropout initializer_range keys_to_ignore_at_inference max_window_layers
    pad_token_id pretraining_tp torch_dtype transformers_version unk_token_id use_cache auto_map
    tokenizer_class sep_token_id decoder_start_token_id attention_probs_dropout_prob resid_pdrop
    embd_pdrop classifier_dropout router_aux_loss_coef output_router_logits
    bad_words_ids begin_suppress_tokens chunk_size_feed_forward diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder label2id length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder top_k top_p torchscript
    typical_p use_bfloat16 cache_implementation max_sequence_length model_max_length
""".split())


def load_config(folder: Path) -> LlamaConfig:
    """Raises ValueError if `folder` has no `config.json` of a model that `model.py` computes."""
    path = need(folder, "config.json")
    return parse_config(read_json(path), path)


def parse_config(raw: dict, where="config.json") -> LlamaConfig:
    """A parsed `config.json` -> LlamaConfig. ValueError for what `model.py` does not compute."""
    check(raw, LIMITS, where)
    always, otherwise = ARCHITECTURES[architecture(raw)]
    refuse_unsupported(raw, where)
    given = {name: raw[name] for name in COMPUTED if raw.get(name) is not None}
    if (heads := raw.get("num_attention_heads")) and (hidden := raw.get("hidden_size")):
        otherwise = {"num_key_value_heads": heads, "head_dim": hidden // heads} | otherwise
    given = otherwise | given | always
    given.setdefault("o_proj_bias", given.get("attention_bias", False))
    rope = rope_settings(raw, where)
    given["rope_theta"] = float(rope["rope_theta"])
    given["rope_scaling"] = None if rope["rope_type"] in ("default", "dynamic") else rope
    try:
        config = LlamaConfig(**given)
    except TypeError as error:  # names the fields that are missing
        raise ValueError(f"{where}: {str(error).partition(') ')[2]}") from None
    check_heads(config, where)
    return replace(config, max_position_embeddings=positions(config, raw, rope))


def architecture(raw: dict) -> str:
    """ValueError if it is none of those in ARCHITECTURES."""
    names = raw.get("architectures") or [TYPES.get(raw.get("model_type"), raw.get("model_type"))]
    name = names[0] if isinstance(names[0], str) else shown(names[0])
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name} is not supported, only {', '.join(ARCHITECTURES)}")
    return name


def refuse_unsupported(raw: dict, where):
    if method := raw.get("quantization_config"):
        raise ValueError(f"quantised checkpoints ({shown(method.get('quant_method'))}) are not"
                         " supported")
    for name, usual in PLAIN.items():
        if raw.get(name) is not None and raw[name] != usual:
            raise ValueError(f"{where}: {name} {shown(raw[name])} is not supported, only {usual!r}")
    for kind in raw.get("layer_types") or []:
        if kind != "full_attention":
            raise ValueError(f"{where}: layer_types has {shown(kind)}, only 'full_attention' is"
                             " supported")


def check_heads(config: LlamaConfig, where):
    if config.head_dim < 2 or config.head_dim % 2:
        raise ValueError(f"{where}: head_dim is {config.head_dim}, must be even: RoPE turns pairs")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{where}: num_attention_heads {config.num_attention_heads} is not a"
                         f" multiple of num_key_value_heads {config.num_key_value_heads}")


def rope_settings(raw: dict, where) -> dict:
    """`rope_theta`, `rope_type` and the scaling's numbers, from either spelling of the config.

    Newer files gather them in `rope_parameters`; older ones have `rope_theta` at the top level and
    the rest in `rope_scaling`, the oldest with `type` for `rope_type`.
    """
    rope = {"rope_theta": raw.get("rope_theta"), "rope_type": "default"}
    for nested in (raw.get("rope_scaling"), raw.get("rope_parameters")):
        rope |= {name: value for name, value in (nested or {}).items() if value is not None}
    rope["rope_theta"] = 10000.0 if rope["rope_theta"] is None else rope["rope_theta"]
    kind = rope["rope_type"] = rope.pop("type", rope["rope_type"])
    if not isinstance(kind, str) or kind not in ROPE:
        raise ValueError(f"RoPE type {shown(kind)} is not supported, only {', '.join(ROPE)}")
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    check(rope, ROPE_NUMBERS, where)
    for name in ROPE[kind]:
        check({name: rope.get(name, "absent")}, ROPE_NUMBERS, where)
    for name in rope.keys() - ROPE_NUMBERS.keys() - {"rope_type"}:
        if name not in PLAIN or rope[name] != PLAIN[name]:
            raise ValueError(f"{where}: RoPE's {shown(name)} {shown(rope[name])} is not supported")
    if kind == "yarn" and rope["rope_theta"] <= 1:
        raise ValueError(f"{where}: rope_theta is {rope['rope_theta']}, must be above 1")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"{where}: low_freq_factor is not below high_freq_factor")
    return rope


def positions(config: LlamaConfig, raw: dict, rope: dict) -> int:
    """How many positions the model has as `model.py` computes it."""
    most, original = config.max_position_embeddings, rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "yarn":  # some files name those before scaling
        most = max(most, int(original * rope["factor"]))
    if rope["rope_type"] == "dynamic":  # beyond these, cached keys would need another base
        most = min(most, original or most)
    slides = raw.get("use_sliding_window", "Qwen" not in architecture(raw))
    if slides and raw.get("sliding_window"):  # up to its size the window holds all tokens
        most = min(most, raw["sliding_window"])
    return most


def unknown_fields(raw: dict) -> str:
    """What to warn of: the fields that hold a number and are not known here. "" if there are none.

    >>> unknown_fields({"vocab_size": 10, "use_cache": True, "name": "x", "mup_width": 8})
    'mup_width (8)'
    """
    unknown = raw.keys() - LIMITS.keys() - PLAIN.keys() - HARMLESS
    return ", ".join(f"{plain(name)} ({shown(raw[name])})"
                     for name in sorted(unknown) if holds_number(raw[name]))


def holds_number(value) -> bool:
    if isinstance(value, (list, dict)):
        return any(map(holds_number, value.values() if isinstance(value, dict) else value))
    return value is True or isinstance(value, (int, float)) and value is not False
