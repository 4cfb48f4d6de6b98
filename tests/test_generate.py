import doctest
import fcntl
import io
import json
import math
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, TEXT, TINY, needs_gpu
from safetensors.torch import load_file, save_file

import generate
from generate import sampler
from support import outputs
from support.report import visible
from support.timer import OTHER, StageTimer


def run(capfd, *arguments):
    """Exit status, standard output, standard error."""
    status = generate.main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    return status, out, err


def run_json(capfd, *arguments):
    status, out, err = run(capfd, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_docstrings():
    assert doctest.testmod(generate).failed == 0


@pytest.mark.parametrize("cache", ["full", "sentencekv"])
def test_a_prompt_read_in_chunks_is_answered_as_at_once(capfd, tiny_folder, prompt, cache):
    whole, parts = (run_json(capfd, "--prompt", prompt, "--model", tiny_folder, "--cache", cache,
                             "--token-budget", 80, "--prefill-chunk", size, "--device", "cpu",
                             "--max-new-tokens", 20) for size in (8192, 50))
    assert parts["text"] == whole["text"] and parts["device_kv_bytes"] == whole["device_kv_bytes"]


@pytest.mark.parametrize("cache", ["full", "sentencekv"])
@pytest.mark.parametrize("keep_factor", ["1", "inf"])
def test_the_report_is_complete_and_adds_up(capfd, tiny_folder, prompt, cache, keep_factor):
    report = run_json(
        capfd, "--prompt", prompt, "--model", tiny_folder, "--cache", cache, "--max-new-tokens",
        40, "--token-budget", 80, "--keep-factor", keep_factor, "--sentence-limit", 128, "--device",
        "cpu")
    assert set(report) >= {
        "text", "prompt_tokens", "new_tokens", "sentences", "ttft_ms", "decode_ms_per_token",
        "stages_ms", "device_kv_bytes", "host_kv_bytes", "full_kv_bytes", "selected_bytes",
        "loaded_bytes",
        "hit_rate", "device", "dtype", "torch"}
    assert report["prompt_tokens"] == len(TEXT) and report["sentences"] == 18
    assert 1 <= report["new_tokens"] <= 40
    stages = {"full": ({"attention"}, {"attention"}),
              "sentencekv": ({"attention", "importance", "sentence vectors", "offload"},
                             {"attention", "select", "load", "seal"})}[cache]
    for phase, expected in zip(("prefill", "decode"), stages):
        parts = report["stages_ms"][phase]
        assert expected <= set(parts) | {"seal"}
        assert set(parts) <= expected | {OTHER, "total"}
        assert all(ms >= 0 for ms in parts.values())
        total = parts.pop("total")
        assert sum(parts.values()) == pytest.approx(total)
    if cache == "full":
        assert report["device_kv_bytes"] >= report["full_kv_bytes"] and not report["host_kv_bytes"]
    else:
        assert report["host_kv_bytes"] > 0
        assert 0 < report["loaded_bytes"] < report["selected_bytes"]


def test_both_caches_answer_alike_when_the_budget_holds_everything(capfd, tiny_folder, prompt):
    texts = [run_json(capfd, "--prompt", prompt, "--model", tiny_folder, "--cache", cache,
                      "--kv-bits", 16, "--max-new-tokens", 60, "--device", "cpu")["text"]
             for cache in ("full", "sentencekv")]
    assert texts[0] == texts[1] != ""


def test_text_streams_to_standard_output_and_tables_do_not(capfd, tiny_folder, prompt):
    common = ("--prompt", prompt, "--model", tiny_folder, "--max-new-tokens", 20)
    report = run_json(capfd, *common)
    status, out, err = run(capfd, *common)
    assert status == 0 and out == report["text"] + "\n"
    for words in ("ttft ms", OTHER, "device: sentence vectors", "full cache"):
        assert words in err


def test_with_json_the_text_streams_to_standard_error(capfd, tiny_folder, prompt):
    common = ("--prompt", prompt, "--model", tiny_folder, "--max-new-tokens", 20)
    status, out, err = run(capfd, *common, "--json", "--show-sentences")
    report = json.loads(out)
    assert status == 0 and out.count("\n") == 1 and len(report["most_attended"]) == 5
    assert err.startswith(visible(report["text"]) + "\n") and "attention  place" in err
    status, out, err = run(capfd, *common, "--json", "--token-budget", 36)
    assert (status, out) == (2, "") and err.count("\n") == 1


def test_with_json_a_conversation_is_a_line_for_each_answer(capfd, chat_folder, prompt,
                                                            monkeypatch):
    """A question that does not fit is refused on standard error."""
    questions = ["Who slept?", "Why? " * 500, "Where?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    status, out, err = run(capfd, "--prompt", prompt, "--model", chat_folder, "--chat", "--json",
                           "--max-new-tokens", 20, "--device", "cpu")
    reports = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [report["question"] for report in reports] == questions[::2]
    assert err.count("\n> ") == 4 and "generate.py: " in err  # the last one is the end
    assert all(visible(report["text"]) in err for report in reports)


def test_standard_input_is_a_prompt(capfd, tiny_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    report = run_json(capfd, "--prompt", "-", "--model", tiny_folder, "--max-new-tokens", 3)
    assert report["prompt_tokens"] == len(TEXT)


@pytest.mark.slow
def test_the_last_line_end_is_no_part_of_the_prompt(capfd, default_folder, tmp_path):
    path = tmp_path / "question.txt"
    for ending in (b"", b"\n", b"\r\n"):
        path.write_bytes(b"What is the capital of France?" + ending)
        report = run_json(capfd, "--prompt", path, "--max-new-tokens", 12, "--device", "cpu",
                          "--dtype", "float32")  # bfloat16 rounds to another answer on some CPUs
        assert report["text"] == "The capital of France is Paris."


def test_one_token_is_a_prompt(capfd, tiny_folder, tmp_path):
    (tmp_path / "one").write_text("x")
    report = run_json(capfd, "--prompt", tmp_path / "one", "--model", tiny_folder,
                      "--max-new-tokens", 1)
    assert (report["prompt_tokens"], report["new_tokens"]) == (1, 1)
    assert report["decode_ms_per_token"] == 0


def test_sampling_follows_the_seed(capfd, tiny_folder, prompt):
    def sample(seed):
        return run_json(capfd, "--prompt", prompt, "--model", tiny_folder, "--temperature", 1,
                        "--top-p", 0.9, "--seed", seed, "--max-new-tokens", 20)["text"]

    assert sample(1) == sample(1) != sample(2)


def test_the_sampler_draws_from_the_likeliest_tokens_only():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert sampler(0.0, 1.0, 0, "cpu")(logits) == 0
    sample = sampler(1.0, 0.75, 0, "cpu")
    counts = torch.bincount(torch.tensor([sample(logits) for _ in range(2000)]), minlength=4)
    assert counts[2] == counts[3] == 0
    assert counts[0] / 2000 == pytest.approx(0.5 / 0.8, abs=0.05)


def test_generation_stops_at_the_end_token(capfd, tiny_folder, prompt, monkeypatch):
    steps = iter([65, 66, 256, 67])
    monkeypatch.setattr(generate, "sampler", lambda *a: lambda logits: next(steps))
    report = run_json(capfd, "--prompt", prompt, "--model", tiny_folder)
    assert report["new_tokens"] == 3 and len(report["text"]) == 2


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_what_was_written(capfd, tiny_folder, prompt, monkeypatch, kind):
    steps = iter(range(7))

    def sample(logits):
        if next(steps) == 6:
            signal.raise_signal(kind)
        return 65

    monkeypatch.setattr(generate, "sampler", lambda *a: sample)
    status, out, err = run(capfd, "--prompt", prompt, "--model", tiny_folder, "--json")
    assert status == 128 + kind and "Traceback" not in err
    assert json.loads(out)["new_tokens"] == 7


QUESTIONS = ("Where had they gone?", "Who slept?", "Where had they gone?")


def asked(capfd, *arguments, questions=QUESTIONS):
    """The report of every question."""
    status, out, err = run(capfd, *arguments, "--max-new-tokens", 30, "--device", "cpu", "--json",
                           *(word for question in questions for word in ("--ask", question)))
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def chat_folder(tiny_folder):
    """The tiny model with a chat template, in which every turn ends with a stop token."""
    (tiny_folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}assistant: ")
    return tiny_folder


@pytest.mark.parametrize("cache", ["full", "sentencekv"])
@pytest.mark.parametrize("template", [True, False])
def test_a_question_is_answered_as_in_a_prompt_of_its_own(capfd, chat_folder, prompt, tmp_path,
                                                          cache, template):
    if not template:
        (chat_folder / "chat_template.jinja").unlink()
    # In 16 bits another order of slots is another rounding.
    exact = "--dtype", "float32"
    reports = asked(capfd, "--prompt", prompt, "--model", chat_folder, "--cache", cache, *exact)
    for question, report in zip(QUESTIONS, reports):
        alone = tmp_path / "alone"
        alone.write_text(f"{TEXT}\n\n{question}", encoding="utf-8")
        expected = run_json(capfd, "--prompt", alone, "--model", chat_folder, "--cache", cache,
                            "--max-new-tokens", 30, "--device", "cpu", *exact)
        for name in ("text", "prompt_tokens", "new_tokens", "full_kv_bytes"):
            assert report[name] == expected[name]
        assert report["question"] == question and report["text"]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("keep_factor", [1, math.inf])
def test_asked_again_the_answer_is_the_same(capfd, chat_folder, prompt, temperature, keep_factor):
    first, second, again = asked(
        capfd, "--prompt", prompt, "--model", chat_folder, "--token-budget", 80, "--keep-factor",
        keep_factor, "--temperature", temperature)
    assert first["text"] == again["text"]
    for name in ("selected_bytes", "loaded_bytes", "device_kv_bytes", "sentences"):
        assert first[name] == again[name]


@pytest.mark.parametrize("keep_factor", [2, math.inf])
@pytest.mark.parametrize("reuse", [1, 2])
def test_a_loaded_document_is_the_one_saved(capfd, chat_folder, prompt, tmp_path, keep_factor,
                                            reuse):
    """Under another budget and score too."""
    path, common = tmp_path / "document", ["--model", chat_folder, "--keep-factor", keep_factor,
                                           "--reuse-layers", reuse]
    never, first = (asked(capfd, "--prompt", prompt, *common, "--token-budget", 80, *save)
                    for save in ([], ["--save", path]))
    loaded = asked(capfd, "--load", path, *common, "--token-budget", 80)
    names = ("text", "selected_bytes", "loaded_bytes", "host_kv_bytes", "prompt_tokens")
    for reports in zip(never, first, loaded):
        for name in names:
            assert len({report[name] for report in reports}) == 1
    if keep_factor == math.inf:  # else the budget decides what is kept
        other = ["--token-budget", 60, "--score", "mean_query"]
        loaded = asked(capfd, "--load", path, *common, *other)
        never = asked(capfd, "--prompt", prompt, *common, *other)
        assert [[r[n] for n in names] for r in loaded] == [[r[n] for n in names] for r in never]


def test_a_prompt_saved_without_a_question_is_answered_too(capfd, chat_folder, prompt, tmp_path):
    common = ["--model", chat_folder, "--max-new-tokens", 30, "--device", "cpu", "--kv-bits", 16]
    for raw in ([], ["--raw"]):
        expected = run_json(capfd, "--prompt", prompt, *common, *raw)["text"]
        path = tmp_path / "document"
        saved = run_json(capfd, "--prompt", prompt, *common, *raw, "--save", path)
        loaded = run_json(capfd, "--load", path, *common, *raw)
        assert saved["text"] == loaded["text"] == expected


@pytest.mark.slow
def test_a_conversation_in_a_terminal(chat_folder, prompt, tmp_path):
    """Two questions, Ctrl-C in an answer and at the prompt, a question too long, Ctrl-D."""
    config = json.loads((chat_folder / "config.json").read_text())
    del config["eos_token_id"]  # the model never stops by itself
    (chat_folder / "config.json").write_text(json.dumps(config))
    terminal, theirs = pty.openpty()

    def start():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it

    process = subprocess.Popen(
        [sys.executable, generate.__file__, "--prompt", str(prompt), "--model", str(chat_folder),
         "--chat", "--max-new-tokens", "600", "--device", "cpu"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=start)
    os.close(theirs)
    seen = b""

    def wait_for(text, start=0):
        nonlocal seen
        while text not in seen[start:]:
            assert select.select([terminal], [], [], 60)[0], seen
            seen += os.read(terminal, 4096)
        return len(seen)

    def send(text):
        os.write(terminal, text)

    at = wait_for(b"\n> ")
    send(b"Who slept?\n")
    at = wait_for(b"?\r\n", at)
    while len(seen) < at + 20:  # the answer has begun
        assert select.select([terminal], [], [], 60)[0], seen
        seen += os.read(terminal, 4096)
    send(b"\x03")
    at = wait_for(b"ms/token", at)
    at = wait_for(b"\n> ", at - 20)
    for _ in range(20):  # again, as it is lost if it comes just before the reading
        if b"\n> " not in seen[at:]:
            send(b"\x03")
            while select.select([terminal], [], [], 0.5)[0]:
                seen += os.read(terminal, 4096)
    assert b"\n> " in seen[at:]
    at = len(seen)
    send(b"Where?\n")
    at = wait_for(b"ms/token", at)
    at = wait_for(b"\n> ", at - 20)
    send(b"x" * 1000 + b"\n")
    at = wait_for(b"positions", at)
    wait_for(b"\n> ", at - 20)
    send(b"\x04")
    assert process.wait(60) == 0
    os.close(terminal)


def test_stages_nest_and_their_rest_is_what_is_left(monkeypatch):
    clock = iter([0, 1, 3, 6, 10])
    timer = StageTimer(torch.device("cpu"))
    timer.mark = lambda: next(clock) / 1e3
    with timer("prefill"):
        with timer("attention"):
            pass
        timer.mark()
    assert timer.totals() == {"prefill": pytest.approx({OTHER: 8, "total": 10, "attention": 2})}


def test_what_is_inside_a_part_is_counted_once(monkeypatch):
    clock = iter([0, 1, 3, 6, 7, 10])
    timer = StageTimer(torch.device("cpu"))
    timer.mark = lambda: next(clock) / 1e3
    with timer("prefill"), timer("offload"), timer("copy"):
        pass
    assert timer.totals() == {"prefill": pytest.approx({OTHER: 4, "total": 10, "offload": 6})}


def test_watched_methods_are_stages_until_the_wrappers_are_taken_off():
    class Layer:
        def select(self, rows, last=0):
            return rows + last

        def load(self):
            raise KeyError

    timer, layer, other = StageTimer(torch.device("cpu")), Layer(), Layer()
    timer.watch(layer, {"select": "select", "load": "load"})
    with timer("decode"):
        assert layer.select(1, last=2) == 3 and other.select(1) == 1
        with pytest.raises(KeyError):
            layer.load()
    assert set(timer.totals()["decode"]) == {"select", "load", OTHER, "total"}
    timer.unwatch()
    assert vars(layer) == {}
    with timer("decode"):
        layer.select(1)
    assert set(timer.totals()["decode"]) == {OTHER, "total"}


@needs_gpu
def test_the_command_line_runs_on_a_gpu(capfd, tiny_folder, prompt):
    reports = [run_json(capfd, "--prompt", prompt, "--model", tiny_folder, "--device", device,
                        "--dtype", "float32", "--token-budget", 80, "--max-new-tokens", 30)
               for device in ("cpu", "cuda")]
    assert reports[0]["text"] == reports[1]["text"] and reports[1]["clock"] == "CUDA events"


@pytest.mark.parametrize("content, message", [
    (None, "cannot read {prompt}: No such file or directory"),
    (b"", "{prompt} is empty"),
    (b" \n\t\n", "{prompt} is empty"),
    (b"caf\xe9 au lait", "{prompt} is not UTF-8 text: byte 3 is wrong"),
])
def test_a_bad_prompt_is_one_line(capfd, tiny_folder, tmp_path, content, message):
    prompt = tmp_path / "prompt.txt"
    if content is not None:
        prompt.write_bytes(content)
    status, out, err = run(capfd, "--prompt", prompt, "--model", tiny_folder)
    assert (status, out) == (2, "")
    assert err == f"generate.py: {message.format(prompt=prompt)}\n"


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "."], "cannot read .: Is a directory"),
    (["--token-budget", "36"],
     "token_budget is 36, must be at least 45: 12 sinks + 32 last tokens + 1"),
    (["--keep-factor", "0.5"], "keep_factor is 0.5, must be at least 1"),
    (["--max-new-tokens", "2000"], f"{len(TEXT)} prompt tokens + 2000 new ones ="
     f" {len(TEXT) + 2000}, and the model has {TINY.max_position_embeddings} positions:"
     " shorten one or the other"),
    (["--max-new-tokens", "0"], "--max-new-tokens cannot be 0"),
    (["--max-new-tokens", "many"], "argument --max-new-tokens: invalid int value: 'many'"),
    (["--temperature", "-1"], "--temperature cannot be -1.0"),
    (["--temperature", "nan"], "--temperature cannot be nan"),
    (["--temperature", "1e-45"], "--temperature cannot be 1e-45"),
    (["--seed", "99999999999999999999"], "--seed cannot be 99999999999999999999"),
    (["--device", "cuda:999"], "--device cuda:999 is not one of auto, cpu, cuda, cuda:N"),
    (["--top-p", "0"], "--top-p cannot be 0.0"),
    (["--device", "tpu"], "--device tpu is not one of auto, cpu, cuda, cuda:N"),
    (["--device", "cuda:99"], "--device cuda:99: this machine has {gpus} CUDA GPUs"),
    (["--model", "nowhere"],
     "--model nowhere: no such folder, no such GGUF file, and not one of the names"
     " smollm2-135m-instruct, qwen2.5-coder-0.5b"),
    (["--cuda-graph", "--device", "cpu"], "--cuda-graph needs a GPU, --device is cpu"),
    (["--cuda-graph", "--cache", "full"],
     "--cuda-graph needs --cache sentencekv: a full cache grows at every token"),
    (["--compile", "--cache", "full"],
     "--compile needs --cache sentencekv: a full cache grows at every token"),
    (["--fast", "--compile"], "--fast chooses the step itself: no --cuda-graph, no --compile"),
    (["--fast", "--cache", "full"],
     "--fast needs --cache sentencekv: a full cache grows at every token"),
    (["--compile", "--show-sentences"],
     "--compile is not for --trace and --show-sentences: they look into every step"),
    (["--colour", "red"], "unrecognized arguments: --colour red"),
    (["--load", "file"], "either --prompt or --load is needed"),
    (["--ask", " "], "--ask is empty"),
    (["--ask", "Who?", "--raw"], "--ask and --chat need a chat template, not --raw"),
    (["--ask", "Who? " * 400], f"{len(TEXT) + 2 + 2000} prompt tokens + 256 new ones ="
     f" {len(TEXT) + 2258}, and the model has {TINY.max_position_embeddings} positions:"
     " shorten one or the other"),
    (["--chat", "--ask", "Who?"],
     "--chat takes questions from standard input: no --ask and no --prompt -"),
    (["--save", "file", "--cache", "full"], "--save and --load need --cache sentencekv"),
    (["--save", "."], "cannot write ."),
    (["--save", "nowhere/file"], "cannot write nowhere/file"),
    (["--prefill-chunk", "0"], "--prefill-chunk cannot be 0"),
])
def test_a_bad_option_is_one_line(capfd, tiny_folder, prompt, arguments, message):
    status, out, err = run(capfd, "--prompt", prompt, "--model", tiny_folder, *arguments)
    assert (status, out) == (2, "")
    assert err == f"generate.py: {message.format(gpus=torch.cuda.device_count())}\n"


@pytest.mark.parametrize("file, content, message", [
    ("tokenizer.json", None, "neither tokenizer.json nor tokenizer.model is there"),
    ("tokenizer.json", "{}", "cannot read the tokenizer of"),
    ("config.json", None, "has no config.json"),
    ("config.json", "[]", "config.json"),
    ("model.safetensors", None, "has no model.safetensors"),
    ("model.safetensors", "broken", "is not a complete safetensors file"),
    ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
    ("tokenizer_config.json", '{"bos_token": {"id": 1}}', "cannot read the tokenizer of"),
    ("generation_config.json", '{"eos_token_id": [[1]]}', "eos_token_id [[1]] is not an integer"),
    ("chat_template.jinja", "{{ messages.content + 1 }}", "the model's chat template failed"),
    ("chat_template.jinja", "{# nothing #}", "it leaves out the user's text"),
    ("config.json", '{"model_type": "llama", "vocab_size": "many"}', "config.json"),
    ("config.json", '{"model_type": "llama", "quantization_config": "fp8"}', "config.json"),
])
def test_a_broken_model_folder_is_one_line(capfd, tiny_folder, prompt, file, content, message):
    path = tiny_folder / file
    path.unlink() if content is None else path.write_text(content)
    status, out, err = run(capfd, "--prompt", prompt, "--model", tiny_folder)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and message in err


def test_too_little_memory_says_what_to_lower(capfd, tiny_folder, prompt, monkeypatch):
    def load_model(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(generate, "load_model", load_model)
    status, out, err = run(capfd, "--prompt", prompt, "--model", tiny_folder)
    assert status == 2 and err.count("\n") == 1
    assert "shorter prompt" in err and "--token-budget" in err and "3.00 GiB" in err


def test_a_closed_standard_input_is_one_line(capfd, tiny_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    status, _, err = run(capfd, "--prompt", "-", "--model", tiny_folder)
    assert (status, err) == (2, "generate.py: standard input is closed\n")


def test_a_budget_beyond_all_measure_needs_no_more_than_the_text(capfd, tiny_folder, prompt):
    reports = [run_json(capfd, "--prompt", prompt, "--model", tiny_folder, "--max-new-tokens", 9,
                        "--token-budget", budget) for budget in (2048, 2**31)]
    assert reports[0]["text"] == reports[1]["text"]
    assert reports[0]["device_kv_bytes"] == reports[1]["device_kv_bytes"]


def test_tokens_beyond_the_vocabulary_are_refused(capfd, tiny_folder, prompt):
    config = json.loads((tiny_folder / "config.json").read_text()) | {"vocab_size": 100}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    status, _, err = run(capfd, "--prompt", prompt, "--model", tiny_folder)
    assert status == 2 and "the vocabulary of the model 100" in err


@pytest.fixture
def broken(tiny_folder):
    """Spoil weights: the second layer of the model computes NaN."""
    weights = load_file(tiny_folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, tiny_folder / "model.safetensors")
    return tiny_folder


@pytest.mark.parametrize("options", [[], ["--temperature", 1], ["--cache", "full"]])
def test_numbers_that_are_not_finite_stop_the_answer_and_name_the_layer(capfd, broken, prompt,
                                                                       options):
    status, out, err = run(capfd, "--prompt", prompt, "--model", broken, "--dtype", "float32",
                           *options)
    assert status == 2 and not out.strip()
    assert err.splitlines()[-1].startswith(
        "generate.py: the model computes numbers that are not finite from layer 1 on")


def test_what_was_written_before_a_number_is_not_finite_is_kept(capfd, tiny_folder, prompt,
                                                                monkeypatch):
    steps = iter([65, 66, None])

    def sample(logits):
        if (token := next(steps)) is None:
            raise FloatingPointError
        return token

    monkeypatch.setattr(generate, "sampler", lambda *a: sample)
    status, out, err = run(capfd, "--prompt", prompt, "--model", tiny_folder)
    assert status == 2 and len(out) == 3 and "not finite after its layers" in err


def test_the_likeliest_token_is_never_cut_off():
    sample = sampler(1.0, 1e-46, 0, "cpu")
    assert {sample(torch.tensor([0.0, 3.0, 1.0])) for _ in range(20)} == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 1.0])
def test_logits_are_sampled_however_loud_they_are(dtype, top_p):
    """Divided by the temperature, they would not be finite."""
    sample, most = sampler(1e-3, top_p, 0, "cpu"), torch.finfo(dtype).max
    for loud in (most, most / 2):
        for other in (-most, 0.0, -math.inf):
            logits = torch.tensor([other, loud, other], dtype=dtype)
            assert {sample(logits) for _ in range(5)} == {1}
    assert {sample(torch.full((3,), -most, dtype=dtype)) for _ in range(100)} <= {0, 1, 2}


@pytest.mark.parametrize("logits", [[0.0, math.inf], [0.0, math.nan], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e3])
def test_logits_that_are_not_finite_are_not_sampled(logits, temperature):
    with pytest.raises(FloatingPointError):
        sampler(temperature, 1.0, 0, "cpu")(torch.tensor(logits))


@pytest.mark.parametrize("logit", [-1e38, 0.0, 1e38])
def test_equal_logits_are_drawn_alike(logit):
    """Half of the probability is two of four, whichever these are."""
    for top_p, kinds in ((1.0, 4), (0.5, 2), (0.51, 3), (1e-9, 1)):
        sample = sampler(1e-3, top_p, 0, "cpu")
        counts = torch.bincount(torch.tensor([sample(torch.full((4,), logit))
                                              for _ in range(600)]), minlength=4)
        assert (counts > 0).sum() == kinds and counts.max() < 2 * 600 / kinds


@pytest.mark.parametrize("value", [2**63, 2**31 + 1, 10**400])
@pytest.mark.parametrize("name", ["token-budget", "recent-window", "sink-tokens",
                                  "secondary-sinks", "sentence-limit"])
def test_settings_have_a_greatest_value(capfd, prompt, name, value):
    status, out, err = run(capfd, "--prompt", prompt, f"--{name}", value)
    assert status == 2 and err.endswith("must be at most 2147483648\n") and err.count("\n") == 1


def shell(folder, prompt, line, *options):
    command = [sys.executable, generate.__file__, "--prompt", str(prompt), "--model", str(folder),
               "--device", "cpu", "--max-new-tokens", "20", *options]
    return subprocess.run(["bash", "-c", f"{shlex.join(command)} {line}; echo status $?"],
                          capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("line, status", [
    ("2>&-", 0), ("2>/dev/full", 0), (">&-", 0), (">/dev/full", 2), ("| head -c 1", None),
    (">&- 2>&-", 0), ("<&-", 0)])
def test_a_closed_or_full_stream_loses_no_answer_and_shows_no_traceback(tiny_folder, prompt, line,
                                                                        status):
    done = shell(tiny_folder, prompt, line, "--json")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    if status is not None:
        assert done.stdout.endswith(f"status {status}\n"), done
    if line.startswith("2>") or line == "<&-":
        assert json.loads(done.stdout.splitlines()[0])["new_tokens"] == 20


@pytest.mark.slow
def test_a_pipe_that_another_program_has_set_not_to_wait_is_waited_for(tiny_folder, prompt):
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    command = [sys.executable, generate.__file__, "--prompt", "-", "--model", str(tiny_folder),
               "--device", "cpu", "--max-new-tokens", "5"]
    running = subprocess.Popen(command, stdin=ours, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    with os.fdopen(theirs, "w") as pipe:
        time.sleep(5)  # it reads, and nothing is there yet
        pipe.write(TEXT)
    assert "Error" not in running.communicate(timeout=60)[1] and running.returncode == 0


@pytest.mark.parametrize("error, status, message", [
    (MemoryError("none left"), 2, "out of memory: a shorter prompt"),
    (RuntimeError("unable to mmap 8 bytes from file"), 2, "out of memory: a shorter prompt"),
    (RuntimeError("strange"), 1, "RuntimeError: strange (an error of this program: --debug"),
    (KeyError("x"), 1, "KeyError: 'x' (an error of this program: --debug shows where)")])
def test_an_unexpected_error_is_one_line_unless_it_is_to_be_debugged(capfd, prompt, tiny_folder,
                                                                     monkeypatch, error, status,
                                                                     message):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(generate, "load_model", fail)
    arguments = ["--prompt", prompt, "--model", tiny_folder]
    got, out, err = run(capfd, *arguments)
    assert got == status and message in err and err.count("\n") == 1
    if status == 1:
        with pytest.raises(type(error)):
            run(capfd, *arguments, "--debug")


@pytest.mark.slow
@pytest.mark.parametrize("kind, statuses", [(signal.SIGINT, (130, -2)),
                                            (signal.SIGTERM, (143, -15))])
def test_a_signal_at_any_moment_leaves_no_traceback_and_no_half_file(tiny_folder, prompt, tmp_path,
                                                                     kind, statuses):
    folder = tmp_path / "saved"
    folder.mkdir()
    command = [sys.executable, generate.__file__, "--prompt", str(prompt), "--model",
               str(tiny_folder), "--device", "cpu", "--max-new-tokens", "300", "--json", "--save",
               str(folder / "document"), "--trace", str(folder / "page.html")]
    ended = []
    for delay in (0.1, 1, 2, 3, 4.5):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        try:
            out, err = process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(kind)
            out, err = process.communicate(timeout=60)
        assert process.returncode in (0, *statuses), err
        assert "Traceback" not in err and not list(folder.glob(".*")), (err, delay)
        if process.returncode == 0 or out:
            assert json.loads(out)["new_tokens"] > 0
        ended.append(process.returncode)
        for path in folder.iterdir():
            path.unlink()
    assert ended[0] in statuses


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--save", "--trace"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tiny_folder, prompt, tmp_path, option):
    """A limit of the size of files, at one KiB, is as a full disk."""
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text("before")
    command = shlex.join([sys.executable, generate.__file__, "--prompt", str(prompt), "--model",
                          str(tiny_folder), "--device", "cpu", option, str(path),
                          "--max-new-tokens", "5"])
    done = subprocess.run(["bash", "-c", f"ulimit -f 1; {command}"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(f"generate.py: cannot write {path}") == 1
    assert [*path.parent.iterdir()] == [path] and path.read_text() == "before"
    assert done.stdout.strip()


def test_a_read_only_folder_is_refused_before_anything_is_read(capfd, tiny_folder, prompt, tmp_path,
                                                               monkeypatch):
    monkeypatch.setattr(outputs.os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.setattr(generate, "load_model", lambda *_: pytest.fail("read"))
    status, out, err = run(capfd, "--prompt", prompt, "--model", tiny_folder, "--save",
                           tmp_path / "x")
    assert (status, err) == (2, f"generate.py: cannot write {tmp_path / 'x'}\n")


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [2.0, 1.5, 1.2, 1.0])
def test_a_limit_of_memory_is_one_line(default_folder, gigabytes):
    """PyTorch itself may need more than this, and then it does not start."""
    command = shlex.join([sys.executable, generate.__file__, "--prompt",
                          str(ROOT / "examples" / "walden_house.txt"), "--device", "cpu",
                          "--dtype", "float32", "--max-new-tokens", "2"])
    done = subprocess.run(["bash", "-c", f"ulimit -v {int(gigabytes * 10**6)}; {command}"],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if "ImportError" not in done.stderr and "import torch" not in done.stderr:
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
