"""Questions about a text that is read once, --ask and --chat, and signals while one is answered.

A `session` is that of generate.py: it reads tokens, and writes an answer.
"""

import signal
from contextlib import contextmanager

from support.document import Document, SavedDocument, restore, want_positions
from support.prompts import Prompts, clean
from support.ranks import agreed
from support.report import complain, describe, finish, printer, say, tried
from support.signals import handled, noted, stop, stop_once


@contextmanager
def interrupts():
    """In here Ctrl-C and SIGTERM raise nothing: the function that this yields gives the signal that
    came, or 0; SIGTERM if both did. Several ranks agree on one, as it may reach them between
    different tokens."""
    with noted() as came:
        yield lambda: agreed(max(came, default=0))


def go_back(session, document: Document):
    """Forget what was read and written after a document that the cache holds. OSError if that is
    of a file which was changed."""
    document.check_unchanged()
    session.start_after(document)
    session.cache.truncate(len(document.ids))


def answer_all(session, prompts: Prompts, saved: SavedDocument) -> int:
    """Answer what --ask or --chat asks about a document: the one that was loaded, or else one that
    is read, and saved if --save asks for it. Returns the exit status."""
    document = saved.document
    if document:
        restore(session.cache, document.kept, document.release)
    else:
        if saved.path:
            want_positions(session.cache)
        document = read_shared_prefix(session, prompts)
    status = tried(saved.save, document, session.cache)
    return (chat if session.args.chat else ask)(session, document, prompts) or status


def read_shared_prefix(session, prompts: Prompts) -> Document:
    """Read what the prompts of all questions begin with. ValueError if that is nothing."""
    ids = prompts.shared_prefix()
    if not ids:
        raise ValueError("the text is too short to be read before the questions")
    session.read(ids)
    say(f"{len(ids)} tokens in {len(session.spans)} sentences, read in"
        f" {session.timer.totals()['prefill']['total'] / 1e3:.1f} s")
    return Document(prompts.text, ids, session.spans, prompts.tokenizer.now)


def ask(session, document: Document, prompts: Prompts) -> int:
    """Answer each question as if it were the only one. Returns the exit status."""
    worst = 0
    for question in prompts.questions:
        go_back(session, document)
        if question:
            printer(session.args.json)(f"\n> {question}")
        with session.timer("tokenize"):
            ids = document.rest(prompts.ids(question))
        first = session.read(ids)
        with interrupts() as stopped:
            text = session.write(first, stopped)
            document.check_unchanged()
            report = describe(session, text, stopped(), question)
            worst = max(worst, finish(report, session, stopped))
        if number := stopped():
            return 128 + number
    return worst


def chat(session, document: Document, prompts: Prompts) -> int:
    """Answer questions from the terminal. All earlier ones and their answers stay in the cache.
    Ctrl-C ends an answer, or drops the question that is being typed. Returns the exit status."""
    go_back(session, document)
    tokenize, worst = lambda question: document.rest(prompts.ids(question)), 0  # the first one
    with handled(at_sigterm):
        while True:
            try:
                question = clean(typed(session.args.json)).strip()
                if question:
                    document.check_unchanged()
                    worst = max(worst, answer_turn(session, question, tokenize))
                    document.check_unchanged()
                    tokenize = prompts.tokenizer.turn_ids  # of all later ones
            except KeyboardInterrupt:  # while one is typed
                pass
            except EOFError:
                printer(session.args.json)()
                return worst
            except ValueError as error:  # there is no room left
                complain(error)
                session.timer.totals()  # the times of what was refused


def at_sigterm(number: int, _):
    """Ctrl-C does nothing."""
    if number == signal.SIGTERM:
        stop(number)


def typed(as_json: bool) -> str:
    """A line from the terminal. Ctrl-C raises KeyboardInterrupt. `input` could print its prompt
    among the JSON."""
    if as_json:
        say("", "> ", end="")
    with handled(stop_once()):
        return input("" if as_json else "\n> ")


def answer_turn(session, question: str, tokenize) -> int:
    """Answer one question of a conversation. Ctrl-C at any moment of it ends the answer only.
    Returns the exit status."""
    with interrupts() as stopped:
        with session.timer("tokenize"):
            ids = tokenize(question)
        text = session.write(session.read(ids), stopped)
        report = describe(session, text, stopped(), question)
        status = finish(report, session, stopped)
    if stopped() == signal.SIGTERM:
        stop(signal.SIGTERM)
    return 0 if stopped() else status
