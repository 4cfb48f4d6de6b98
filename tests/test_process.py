"""What is printed for people, and how the program ends: full disks, closed pipes, signals."""

import array
import fcntl
import io
import json
import os
import random
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, TEXT

import generate
from support import process, report, signals

QUESTIONS = ["--ask", "Who slept?", "--ask", "Where?"]


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "p"
    path.write_text(TEXT)
    return path


@pytest.fixture
def endless(tiny_folder):
    """A model that never stops by itself, with a chat template."""
    config = json.loads((tiny_folder / "config.json").read_text())
    del config["eos_token_id"]
    (tiny_folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 9999}))
    (tiny_folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}assistant: ")
    return tiny_folder


def command(prompt, folder, *options):
    return [sys.executable, "generate.py", "--prompt", prompt, "--model", folder, "--device", "cpu",
            "--dtype", "float32", "--max-new-tokens", "5000", *options]


def start(*arguments, ignored=(), **how):
    """The program as a shell starts it, but that it may ignore signals."""
    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for kind in ignored:
            signal.signal(kind, signal.SIG_IGN)

    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | how
    return subprocess.Popen([*map(str, command(*arguments))], cwd=ROOT, preexec_fn=prepare, **pipes)


def ended(running, seconds=30) -> tuple:
    """Its status, and what is left of its output and errors."""
    try:
        out, err = running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        running.kill()
        raise
    return running.returncode, out.decode(errors="replace"), (err or b"").decode()


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028",
                                 "\u2029"])
def test_an_error_is_one_line_without_control_characters(capfd, end):
    @process.with_exit_status
    def main(arguments):
        raise ValueError(f"a{end}b\x1b[2J\x00\x7f\x9b1m")

    assert main([]) == 2
    assert capfd.readouterr().err == "generate.py: a b␛[2J␀␡\ufffd1m\n"


@pytest.mark.parametrize("error, line", [
    (ValueError(), "ValueError"),
    (MemoryError(), "out of memory: a shorter prompt, a lower --token-budget or --dtype bfloat16"
                    " needs less (MemoryError)"),
    (RuntimeError("can't start new thread"), "out of memory: a shorter prompt"),
    (RecursionError("deep"), "RecursionError: deep (an error of this program"),
    (OSError(28, "No space left"), "[Errno 28] No space left"),
    (ValueError("x" * 10**7), "xxx"),
    (KeyError("\n" * 10**6), "KeyError: '")])
def test_every_error_is_a_line_of_bounded_length(capfd, error, line):
    @process.with_exit_status
    def main(arguments):
        raise error

    assert main([]) in (1, 2)
    err = capfd.readouterr().err
    assert err.startswith(f"generate.py: {line}") and err.count("\n") == 1 and len(err) <= 1001


def test_an_error_of_the_compiler_is_no_error_of_the_program():
    failed = torch._inductor.exc.CppCompileError(["g++"], "No space left on device")
    later = RuntimeError("while a step was compiled")
    later.__cause__ = failed
    for error in (failed, later):
        status, text = process.explained(error)
        assert status == 2 and text.startswith("--compile: the compiler failed: ")
    for error in (RuntimeError("strange"), torch._dynamo.exc.Unsupported("a call")):
        assert process.explained(error)[0] == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_pictures_and_a_file_the_answer_as_it_is(monkeypatch):
    answer = "a\tb\n\x1b]0;t\x07\r\x08\x7f\x9b2J é😀"
    pictures = "a\tb\n␛]0;t␇␍␈␡\ufffd2J é😀"
    for stream, shown in ((Terminal(), pictures), (io.StringIO(), answer)):
        monkeypatch.setattr(sys, "stdout", stream)
        assert report.printed([(1, answer)], [], set(), lambda: 0, False) == answer
        assert stream.getvalue() == shown + "\n"


def test_what_is_said_in_a_chat_is_one_line(capfd, endless, prompt, monkeypatch):
    def refuse(*_):
        raise ValueError("no\nroom\x1b[2J")

    monkeypatch.setattr(generate.questions, "answer_turn", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n"))
    assert generate.main(command(prompt, endless, "--chat")[2:]) == 0
    assert "generate.py: no room␛[2J\n" in capfd.readouterr().err


def test_a_signal_raises_once_and_one_that_is_ignored_stays_ignored():
    with signals.handled(signals.stop_once()):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        for kind in signals.KINDS:
            signal.raise_signal(kind)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with signals.handled(signals.stop_once()), signals.noted() as came:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert came == [signal.SIGINT] and signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


class Destroyed:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_is_not_lost_while_an_object_is_destroyed(monkeypatch, capfd):
    monkeypatch.setattr(sys, "unraisablehook", signals.raise_again)
    with pytest.raises(KeyboardInterrupt), signals.handled(signals.stop_once()):
        Destroyed()
        time.sleep(5)
    assert not capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--save", "--trace"])
@pytest.mark.parametrize("chat", [False, True])
def test_on_a_full_disk_every_question_is_answered(endless, prompt, tmp_path, option, chat):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    options = command(prompt, endless, option, path, "--json", "--max-new-tokens", "3",
                      *(["--chat"] if chat else QUESTIONS))
    full = 'ulimit -f 8; exec "$@"'
    done = subprocess.run(["bash", "-c", full, "-", *map(str, options)], cwd=ROOT,
                          capture_output=True, text=True, input="Who slept?\n\nWhere?\n")
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 2, done.stderr
    assert done.stderr.count(f"generate.py: cannot write {path}") == (option == "--trace") + 1
    assert "Traceback" not in done.stderr and not [*path.parent.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("line, status, unbuffered", [
    ("--help >/dev/full", 2, ""), ("--help | true", 141, "1"), ("--json >/dev/full", 2, "1"),
    (">/dev/full", 2, ""), ("| true", 141, "1"), ("--chat </dev/null | true", 141, "")])
def test_output_that_cannot_be_written_is_a_line_at_most(endless, prompt, line, status, unbuffered):
    options = " ".join(map(str, command(prompt, endless, "--max-new-tokens", "9")))
    done = subprocess.run(["bash", "-c", f"{options} {line}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT,
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if status == 2:
        assert done.stderr.count("No space left on device") == 1


@pytest.mark.slow
@pytest.mark.parametrize("first", signals.KINDS)
def test_a_storm_of_both_signals_ends_the_program_without_a_word(endless, prompt, first):
    order = random.Random(0)
    for delay in (0.3, 3.0, None):
        running = start(prompt, endless)
        if delay is None:
            running.stdout.read(20)  # it answers
        else:
            time.sleep(delay)
        running.send_signal(first)
        while running.poll() is None:
            time.sleep(order.choice((0, 0.001, 0.01)))
            running.send_signal(order.choice(signals.KINDS))
        status, _, err = ended(running)
        assert status in (130, 143, -2, -15) and "Traceback" not in err, (delay, err)
        assert "Exception ignored" not in err


@pytest.mark.slow
def test_a_job_that_ignores_ctrl_c_still_ends_at_sigterm(endless, prompt):
    running = start(prompt, endless, "--json", ignored=[signal.SIGINT])
    running.stderr.read(20)
    for _ in range(5):
        running.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    status, out, _ = ended(running)
    assert status == 143 and json.loads(out)["signal"] == signal.SIGTERM


@pytest.mark.slow
def test_sigterm_ends_an_answer_that_nobody_reads(endless, prompt):
    """The pipe is full."""
    theirs, ours = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, 4096)
    os.write(ours, b"x" * 4000)
    running, held = start(prompt, endless, stdout=ours), array.array("i", [0])
    while held[0] < 4090:
        assert running.poll() is None
        time.sleep(0.05)
        fcntl.ioctl(theirs, termios.FIONREAD, held)
    running.send_signal(signal.SIGTERM)
    assert running.wait(signals.PATIENCE + 60) == 143
    assert "Traceback" not in running.stderr.read().decode()
    os.close(theirs), os.close(ours)


def chatting(prompt, folder, *options):
    running = start(prompt, folder, "--chat", *options, stdin=subprocess.PIPE)
    assert running.stdout.read(3) == b"\n> "
    return running


@pytest.mark.slow
def test_sigterm_ends_a_chat(endless, prompt):
    """While a question is typed; while one is answered, with its report, also if Ctrl-C came
    before; while it reads."""
    running = chatting(prompt, endless)
    running.send_signal(signal.SIGTERM)
    assert ended(running)[0] == 143
    for kinds in ([signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]):
        running = chatting(prompt, endless)
        running.stdin.write(b"Who slept?\n")
        running.stdin.flush()
        running.stdout.read(20)
        for kind in kinds:
            running.send_signal(kind)
        status, _, err = ended(running)
        assert status == 143 and err.count("ms/token") == 1 and "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_that_is_held_down_does_not_end_a_chat(endless, prompt):
    running = chatting(prompt, endless, "--max-new-tokens", "300")
    running.stdin.write(b"Who slept?\n")
    running.stdin.flush()
    running.stdout.read(20)
    for _ in range(500):
        running.send_signal(signal.SIGINT)
        time.sleep(0.001)
    time.sleep(0.5)  # a question that is typed meanwhile would be dropped
    running.stdin.write(b"Where?\n")
    status, _, err = ended(running)
    assert status == 0 and err.count("ms/token") == 2 and "Traceback" not in err
