"""What is compared of a result, with the project's and with those of likely mistakes.

A part has a name, for example "the dtype of the vectors". What is not prescribed is not a part.
"""

import torch

import sentencekv
from cache import NO_ROW, LayerCache
from course.exercises.cases import N_STEPS, STEPS, Case, Draw, sealing_cache, take

CHANGED = "the arguments that your function changed"
ROWS_MOVED = f"the number of rows that move in {N_STEPS} steps"


def observe(name: str, function, case: Case) -> dict:
    """What is compared of a case: name -> tensor, list, number or text. `name` is the function's.
    Raises whatever the function raises."""
    if name == "seal":
        return states_after_seals(function, case.arguments)
    if case.name == STEPS:
        return slots_of_steps(function, case.arguments)
    given = [x.clone() if isinstance(x, torch.Tensor) else x for x in case.arguments]
    parts = COMPARED.get(name, one_tensor)(given, function(*case.arguments))
    changed = [i for i, (before, after) in enumerate(zip(given, case.arguments))
               if isinstance(before, torch.Tensor) and not torch.equal(before, after)]
    return {**parts, CHANGED: changed}


def tensors(result, n: int) -> tuple:
    """The n tensors that a function returned."""
    if (not isinstance(result, (tuple, list)) or len(result) != n
            or not all(isinstance(x, torch.Tensor) for x in result)):
        raise ValueError(f"your function returns {described(result)}, and not {n} tensors")
    return result


def described(result) -> str:
    """Names of types, and not the numbers."""
    if isinstance(result, (tuple, list)):
        return f"a {type(result).__name__} of " + (", ".join(map(described, result)) or "nothing")
    return type(result).__name__


def one_tensor(arguments, result) -> dict:
    if not isinstance(result, torch.Tensor):
        raise ValueError(f"your function returns {described(result)}, and not a tensor")
    return {"the result": result}


def attention(arguments, result) -> dict:
    return {**one_tensor(arguments, result), "the dtype of the result": str(result.dtype)}


def answer(arguments, result) -> dict:
    return {"the answer": result if isinstance(result, bool) else described(result)}


def vectors_and_variances(arguments, result) -> dict:
    vectors, variances = tensors(result, 2)
    return {"the dtype of the vectors": str(vectors.dtype),
            "the dtype of the variances": str(variances.dtype),
            "vectors": vectors, "variances": variances,
            "the number of negative variances": int((variances < 0).sum())}


def slots_after(arguments, result) -> dict:
    """Any order of the loaded rows is right: what is compared does not depend on it."""
    before, _, _, _, selected = arguments
    rows, places, missing = tensors(result, 3)
    shapes = [list(x.shape) for x in (rows, places, missing)]
    if missing.dtype != torch.bool or any(shape != list(before.shape) for shape in shapes):
        return {"the dtype of `missing`": str(missing.dtype), "the three shapes": shapes}
    held, heads = rows < NO_ROW, range(len(rows))
    order = rows.argsort(dim=-1)
    return {
        "the dtype of `missing`": str(missing.dtype),
        "the three shapes": shapes,
        "rows or places have fractions": rows.is_floating_point() or places.is_floating_point(),
        "the rows in slots, sorted": [sorted(rows[h][held[h]].tolist()) for h in heads],
        "the rows to load, sorted": [sorted(rows[h][missing[h]].tolist()) for h in heads],
        "the places of the sorted rows":
            [places[h, order[h]][: held[h].sum()].tolist() for h in heads],
        "the other rows stay in their slots": bool((rows == before)[held & ~missing].all()),
        "places are from 0 to P - 1":
            bool((places >= 0).all() and (places < selected.shape[-1]).all()),
    }


def slots_of_steps(function, arguments) -> dict:
    """How many rows move in a random run, and whether the right ones are in slots."""
    rows, places, starts, resident, lengths = arguments
    scores, moved, right = 0, 0, True
    for step in range(N_STEPS):
        scores = 0.9 * scores + Draw(step).normal(*lengths.shape)  # most of a selection stays
        selected = sentencekv.select_rows(scores, lengths, rows.shape[-1] - step % 3)
        rows, places, missing = tensors(function(rows, places, starts, resident, selected), 3)
        rows, places, resident = rows.int(), places.long(), selected  # dtypes as in the cache
        moved += int(missing.sum())
        wanted = [sorted(start + i for start, n in zip(*head) for i in range(n))
                  for head in zip(starts.tolist(), selected.tolist())]
        right &= wanted == [sorted(line[line < NO_ROW].tolist()) for line in rows]
    return {"the right rows are in slots after each step": right, ROWS_MOVED: moved}


class WatchedLayer(LayerCache):
    """Remembers what a token attends to, and refuses bounds that would read other memory."""

    def decode(self, q, k, v):
        self.read = super().decode(q, k, v)
        return self.read

    def add_sentences(self, keys, bounds, first_row=0, n_all_sinks=0):
        if len(bounds) != len(keys) or bounds.max() > keys.shape[1]:
            raise ValueError(f"`add_sentences` gets bounds {bounds.tolist()}, and keys of the shape"
                             f" {tuple(keys.shape)}")
        super().add_sentences(keys, bounds, first_row, n_all_sinks)


def states_after_seals(function, arguments) -> dict:
    """What all layers hold after each seal, and what they attend to in the end."""
    spans, lengths, settings = arguments
    layer_class = type("Layer", (WatchedLayer,), {"seal": function})
    cache, states = sealing_cache(layer_class, spans, settings), {}
    take(cache, spans[-1][1], "prefill")
    for layer in cache.layers:
        layer.host.reserve(spans[-1][1] + 100)  # more than a seal will, so these rows stay
        layer.host.later.fill_(99)
    for step in range(1, max(lengths) + 3):
        take(cache, 1, "decode")
        if step in lengths:
            scores = [layer.scores for layer in cache.layers]
            cache.seal(lengths[step])
            for i, layer in enumerate(cache.layers):
                state = {"scores are the same tensor": layer.scores is scores[i], **state_of(layer)}
                states |= {f"layer {i} after step {step}, {what}": x for what, x in state.items()}
    for i, layer in enumerate(cache.layers):
        keys, values, mask = layer.read
        states |= {f"layer {i} attends to {what}": x[mask.squeeze(1)]
                   for what, x in (("keys", keys), ("values", values))}
    return states


def state_of(layer: LayerCache) -> dict:
    """Of the places and rows in use."""
    places = slice(layer.plan.n_places)
    table = {name: getattr(layer, name)[:, places].clone()
             for name in ("starts", "ends", "lengths", "vectors", "variances")}
    later = layer.host.later[:60].clone()  # not `read`: it would wait for the copies
    return {"scores": layer.scores.clone(), "later rows on the host": later, **table}


COMPARED = {"attend": attention, "is_end": answer, "sentence_vectors": vectors_and_variances,
            "assign_slots": slots_after}  # else `one_tensor`
