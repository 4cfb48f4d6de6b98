"""The checker of the course: right answers pass, wrong ones fail with a name for the mistake."""

import inspect
import json
import os
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

import cache
from course import check
from course.exercises import stubs, student
from course.exercises.cases import cases
from course.exercises.diagnose import diagnose, found_in, mistaken, right, with_mistake
from course.exercises.mistakes import MISTAKES
from course.exercises.observe import ROWS_MOVED


def text_of(exercise: str, body: str) -> str:
    """A student's file: `body` takes the place of `raise NotImplementedError`."""
    head = stubs.stub(*stubs.EXERCISES[exercise]).rpartition("    raise")[0]
    body = textwrap.indent(textwrap.dedent(body), "    ")
    return f"import math\nimport torch\n{head}{body}\n"


def written(exercise: str, body: str):
    scope = {}
    exec(text_of(exercise, body), scope)
    return scope[exercise[3:]]


def message_of(exercise: str, function, seed: int = 0) -> str:
    found = [found_in(exercise[3:], function, case) for case in cases(exercise[3:], seed)]
    return diagnose(exercise, found, seed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("exercise", stubs.EXERCISES)
def test_the_project_s_function_passes(exercise, seed):
    assert message_of(exercise, stubs.EXERCISES[exercise][0], seed) == ""
    assert all("error" not in parts for parts in right(exercise, seed))


@pytest.mark.parametrize("exercise", stubs.EXERCISES)
def test_likely_mistakes_are_named_in_a_few_lines(exercise):
    assert len(MISTAKES[exercise[3:]]) >= 5
    for number, (_, _, diagnosis) in enumerate(MISTAKES[exercise[3:]]):
        found = [mistaken(exercise, number, 0, i) for i in range(len(cases(exercise[3:])))]
        message = diagnose(exercise, found)
        assert message.splitlines()[1].strip() == diagnosis
        assert len(message.splitlines()) <= 15


def test_arguments_that_can_be_redone_by_hand_are_shown():
    wrong = with_mistake(stubs.EXERCISES["02_attend"][0], "values[None], mask)", "values[None])")
    assert message_of("02_attend", wrong).splitlines() == [
        "with a mask",
        "  you attended to slots that the mask excludes",
        "  q = [[[200, 0]], [[0, 200]], [[-200, -200]], [[0, 200]]]",
        "  keys = [[[1, 0], [0, 1], [0, 0]], [[0, 1], [1, 0], [0, 0]]]",
        "  values = [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]]",
        "  mask = [[[False, True, True]], [[True, False, False]]]",
        "  the result: at [0, 0] it is 1 and should be 4",
    ]


RIGHT = [  # the exercise, and another way to write it
    ("02_attend", """
        group, out = len(q) // len(keys), []
        for head in range(len(q)):
            logits = keys[head // group].to(q.dtype) @ q[head, 0] / self.head_dim**0.5
            if mask is not None:
                logits[~mask[head // group, 0]] = float("-inf")
            out.append(logits.softmax(0) @ values[head // group].to(q.dtype))
        return torch.cat(out).unsqueeze(0)"""),
    ("02_attend", """
        group = self.n_heads // self.n_kv_heads
        keys, values = (x.repeat_interleave(group, dim=0).to(q.dtype) for x in (keys, values))
        logits = torch.einsum("hqd,hnd->hqn", q, keys) / math.sqrt(self.head_dim)
        if mask is not None:
            logits = logits.where(mask.repeat_interleave(group, dim=0), -torch.inf)
        return torch.einsum("hqn,hnd->qhd", logits.softmax(-1), values).flatten(1)"""),
    ("03_is_end", """
        item = starts_item(before, after)
        line = ends_line(before, gap, after)
        wide = WIDE_END.match(before) is not None and GOES_ON.match(after) is None
        if item or line or wide:
            return True
        if MARK_END.match(before) is None:
            return False
        if one_holds(INSIDE, before, after):
            return False
        begins = OPENING.match(after) is not None
        if one_holds(ABBREVIATED, before, after):
            return begins and not after[0].islower()
        return bool(begins or not after[0].islower() or before.endswith(("?", ";")))"""),
    ("04_sentence_bounds", """
        result = []
        for line in marked.tolist():
            bounds = [line.count(-1)]
            start = 0
            for end in ends.tolist():
                n = sum(start <= position < end for position in line)
                if n > 0:
                    bounds.append(bounds[-1] + n)
                start = end
            result.append(bounds + [len(line)] * (len(ends) + 1 - len(bounds)))
        return torch.tensor(result)"""),
    ("04_sentence_bounds", """
        first = (marked < 0).sum(dim=-1, keepdim=True)
        bounds = (marked.unsqueeze(-1) < ends).sum(dim=1)
        before = torch.cat((first, bounds[:, :-1]), dim=-1)
        bounds[bounds == before] = marked.shape[-1]
        return torch.cat((first, bounds.sort(dim=-1).values), dim=-1).int()"""),
    ("05_sentence_vectors", """
        heads, n_sentences = len(keys), bounds.shape[1] - 1
        vectors = torch.zeros(heads, n_sentences, keys.shape[-1], dtype=keys.dtype)
        variances = torch.zeros(heads, n_sentences)
        for head in range(heads):
            for s in range(n_sentences):
                rows = keys[head, bounds[head, s] : bounds[head, s + 1]].float()
                if len(rows):
                    vectors[head, s] = rows.mean(dim=0)
                    variances[head, s] = ((rows - rows.mean(dim=0)) ** 2).mean()
        return vectors, variances"""),
    ("05_sentence_vectors", """
        row = torch.arange(keys.shape[1])
        inside = (row >= bounds[:, :-1, None]) & (row < bounds[:, 1:, None])  # (H_kv, S, N)
        n = inside.sum(dim=-1, keepdim=True).clamp(min=1)
        means = inside.float() @ keys.float() / n
        squares = inside.float() @ keys.float().square() / n
        return means.to(keys.dtype), torch.relu((squares - means.square()).mean(dim=-1))"""),
    ("06_mean_query", "return torch.einsum('hgd,hsd->hs', q, vectors) / q.shape[1]"),
    ("06_mean_query", """
        scores = torch.zeros(vectors.shape[:2])
        for head in range(len(q)):
            for s in range(vectors.shape[1]):
                scores[head, s] = q[head].float().mean(dim=0) @ vectors[head, s].float()
        return scores"""),
    ("06_gaussian", """
        q, vectors, dim = q.float(), vectors.float(), q.shape[-1]
        scores = torch.zeros(lengths.shape)
        for head in range(len(q)):
            full = lengths[head] > 0
            for query in q[head]:
                x = vectors[head, full] @ query / math.sqrt(dim)
                x = x + query @ query * variances[head, full] / (2 * dim)
                weights = (x - x.max()).exp()
                scores[head, full] += weights / (weights * lengths[head, full]).sum()
        return scores"""),
    ("06_gaussian", """
        exponents = torch.einsum("hgd,hsd->hgs", q, vectors).float() / math.sqrt(q.shape[-1])
        lengths_of_q = q.float().norm(dim=-1, keepdim=True)
        exponents += lengths_of_q**2 * variances[:, None] / 2 / q.shape[-1]
        exponents = exponents.masked_fill(lengths[:, None] == 0, -math.inf)
        total = (exponents + lengths[:, None].log()).logsumexp(-1, keepdim=True)
        return (exponents - total).exp().sum(dim=1)"""),
    ("07_token_importance", """
        heads, window, dim = q.shape
        group, n = heads // len(k), k.shape[1] - window
        received = torch.zeros(len(k), n)
        for head in range(heads):
            for i in range(window):
                logits = k[head // group, : n + i + 1] @ q[head, i] / math.sqrt(dim)
                received[head // group] += logits.softmax(0)[:n] / group
        return torch.stack([received[:, max(0, i - pool // 2) : i + pool // 2 + 1].amax(dim=1)
                            for i in range(n)], dim=1)"""),
    ("07_token_importance", """
        (n_kv, tokens, dim), window = k.shape, q.shape[1]
        k = k.repeat_interleave(len(q) // n_kv, dim=0)
        logits = torch.einsum("hwd,htd->hwt", q / dim**0.5, k)
        logits += torch.full((window, tokens), -math.inf).triu(tokens - window + 1)
        received = logits.softmax(-1)[..., :-window].sum(dim=1).view(n_kv, -1, tokens - window)
        return F.max_pool1d(received.mean(dim=1), pool, 1, pool // 2)"""),
    ("07_select_rows", """
        selected = torch.zeros_like(available)
        for head in range(len(scores)):
            left = int(budget)
            for s in sorted(range(scores.shape[1]), key=lambda s: -scores[head, s]):
                selected[head, s] = min(left, int(available[head, s]))
                left -= int(selected[head, s])
        return selected"""),
    ("07_select_rows", """
        order = scores.argsort(dim=-1, descending=True)
        counts = available.gather(-1, order)
        before = counts.cumsum(dim=-1) - counts
        taken = (budget - before).clamp(min=0).minimum(counts)
        return taken.gather(-1, order.argsort(dim=-1)).long()"""),
    ("08_assign_slots", """
        rows, places, missing = rows.clone(), places.clone(), torch.zeros_like(rows).bool()
        for head in range(len(rows)):
            waiting = [(int(starts[head, s]) + i, s) for s in range(selected.shape[1])
                       for i in range(int(n_resident[head, s]), int(selected[head, s]))]
            for slot in range(rows.shape[1]):
                place = places[head, slot]
                if rows[head, slot] < starts[head, place] + selected[head, place]:
                    continue
                rows[head, slot] = NO_ROW
                if waiting:
                    rows[head, slot], places[head, slot] = waiting.pop(0)
                    missing[head, slot] = True
        return rows, places, missing"""),
    ("08_assign_slots", """
        rows, places, missing = rows.long(), places.clone(), torch.zeros(rows.shape).bool()
        for head in range(len(rows)):
            wanted = {start + i: s for s, (start, n) in enumerate(
                zip(starts[head].tolist(), selected[head].tolist())) for i in range(n)}
            stays = torch.tensor([row in wanted for row in rows[head].tolist()])
            rows[head, ~stays], places[head, ~stays] = NO_ROW, 0
            for row in sorted(wanted.keys() - set(rows[head].tolist()), reverse=True):
                slot = (rows[head] == NO_ROW).nonzero()[-1]
                rows[head, slot], places[head, slot], missing[head, slot] = row, wanted[row], True
        return rows, places, missing"""),
    ("09_seal", """
        first = self.plan.open_row
        slots = [int(self.plan.slots_of(row, row + 1)) for row in range(first, first + length)]
        rows = torch.stack([self.slots[:, slot] for slot in slots], dim=1)
        for i in range(length):
            self.offload(first + i, rows[:, i : i + 1])
        self.scores[:] = 0
        self.add_sentences(rows[:, :, 0], torch.tensor([[0, length]] * len(rows)), first)"""),
    ("09_seal", """
        begin, end = self.plan.open_row, self.plan.open_row + length
        keys, values = self.slots[:, self.plan.slots_of(begin, end)].unbind(dim=2)
        bounds = torch.zeros(len(keys), 2, dtype=torch.long)
        bounds[:, 1] = length
        self.scores.fill_(0)
        self.offload(begin, torch.stack((keys, values), dim=2))
        self.add_sentences(keys, bounds, first_row=begin)"""),
]


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("exercise, body", RIGHT)
def test_a_right_answer_passes_however_it_is_written(exercise, body, seed):
    assert message_of(exercise, written(exercise, body), seed) == ""


LOOPS = {exercise: body for exercise, body in reversed(RIGHT)}  # the first of each
WRONG = [  # the exercise, a change to the first right answer above or another one, a word for it
    # What passed once.
    ("05_sentence_vectors", ("].float()", "]"), "compute in float32"),
    ("05_sentence_vectors", (", dtype=keys.dtype", ""), "dtype of the vectors"),
    ("05_sentence_vectors", ("zeros(heads, n_sentences)", "zeros_like(vectors[..., 0])"),
     "dtype of the variances"),
    ("05_sentence_vectors", ("((rows - rows.mean(dim=0)) ** 2).mean()",
                             "(rows**2).mean() - (rows.mean(dim=0) ** 2).mean()"), "negative"),
    ("06_gaussian", ("(x - x.max()).exp()", "x.exp()"), "exp of hundreds"),
    ("06_gaussian", """
        x = q @ vectors.mT / math.sqrt(q.shape[-1])
        x = x + (q * q).sum(-1, keepdim=True) * variances.unsqueeze(1) / 2 / q.shape[-1]
        weights = (x - x.amax(-1, keepdim=True)).exp() * lengths.unsqueeze(1)
        shares = weights / weights.sum(-1, keepdim=True)
        return shares.sum(1) / lengths.clamp(min=1)""", "low exponents"),
    ("08_assign_slots", ("rows[head, slot] = NO_ROW",
                         "rows[head, slot], places[head, slot] = NO_ROW, -1"), "from 0 to P - 1"),
    ("07_select_rows", ("zeros_like(available)", "zeros(available.shape)"), "whole numbers"),
    ("03_is_end", ('(("?", ";"))', '("?")'), "Greek"),
    # Lesson 2
    ("02_attend", ("logits[~mask[head // group, 0]] =", "logits[mask[head // group, 0]] ="),
     "excludes what it should include"),
    ("02_attend", ("mask[head // group, 0]", "mask[0, 0]"), "mask of its own"),
    ("02_attend", ("keys[head // group]", "keys[head % len(keys)]"), "without a mask"),
    ("02_attend", ("head // group", "head % len(keys)"), "every H_kv-th head"),
    ("02_attend", ("self.head_dim**0.5", "len(keys[0]) ** 0.5"), "weights 3/4"),
    ("02_attend", ('float("-inf")', "0"), "-inf before the softmax"),
    ("02_attend", ("torch.cat(out).unsqueeze(0)", "torch.stack(out)"), "shape"),
    ("02_attend", ("softmax(0)", "sigmoid()"), "without a mask"),
    ("02_attend", (".to(q.dtype) @", " @"), "dtype"),
    ("02_attend", ("logits.softmax(0)", "(logits.exp() / logits.exp().sum())"), "exp of hundreds"),
    ("02_attend", """
        grouped = q.view(len(keys), -1, self.head_dim).to(keys.dtype)
        logits = grouped @ keys.mT / self.head_dim**0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        return (logits.softmax(1) @ values).view(1, -1).to(q.dtype)""", "over keys"),
    ("02_attend", """
        keys, values = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (keys, values))
        logits = q.to(keys.dtype) @ keys.mT / self.head_dim**0.5
        if mask is not None:
            logits[~mask.repeat_interleave(len(q) // len(mask), dim=0)] = -math.inf
        return (logits.softmax(1) @ values).view(1, -1).to(q.dtype)""", "over keys"),
    # Lesson 3
    ("03_is_end", (" and GOES_ON.match(after) is None", ""), "GOES_ON"),
    ("03_is_end", ("item or line or wide", "item or wide"), "line end"),
    ("03_is_end", ("return bool(", "("), "NoneType"),
    ("03_is_end", ("return begins and not after[0].islower()", "return not after[0].islower()"),
     "abbreviation"),
    ("03_is_end", ("begins or not after[0].islower()", "after[0].isupper()"), "between"),
    ("03_is_end", ("if one_holds(INSIDE, before, after):\n    return False", "pass"), "INSIDE"),
    ("03_is_end", """
        if starts_item(before, after) or ends_line(before, gap, after):
            return True
        if WIDE_END.match(before) and not GOES_ON.match(after):
            return True
        if not MARK_END.match(before):
            return False
        small, opens = after[0].islower(), OPENING.match(after) is not None
        if one_holds(ABBREVIATED, before, after):
            return opens and not small
        if one_holds(INSIDE, before, after):
            return False
        return opens or not small or before[-1] in "?;"
     """, "ask INSIDE before"),
    # Lesson 4
    ("04_sentence_bounds", ("start <= position < end", "start < position <= end"), "no rows"),
    ("04_sentence_bounds", ("line.count(-1)", "0"), "-1"),
    ("04_sentence_bounds", ("line.count(-1)", "marked[0].tolist().count(-1)"), "of head 0"),
    ("04_sentence_bounds", """
        first = (marked[:1] < 0).sum(dim=-1, keepdim=True).expand(len(marked), 1)
        bounds = (marked.unsqueeze(-1) < ends).sum(dim=1)
        before = torch.cat((first, bounds[:, :-1]), dim=-1)
        bounds[bounds == before] = marked.shape[-1]
        return torch.cat((first, bounds.sort(dim=-1).values), dim=-1).int()""", "of head 0"),
    ("04_sentence_bounds", ("if n > 0:", "if True:"), "end"),
    ("04_sentence_bounds", ("[len(line)]", "[ends[-1].item()]"), "N, a number of rows"),
    ("04_sentence_bounds", (" + [len(line)] * (len(ends) + 1 - len(bounds))", ""), ""),
    ("04_sentence_bounds", ("torch.tensor(result)", "torch.tensor(result).float()"), "whole"),
    ("04_sentence_bounds", ("marked.tolist()", "marked[:1].tolist() * len(marked)"), "one head"),
    # Lesson 5
    ("05_sentence_vectors", ("bounds[head, s + 1]]", "bounds[head, s + 1] + 1]"), "two sentences"),
    ("05_sentence_vectors", ("bounds[head, s] : bounds[head,", "bounds[0, s] : bounds[0,"),
     "of head 0"),
    ("05_sentence_vectors", ("((rows - rows.mean(dim=0)) ** 2).mean()",
                             "rows.var(dim=0).mean()"), "n - 1"),
    ("05_sentence_vectors", ("((rows - rows.mean(dim=0)) ** 2).mean()",
                             "rows.std(dim=0, correction=0).mean()"), "variances"),
    ("05_sentence_vectors", ("((rows - rows.mean(dim=0)) ** 2).mean()",
                             "rows.var(correction=0)"), "each channel"),
    ("05_sentence_vectors", ("((rows - rows.mean(dim=0)) ** 2).mean()",
                             "rows.var(dim=0, correction=0).sum()"), "summed the variance"),
    ("05_sentence_vectors", ("if len(rows):", "if True:"), "NaN"),
    ("05_sentence_vectors", ("rows = keys", "keys *= 2\n        rows = keys"), "vectors"),
    ("05_sentence_vectors", ("return vectors, variances", "keys.zero_()\n"
                             "return vectors, variances"), "changed the argument keys"),
    ("05_sentence_vectors", ("return vectors, variances", "return vectors"), "2 tensors"),
    # Lesson 6
    ("06_mean_query", "return (q @ vectors.mT).mean(1) / math.sqrt(q.shape[-1])", "root of D"),
    ("06_mean_query", "return (q @ vectors.mT).amax(1)", "maximum"),
    ("06_mean_query", "return (q @ vectors.mT).softmax(-1).mean(1)", "keys of no variance"),
    ("06_mean_query", "return (q.mean(1) @ vectors.mT).squeeze()", ""),
    ("06_mean_query", "return (q @ vectors.mT).mean(1) / lengths", "lengths"),
    ("06_gaussian", (" / (2 * dim)", " / dim"), "half"),
    ("06_gaussian", (" / (2 * dim)", " / 2"), "divide by D"),
    ("06_gaussian", (" / (2 * dim)", " / (2 * math.sqrt(dim))"), "by the root of D"),
    ("06_gaussian", ("variances[head, full]", "variances[head, full].sqrt()"), "no root"),
    ("06_gaussian", ("(weights * lengths[head, full]).sum()", "weights.sum()"), "ln n"),
    ("06_gaussian", ("scores[head, full] += weights", "scores[head, full] += weights *"
                     " lengths[head, full]"), "divide by the sentence's length"),
    ("06_gaussian", ("lengths[head] > 0", "lengths[head] >= 0"), "empty"),
    ("06_gaussian", ("scores[head, full] +=", "scores[head, full] ="), "two query heads"),
    ("06_gaussian", (" / math.sqrt(dim)", ""), "m is q · µ / √D"),
    ("06_gaussian", ("query @ query", "(query * query).mean()"), "D twice"),
    ("06_gaussian", ("query @ query", "query.norm()"), "not |q|"),
    ("06_gaussian", ("query @ query * variances[head, full] / (2 * dim)",
                     "(query / math.sqrt(dim)).norm() * variances[head, full] / 2"), "not |q|"),
    ("06_gaussian", ("weights / (weights * lengths[head, full]).sum()", "x.exp()"), "exp alone"),
    ("06_gaussian", ("(x - x.max()).exp()\n        scores[head, full] +="
                     " weights / (weights * lengths[head, full]).sum()",
                     "x + lengths[head, full]\n        scores[head, full] +="
                     " weights.softmax(0) / lengths[head, full]"), "add ln n"),
    ("06_gaussian", """
        x = q @ vectors.mT / math.sqrt(q.shape[-1])
        x = x + (q * q).sum(-1, keepdim=True) * variances.unsqueeze(1) / 2 / q.shape[-1]
        return (x + lengths.unsqueeze(1)).softmax(-1).sum(1) / lengths.clamp(min=1)""",
     "you added n"),
    ("06_gaussian", """
        x = q @ vectors.mT / math.sqrt(q.shape[-1])
        x = x + (q * q).sum(-1, keepdim=True) * variances.unsqueeze(1) / 2 / q.shape[-1]
        return (x + lengths.log().unsqueeze(1)).exp().sum(1) / lengths.clamp(min=1)""",
     "exp alone"),
    ("06_gaussian", """
        x = q @ vectors.mT / math.sqrt(q.shape[-1])
        x = x + (q * q).sum(-1, keepdim=True) * variances.unsqueeze(1) / 2 / q.shape[-1]
        shares = (x + lengths.log().unsqueeze(1)).softmax(-1)
        return shares.amax(1) / lengths.clamp(min=1)""", "sum over the query heads"),
    # Lesson 7
    ("07_token_importance", (" / group", ""), "mean over the group"),
    ("07_token_importance", (": n + i + 1]", ": n + i]"), "own token"),
    ("07_token_importance", (": n + i + 1]", ": n + i + 2]"), "after it"),
    ("07_token_importance", (": n + i + 1]", ":]"), "after them"),
    ("07_token_importance", (": n + i + 1]", ": n]"), "window"),
    ("07_token_importance", (" / math.sqrt(dim)", ""), "root of D"),
    ("07_token_importance", ("head // group", "head % len(k)"), "KV head"),
    ("07_token_importance", ("i + pool // 2 + 1]", "i + pool // 2]"), "no pooling"),
    ("07_token_importance", (".amax(dim=1)", ".mean(dim=1)"), "maximum"),
    ("07_token_importance", ("range(window)", "[window - 1]"), "not only the last"),
    ("07_token_importance", ("k[head // group,", "k[head % len(k),"), "every H_kv-th head"),
    ("07_token_importance", """
        (n_kv, tokens, dim), window = k.shape, q.shape[1]
        k = k.repeat_interleave(len(q) // n_kv, dim=0)
        logits = q @ k.mT / dim**0.5
        logits += torch.full((window, tokens), -math.inf).triu(tokens - window + 1)
        received = logits.softmax(-1)[..., :-window].sum(dim=1)
        pooled = F.max_pool1d(received, pool, 1, pool // 2)
        return pooled.view(n_kv, -1, tokens - window).mean(dim=1)""", "over the group first"),
    ("07_token_importance", """
        (n_kv, tokens, dim), window = k.shape, q.shape[1]
        k = k.repeat_interleave(len(q) // n_kv, dim=0)
        future = torch.arange(tokens) > torch.arange(window).unsqueeze(-1)
        logits = (q @ k.mT / dim**0.5).masked_fill(future, -math.inf)
        received = logits.softmax(-1)[..., :-window].sum(dim=1).view(n_kv, -1, tokens - window)
        return F.max_pool1d(received.mean(dim=1), pool, 1, pool // 2)""", "last tokens"),
    # Lesson 7
    ("07_select_rows", ("-scores[head, s]", "-scores[head, s] * available[head, s]"), "multiply"),
    ("07_select_rows", ("-scores[head, s]", "scores[head, s]"), "highest"),
    ("07_select_rows", """
        best = scores.topk(min(max_sentences, scores.shape[-1]), dim=-1).indices
        counts = available.gather(-1, best)
        taken = (budget - counts.cumsum(-1) + counts).clamp(min=0).minimum(counts)
        return torch.zeros_like(available).scatter_(-1, best, taken.int())""", "without rows"),
    ("07_select_rows", ("for head in range(len(scores)):\n    left = int(budget)",
                        "left = int(budget)\nfor head in range(len(scores)):"), "each head"),
    ("07_select_rows", ("min(left, int(available[head, s]))",
                        "int(available[head, s]) if available[head, s] <= left else 0"), "budget"),
    ("07_select_rows", ("int(budget)", "int(budget) - 1"), "one row less"),
    ("07_select_rows", ("int(budget)", "int(budget) + 1"), "one row more"),
    ("07_select_rows", ("-scores[head, s]", "-scores[0, s]"), "of head 0"),
    ("07_select_rows", ("int(budget)", "budget"), "`-=` changes a tensor in place"),
    ("07_select_rows", ("int(budget)", "budget.item()"), "AttributeError"),
    ("07_select_rows", ("return selected", "scores.zero_()\nreturn selected"),
     "changed the argument scores"),
    ("07_select_rows", """
        order = scores.argsort(descending=True)
        counts = available.gather(1, order)
        left = budget - (counts.cumsum(1) - counts)
        return counts.minimum(left.clamp(min=0)).gather(1, order)""", "gather"),
    # Lesson 8
    ("08_assign_slots", ("range(int(n_resident[head, s]), int(selected[head, s]))",
                         "range(int(selected[head, s]))"), "load those after them"),
    ("08_assign_slots", ("range(int(n_resident[head, s]), int(selected[head, s]))",
                         "range(int(selected[head, s] - n_resident[head, s]))"), "after them"),
    ("08_assign_slots", ("] < starts", "] <= starts"), "off by one"),
    ("08_assign_slots", ("rows.clone(), places.clone()", "rows, places"),
     "changed the argument rows"),
    ("08_assign_slots", (".bool()", ""), "torch.bool"),
    ("08_assign_slots", ("rows[head, slot] = NO_ROW", "missing[head, slot] = True"), "empty"),
    ("08_assign_slots", ("rows[head, slot] = NO_ROW", "pass"), "empty"),
    ("08_assign_slots", ("rows[head, slot] = NO_ROW", "rows[head, slot] = -1"), "and not -1"),
    ("08_assign_slots", ("return rows", "order = rows.argsort(-1)\nreturn rows.gather(1, order)"
                         ", places.gather(1, order), missing.gather(1, order)\nreturn rows"),
     "stay"),
    ("08_assign_slots", "return torch.where(rows < NO_ROW, rows, 0), places, rows == 0", "rows"),
    # Lesson 9
    ("09_seal", ("self.scores[:] = 0", "self.scores = self.scores * 0"), "in place"),
    ("09_seal", ("self.scores[:] = 0", "self.scores[:, -1] = 0"), "scores"),
    ("09_seal", ("[[0, length]] * len(rows)", "[[0, length]]"), "bounds"),
    ("09_seal", ("[[0, length]] * len(rows)", "[[first, first + length]] * len(rows)"), "0 and"),
    ("09_seal", ("rows[:, :, 0], ", "rows[:, :, 1], "), "keys"),
    ("09_seal", ("self.plan.slots_of(row, row + 1)", "self.plan.n_row_slots + row - first"), ""),
    ("09_seal", ("range(length)", "range(length - 1)"), "host"),
    ("09_seal", ("rows[:, :, 0], torch", "rows[:, :, 0].clone() * 0, torch"), "vectors"),
    ("09_seal", ("first + i, rows", "i, rows"), "host"),
    ("09_seal", ("first + i, rows", "self.plan.n_rows - length + i, rows"), "row to write"),
    ("09_seal", ("self.scores[:] = 0", "self.scores[:] = 0\nself.plan.n_places += 1"), ""),
    ("09_seal", ("self.scores[:] = 0", "self.scores[:] = 0\nself.plan.open_row += length"),
     "open_row"),
    ("09_seal", ("first = self.plan.open_row", "first = self.plan.window_start()"), ""),
]


@pytest.mark.parametrize("exercise, wrong, word", WRONG)
def test_a_wrong_answer_fails_and_its_message_helps(exercise, wrong, word):
    body = wrong
    if isinstance(wrong, tuple):
        old, new = wrong
        body = textwrap.dedent(LOOPS[exercise])
        assert old in body, old
        body = body.replace(old, new)
    message = message_of(exercise, written(exercise, body))
    assert message and word in message, message
    assert len(message.splitlines()) <= 15


def test_a_cache_that_does_not_wait_for_its_copies_is_seen(monkeypatch):
    forgets = with_mistake(cache.SentenceKVCache.seal, "self.copies.wait()", "None")
    monkeypatch.setattr(cache.SentenceKVCache, "seal", forgets)
    assert "later rows on the host" in message_of("09_seal", cache.LayerCache.seal)


def test_rows_that_move_are_counted():
    (i,) = (i for i, parts in enumerate(right("08_assign_slots", 0)) if ROWS_MOVED in parts)
    least = right("08_assign_slots", 0)[i][ROWS_MOVED]
    all_move = mistaken("08_assign_slots", 0, 0, i)[ROWS_MOVED]
    assert 100 < least < all_move / 3


# The command
@pytest.fixture
def mine(tmp_path):
    """A folder with right answers to everything."""
    for exercise, body in LOOPS.items():
        (tmp_path / f"{exercise}.py").write_text(text_of(exercise, body), encoding="utf-8")
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """Imports take seconds: cases run here, and the project's own tests do not run."""
    def run(kind, folder, exercise, seed, seconds):
        lines = []
        student.run_cases(folder, exercise, seed, lambda line: lines.append(json.dumps(line)))
        return 0, [json.loads(line) for line in lines]

    monkeypatch.setattr(check, "run", run)


def graded(folder, capsys, *options) -> tuple:
    """Exit status, and exercise -> result."""
    status = check.main(["all", "--json", "--quick", "--folder", str(folder), *options])
    results = map(json.loads, capsys.readouterr().out.splitlines())
    return status, {result["name"]: result for result in results}


def test_a_grader_gets_a_line_for_each_exercise(mine, in_this_process, capsys):
    status, results = graded(mine, capsys, "--seed", "3")
    assert status == 0 and list(results) == list(stubs.EXERCISES)
    for result in results.values():
        assert list(result) == ["name", "status", "message", "seconds"]
        assert result["status"] == "right" and result["seconds"] >= 0
    assert "rows move in 50 steps" in results["08_assign_slots"]["message"]


@pytest.mark.parametrize("text, status, word", [
    ("from sentencekv import select_rows", "imported", "yourself"),
    ("import sentencekv\nselect_rows = sentencekv.select_rows", "imported", ""),
    ("import sentencekv as s\ndef select_rows(*a): return getattr(s, 'select' + '_rows')(*a)",
     "imported", ""),
    ("import importlib\nm = importlib.import_module('sentencekv')\n"
     "def select_rows(*a):\n    try:\n        return m.select_rows(*a)\n"
     "    except Exception:\n        return None", "imported", ""),
    ("from importlib.util import *\ns = spec_from_file_location('x', 'sentencekv.py')\n"
     "m = module_from_spec(s)\nimport sys\nsys.modules['x'] = m\ns.loader.exec_module(m)\n"
     "select_rows = m.select_rows", "imported", ""),
    ("import sys, sentencekv\ndef select_rows(*a):\n    sys.setprofile(None)\n"
     "    return sentencekv.select_rows(*a)", "imported", ""),
    (None, "missing", "07_select_rows.py"),
    ("import nothing_like_this", "error", "ModuleNotFoundError"),
    ("def select_rows(:", "error", "SyntaxError"),
    ("exit(0)", "error", "SystemExit"),
    ("def other(): pass", "error", "does not define select_rows"),
    ("def select_rows(*_): raise NotImplementedError", "not written", ""),
    ("def select_rows(*_): return [1 / 0]", "wrong", "by zero, at line 1 of 07_select_rows.py"),
    ("def select_rows(*_): exit(0)", "wrong", "SystemExit"),
    ("def select_rows(*_): pass", "wrong", "returns NoneType"),
])
def test_one_exercise_that_is_not_right_fails(mine, in_this_process, capsys, monkeypatch, text,
                                              status, word):
    monkeypatch.chdir(ROOT)
    others = [name for name in stubs.EXERCISES if name[:2] == "07"]
    monkeypatch.setattr(stubs, "EXERCISES", {name: stubs.EXERCISES[name] for name in others})
    file = mine / "07_select_rows.py"
    file.unlink()
    if text is not None:
        file.write_text(text)
    code, results = graded(mine, capsys)
    assert code == 1 and results["07_token_importance"]["status"] == "right"
    assert results["07_select_rows"]["status"] == status
    assert word in results["07_select_rows"]["message"]


def test_the_project_s_text_in_a_student_s_file_is_mentioned(mine, in_this_process, capsys):
    solution, imports = stubs.EXERCISES["07_token_importance"]
    text = inspect.getsource(solution)
    (mine / "07_token_importance.py").write_text(f"{imports}\n\n\n{text}")
    _, results = graded(mine, capsys)
    assert results["07_token_importance"]["status"] == "right"
    assert "the project's" in results["07_token_importance"]["message"]


def test_a_student_s_endless_loop_is_ended(mine, capsys):
    (mine / "02_attend.py").write_text("while True: pass")
    assert check.main(["2", "--quick", "--limit", "0.5", "--folder", str(mine)]) == 1
    assert "02_attend: too slow: no result of the case: without a mask, 0.5" in (
        capsys.readouterr().out)


@pytest.mark.slow
def test_a_process_that_ends_itself_is_an_error(mine, capsys):
    (mine / "02_attend.py").write_text(
        "import os\ndef attend(self, *qkv):\n    print('hello')\n    os._exit(0)")
    assert check.main(["2", "--json", "--quick", "--folder", str(mine)]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "error" and "ended with status 0" in result["message"]


@pytest.mark.parametrize("arguments, message", [
    (["1"], "course.check: lesson 1 has no exercise, these have: 2, 3, 4, 5, 6, 7, 8, 9, and all"),
    (["all", "--folder", "nowhere"], "course.check: there is no folder nowhere"),
    (["2", "--limit", "0"], "course.check: limit is 0, must be above 0"),
    (["2", "--limit", "nan"], "course.check: limit is nan, must be above 0"),
    (["2", "--seed", "-1"], "course.check: seed is -1, must be from 0"),
])
def test_a_wrong_command_is_said_in_one_line(capsys, arguments, message):
    assert check.main(arguments) == 2
    done = capsys.readouterr()
    assert done.err.startswith(message) and done.err.count("\n") == 1 and not done.out


@pytest.mark.parametrize("statuses, asked, status", [
    (["right", "right"], True, 0),
    (["right", "not written"], True, 1),
    (["right", "wrong"], False, 1),
    (["not written", "not written"], False, 1),
])
def test_the_question_is_asked_if_nothing_is_wrong(monkeypatch, statuses, asked, status):
    results, questions = iter(statuses), []
    monkeypatch.setattr(check, "judge", lambda name, *_: check.Result(name, next(results), "", 0))
    monkeypatch.setattr(check, "ask", lambda *question: questions.append(question) or True)
    assert check.main(["7"]) == status and bool(questions) == asked


# The project's own tests
def own_tests(exercises: list, folder) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "course.exercises.student", "tests", str(folder), *exercises],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_right_answers_in_other_words_pass_the_project_s_own_tests(mine):
    for exercise, body in RIGHT:  # the last of each: loops take long
        (mine / f"{exercise}.py").write_text(text_of(exercise, body), encoding="utf-8")
    done = own_tests(list(stubs.EXERCISES), mine)
    assert json.loads(done.stdout) == {"failed": ""}, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("exercise", stubs.EXERCISES)
def test_the_project_s_own_tests_run_with_the_student_s_function(mine, exercise):
    (solution, imports), (old, new, _) = stubs.EXERCISES[exercise], MISTAKES[exercise[3:]][0]
    wrong = textwrap.dedent(inspect.getsource(solution)).replace(old, new)
    (mine / f"{exercise}.py").write_text(f"{imports}\n\n\n{wrong}")
    done = own_tests([exercise], mine)
    assert "test_" in json.loads(done.stdout)["failed"], done.stdout + done.stderr
