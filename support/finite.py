"""Where a model's numbers stop being finite: the layer, found by reading all tokens once more.

So nothing has to be checked while all is well.
"""

import torch


def first_layer_not_finite(model, ids: list[int], cache) -> int | None:
    """The first layer whose output is not finite when the model reads `ids` into an empty cache.
    None if the output of every layer is."""
    finite = []  # of the input of each layer, and of the last one's output

    def note(module, inputs):
        finite.append(bool(inputs[0].isfinite().all()))

    # The states that leave layer i enter the norm of layer i + 1, or the last norm of the model.
    norms = [*(block.input_layernorm for block in model.layers), model.norm]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        model.prefill(torch.tensor(ids, device=model.embed_tokens.weight.device), cache)
    finally:
        for hook in hooks:
            hook.remove()
    after = finite[1:]
    return after.index(False) if False in after else None


def error(model, ids: list[int], new_cache) -> ValueError:
    """The error for the user: which layer it is, and what can be the cause. `ids` are all tokens
    that were read and written, `new_cache` is a class of caches to read them into once more."""
    weight = model.embed_tokens.weight
    cache = new_cache(model.config, len(ids), weight.device, weight.dtype)
    layer = first_layer_not_finite(model, ids, cache)
    where = "after its layers" if layer is None else f"from layer {layer} on"
    dtype = str(weight.dtype).removeprefix("torch.")
    return ValueError(f"the model computes numbers that are not finite {where}: its weights are"
                      f" broken, or --dtype {dtype} is too narrow for them")
