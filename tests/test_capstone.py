"""The capstone: its solution computes what the oracle computes, and mistakes are named."""

import doctest
import json
import re

import pytest
import torch
from conftest import ROOT, TINY, random_ids, random_llama, random_spans
from slow_cache import SlowSentenceKV

from course import capstone
from course.capstone import RUNS, SMALL
from course.exercises import stubs
from course.exercises.solutions.my_cache import Cache
from sentencekv import SentenceKVConfig

PAGE = ROOT / "course" / "capstone.md"
SOLUTION = ROOT / "course" / "exercises" / "solutions" / "my_cache.py"


@pytest.mark.parametrize("n_prompt, settings", [
    (1, {}), (3, dict(keep_factor=1)), (40, dict(secondary_ratio=0.8)), (150, dict(keep_factor=1)),
    (150, dict(keep_factor=2.5, score="mean_query")), (150, dict(token_budget=1024)),
    (150, dict(sink_tokens=0, recent_window=1, observation_window=16, keep_factor=1)),
    (150, dict(query_decay=0.0, recent_window=20)),
])
def test_the_solution_computes_what_the_oracle_computes(n_prompt, settings):
    """Each in a model of its own, so that a difference in one layer would change the next one."""
    config, model = SentenceKVConfig(**SMALL | settings), random_llama().double()
    ids, length = random_ids(n_prompt + 40, "cpu"), 9
    caches = Cache(config, TINY, "cpu", torch.float64), SlowSentenceKV(config, TINY)
    for cache in caches:
        cache.expect(random_spans(n_prompt))
    states = [model.prefill(ids[:n_prompt], cache)[-1] for cache in caches]
    torch.testing.assert_close(*states)
    for i in range(40):
        if i % 10 == 9:
            for cache in caches:
                cache.seal(length)
        states = [model.decode(ids[n_prompt + i :][:1], cache)[0] for cache in caches]
        torch.testing.assert_close(*states, rtol=0, atol=1e-5)


@pytest.fixture
def slow_caches(monkeypatch) -> list:
    """The oracle's caches of all runs of a check."""
    made, plain = [], capstone.watched

    def watched(*given):
        made.append(plain(*given))
        return made[-1]

    monkeypatch.setattr(capstone, "watched", watched)
    return made


def test_the_solution_is_right_and_the_runs_have_what_is_difficult(slow_caches):
    args = capstone.parse([str(SOLUTION)])
    assert capstone.judge("it", Cache, args).status == "right"
    caches = [slow for slow, _ in slow_caches]
    heads = [head for cache in caches for head in cache.heads.values()]
    assert len(caches) == len(RUNS)
    assert any(head.secondary for head in heads) and any(not head.secondary for head in heads)
    assert any(not head.tokens_of(span) for head in heads for span in head.spans)  # an empty one
    assert any(len(head.first_sinks) < head.config.sink_tokens for head in heads)
    for cache, (n_prompt, longest, changes) in zip(caches, RUNS):
        n_spans = len(random_spans(n_prompt, longest))
        assert len(cache.spans) > n_spans  # some were sealed
        assert longest > 15 or "token_budget" in changes or any(
            i >= n_prompt for head in cache.heads.values() for part in head.selected for i in part)


# Lines of `decode`.
OPEN = "        self.open = torch.cat((self.open, torch.stack((k, v), dim=2)), dim=1)\n"
SCORE = "        self.add_score(q)\n"
SELECT = """        start = self.window_start()
        loaded = self.load(self.select(start))
"""

# (step, text of the solution, what a student may write instead, what is said)
MISTAKES = [
    (1, "order_rows(kept, secondary)", "kept, kept.contiguous()",
     "is the token at 0, it should be the one at"),
    (1, "(marked, self.ends)", "(marked, self.ends - 1)", "by your `bounds` (1, 9)"),
    (2, "self.scores = torch.zeros_like(self.variances)",
     "new = vectors.shape[1]\n        self.scores = F.pad(self.__dict__.get('scores',"
     " self.variances[:, new:]), (0, new))", "after a seal, the scores of all sentences are 0"),
    (2, "self.vectors = torch.cat((self.vectors, vectors), dim=1)", "self.vectors = vectors",
     "`vectors` of KV head 0 has 1 sentences, and should have"),
    (2, "(keys, bounds)\n        self.vectors",
     "(keys, bounds)\n        vectors = vectors / (bounds.diff(dim=-1) > 0).unsqueeze(-1)\n"
     "        self.vectors", "has NaN: an empty sentence gets zeros"),
    (3, "self.config.query_decay * self.scores", "self.scores",
     "multiply the scores so far by the query decay"),
    (3, "self.config.query_decay * self.scores + score",
     "self.scores + self.config.query_decay * score", "by the query decay, not the new one"),
    (3, "self.config.query_decay * self.scores + score", "score", "the last query alone"),
    (3, "q.view(len(self.vectors), -1, q.shape[-1])",
     "q.view(-1, len(self.vectors), q.shape[-1]).transpose(0, 1)",
     "query heads 0 to G - 1 share KV head 0"),
    (3, "SCORES[self.config.score]", "SCORES['gaussian']",
     "your scores are those of `gaussian`: use `config.score`"),
    (3, "grouped = q.view", "Layer.seen = [*getattr(Layer, 'seen', [])[-1:], q]\n"
     "        grouped = Layer.seen[0].view", "use the queries of another layer"),
    (4, "if self.config.n_kept(n_tokens) == n_tokens:", "if True:",
     "`host` of KV head 0 has 120 rows, and should have 40"),
    (4, "-self.config.observation_window :", ": self.config.observation_window",
     "asks the first queries of the prompt: ask the last `config.observation_window`"),
    (4, "-self.config.observation_window :", "-self.config.recent_window :",
     "asks the last `recent_window` queries of the prompt"),
    (4, "self.open.shape[1] - window_start)", "self.open.shape[1] - window_start - 1)",
     "attends to 41 tokens, and the budget is 40"),
    (4, "max=min(window_start, n_host)", "max=n_host", "attends twice to"),
    (4, "self.bounds[:, :1] + self.n_first_sinks", "self.bounds[:, :1]",
     "does not attend to the sinks [0, 1, 2, 3]"),
    (4, "value=math.inf", "value=0.0", "does not attend to the sinks"),
    (4, "(scores, bounds.diff", "(-scores.masked_fill(scores == math.inf, -math.inf), bounds.diff",
     "the scores are right, so take the best sentences"),
    (5, "torch.stack((k, v), dim=2)[head", "torch.stack((k.roll(1, -1), v), dim=2)[head",
     "RoPE is in the keys already"),
    (5, "torch.stack((k, v), dim=2)[head", "torch.stack((k, v.roll(1, 1)), dim=2)[head",
     "with the value of another token"),
    (5, "(rows[:, :, 0], self.bounds)", "(k, F.pad(self.ends, (1, 0)).expand(len(k), -1))",
     "not the mean of its kept keys, but of all: dropped keys and secondary sinks do not count"),
    (5, "(q, k, v), self.prompt = self.prompt, None", "q, k, v = self.prompt",
     "after `keep`, `prompt` still holds the prompt on the device"),
    (5, "self.host[head, rows]", "self.host[:1].expand_as(self.host)[head, rows]",
     "a key for KV head 1 that is one of KV head 0"),
    (5, "loaded = self.load(self.select(start))",
     "loaded = self.load(torch.arange(self.host.shape[1]).expand(len(k), -1))",
     "`load` copies 120 rows of each head for one token, and the budget is 40"),
    (5, f"{OPEN}{SCORE}{SELECT}", f"{OPEN}{SELECT}{SCORE}",
     "`decode` must add the token's score before it selects"),
    (5, f"{OPEN}{SCORE}{SELECT}", f"{OPEN}{SELECT}", "your scores are all 0"),
    (5, f"{OPEN}{SCORE}{SELECT}", f"{SCORE}{SELECT}{OPEN}",
     "`decode` must open the token's own row first"),
    (5, "self.open[:, max(start - self.host.shape[1], 0) :]", "self.open[:, :-1]",
     "does not attend to the token itself"),
    (5, "self.open[:, max(start - self.host.shape[1], 0) :]", "self.open",
     "of the open sentence, but before the window"),
    (6, "rows, self.open = self.open[:, :length], self.open[:, length:]", "return",
     "`host` of KV head 0 has 120 rows, and should have 1"),
    (6, "self.open[:, :length], self.open[:, length:]",
     "self.open[:, -length:], self.open[:, :-length]", "it should be the one at"),
    (6, "self.bounds = torch.cat((self.bounds, self.bounds[:, -1:] + length), dim=1)", "",
     "`bounds` has 16 numbers in a head, and 16 sentences need one more than they are"),
    (6, "end - config.recent_window, open_row", "end - config.recent_window - 1, open_row",
     "has a window that begins at row 113, and yours begins at row 112"),
    (6, "min(end - config.recent_window, open_row)", "end - config.recent_window",
     "a window that begins at row"),
    (6, ", end - most, self.n_first_sinks)", ", end - most)", "yours begins at row -5"),
    (6, "open_row = self.config, self.host.shape[1]", "open_row = self.config, 1 / 0",
     "ZeroDivisionError('division by zero'), at line"),
]


def check(capsys, *arguments) -> tuple:
    """The exit status, and what is printed."""
    status = capstone.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out or err


@pytest.fixture
def mistaken(tmp_path):
    """A function that writes the solution with a change to its text into a file."""
    def write(old: str, new: str):
        file, text = tmp_path / "my_cache.py", SOLUTION.read_text(encoding="utf-8")
        assert text.count(old) == 1
        file.write_text(text.replace(old, new), encoding="utf-8")
        return file

    return write


@pytest.mark.parametrize("step, old, new, message", MISTAKES)
def test_a_mistake_is_named(capsys, mistaken, step, old, new, message):
    status, out = check(capsys, mistaken(old, new), "--step", step, "--quick")
    assert status == 1 and message in out
    assert out.startswith(f"step {step}, {stubs.STEPS[step][0]}: wrong: ")


def test_a_stub_is_the_solution_without_its_bodies(capsys):
    stub = ROOT / "course" / "exercises" / "my_cache.py"
    assert stub.read_text(encoding="utf-8") == stubs.cache_stub()
    n_methods = sum(len(names) for _, names in stubs.STEPS.values())
    assert stubs.cache_stub().count("        raise NotImplementedError\n") == n_methods
    status, out = check(capsys, stub, "--quick")
    assert status == 1 and out.count(": not written: ") == len(stubs.STEPS) == 6


@pytest.fixture
def one_run(monkeypatch):
    """Of the runs of a check, the first one."""
    monkeypatch.setattr(capstone, "RUNS", RUNS[:1])


def test_without_a_step_all_are_checked(capsys, mistaken, one_run):
    def statuses(file):
        status, out = check(capsys, file, "--quick", "--json")
        return status, [json.loads(line)["status"] for line in out.splitlines()]

    assert statuses(SOLUTION) == (0, ["right"] * 6)
    assert statuses(mistaken("value=math.inf", "value=0.0")) == (
        1, ["right", "right", "right", "wrong", "right", "right"])


def test_steps_that_are_right_alone_can_be_wrong_together(capsys, mistaken, one_run):
    """What one step leaves in the layer may stop another one."""
    file = mistaken("positions, marked =", "self.seen = 1\n        positions, marked =")
    file.write_text(file.read_text().replace(
        "rows, self.open =", "if hasattr(self, 'seen'):\n            return\n"
        "        rows, self.open ="), encoding="utf-8")
    status, out = check(capsys, file, "--quick")
    assert status == 1 and out.count(": right: ") == 6
    assert "all steps together: wrong: `host` of KV head 0 has 120 rows, and should have 1" in out


def test_an_imported_method_does_not_count(capsys, tmp_path, one_run):
    file = tmp_path / "my_cache.py"
    file.write_text("from course.exercises.solutions import my_cache\n"
                    "class Cache(my_cache.Cache):\n    class Layer(my_cache.Layer):\n"
                    "        def load(self, rows):\n            return super().load(rows)\n")
    status, out = check(capsys, file, "--quick")
    assert status == 1 and out.count(": imported: ") == 6


def test_what_does_not_end_is_ended(capsys, mistaken, one_run):
    file = mistaken("n_tokens = k.shape[1]", "while True:\n            pass")
    status, out = check(capsys, file, "--step", 4, "--quick", "--limit", 0.5)
    assert status == 1 and "budget: too slow: 0.5 seconds are the limit" in out


@pytest.mark.parametrize("text, message", [
    (None, "FileNotFoundError: "), ("import nothing_like_this", "ModuleNotFoundError: "),
    ("x = 1", "does not define Cache"),
])
def test_what_cannot_be_checked_is_said_in_one_line(tmp_path, capsys, text, message):
    file = tmp_path / "my_cache.py"
    if text:
        file.write_text(text, encoding="utf-8")
    status, out = check(capsys, file)
    assert status == 2 and out.startswith(f"course.capstone: {file}") and message in out
    assert out.count("\n") == 1


def test_the_page_says_what_the_steps_and_the_check_say(capsys, mistaken):
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    for step, (name, methods) in stubs.STEPS.items():
        named = ", ".join(f"`{method}`" for method in methods)
        assert f"## Step {step}. {name.capitalize()}: {named} (lesson {step + 3})" in text
        assert f"`--step {step}`" in text
    file = mistaken("self.open.shape[1] - window_start)", "self.open.shape[1] - window_start - 1)")
    assert f"```text\n{check(capsys, file, '--step', 4, '--quick')[1]}```" in text
    said = [message for *_, message in MISTAKES]
    quoted = re.findall(r"`([^`]+)` (?:means|that)", text)
    assert len(quoted) == 6
    for fragment in quoted:
        assert any(fragment in message.replace("`", "") for message in said), fragment
    examples = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, "capstone.md", None, 0)
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.slow
def test_the_solution_answers_the_example_question(capsys, default_folder):
    status, out = check(capsys, SOLUTION, "--step", 3)
    assert status == 0
    assert out.endswith("\nthe example question: right: The boards cost $8.03½.\n")


@pytest.mark.slow
def test_a_cache_is_measured_beside_the_project_s(capsys, monkeypatch, tmp_path, default_folder):
    text, short = capstone.PROMPT.read_text(encoding="utf-8"), tmp_path / "short.txt"
    short.write_text(text[text.index("for such materials") :], encoding="utf-8")
    monkeypatch.setattr(capstone, "PROMPT", short)
    status, out = check(capsys, SOLUTION, "--measure")
    answers = re.findall(r"^\| (?:your own|sentencekv|full) \| .* \| (.*) \|$", out, re.MULTILINE)
    assert status == 0 and len(answers) == 3 and all(capstone.COST in text for text in answers)
