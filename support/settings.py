"""What the settings of the method may be, checked when they are made."""

MAX_COUNT = 2**31  # the largest setting that counts tokens
LEAST = {"sink_tokens": 0, "secondary_sinks": 0, "secondary_ratio": 0, "recent_window": 1,
         "observation_window": 1, "sentence_limit": 1, "keep_factor": 1, "query_decay": 0,
         "reuse_layers": 1}


def check_settings(config, scores) -> None:
    """Raises ValueError, with the value and the limit, for a setting of a SentenceKVConfig that
    cannot work. `scores` are the names that its score may have."""
    for name, least in LEAST.items():
        if not getattr(config, name) >= least:  # `not >=` also refuses NaN
            raise ValueError(f"{name} is {getattr(config, name)}, must be at least {least}")
    for name, kind in config.__annotations__.items():
        if kind is int and getattr(config, name) > MAX_COUNT:
            raise ValueError(f"{name} is {getattr(config, name)}, must be at most {MAX_COUNT}")
    if config.kv_bits not in (8, 16):
        raise ValueError(f"kv_bits is {config.kv_bits}, must be 8 or 16")
    if config.query_decay > 1:
        raise ValueError(f"query_decay is {config.query_decay}, must be at most 1")
    sinks, last = config.sink_tokens + config.secondary_sinks, config.protected_tokens
    if config.token_budget < sinks + last + 1:
        raise ValueError(f"token_budget is {config.token_budget}, must be at least"
                         f" {sinks + last + 1}: {sinks} sinks + {last} last tokens + 1")
    if config.score not in scores:
        raise ValueError(f"score is {config.score!r}, the choices are {', '.join(scores)}")
