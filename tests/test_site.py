"""The course as pages and as slides: nothing is left out, and every link leads somewhere."""

import doctest
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from conftest import ROOT
from test_trace import in_browser

from benchmarks import bus
from course import pages, site, slides

LESSONS = pages.lessons()


class Links(HTMLParser):
    """What a page refers to, what can be referred to in it, and how often each element begins."""

    def __init__(self, path):
        super().__init__()
        self.links, self.sources, self.anchors, self.tags = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        self.anchors.add(named.get("id"))
        self.links += [named["href"]] if tag == "a" and "href" in named else []
        self.sources += [named["href"]] if tag == "link" else []
        self.sources += [named[name] for name in ("src", "srcset") if name in named]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    assert site.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def deck(out):
    return out / "slides.html"


def test_every_link_of_the_site_leads_somewhere(out):
    found = {path: Links(path) for path in out.rglob("*.html")}
    for path, page in found.items():
        for link in page.links + page.sources:
            if link.startswith(("data:", "https://", "http://")):
                assert link.startswith("data:") or link in page.links, f"{path}: {link}"
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.is_file() and target.is_relative_to(out), f"{path}: {link}"
            assert not anchor or anchor in found[target].anchors, f"{path}: {link}"


def test_no_lesson_is_left_out(out):
    start, search = Links(out / "index.html"), (out / "search.js").read_text(encoding="utf-8")
    for lesson in LESSONS:
        name = f"course/{lesson.stem}.html"
        page, text = Links(out / name), lesson.read_text(encoding="utf-8")
        assert name in start.links and f'"page": "{name}"' in search
        assert page.tags.count("details") == text.count("<details>") + 1  # the menu
        assert page.tags.count("h2") == len(re.findall("^## ", text, re.MULTILINE)) + 2
        assert page.tags.count("figcaption") >= 1  # the project's lines


def test_a_page_has_what_its_lesson_has(out):
    (lesson,) = [lesson for lesson in LESSONS if pages.name_of(lesson) == "which_sentence"]
    page = (out / "course" / f"{lesson.stem}.html").read_text(encoding="utf-8")
    line = (ROOT / "sentencekv.py").read_text("utf-8").splitlines().index(
        "def gaussian(q, vectors, variances, lengths) -> torch.Tensor:") + 1
    assert f'<a href="../sentencekv.py.html#L{line}">sentencekv.gaussian</a>' in page
    assert '<details><summary>Answer</summary>\n<p>' in page
    assert '<span class="keyword">def</span> gaussian' in page and "<!-- table" not in page


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        assert site.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"course.site: {path} is not ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_site_and_a_deck_are_written_over(out, deck, tmp_path, capsys):
    site.check_empty(out)
    again = tmp_path / "slides.html"
    again.write_bytes(deck.read_bytes())
    assert slides.main([str(again)]) == 0
    again.write_text("mine")
    assert slides.main([str(again)]) == slides.main([str(tmp_path / "no" / "deck.html")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and again.read_text() == "mine"


def test_a_link_to_nothing_is_said_in_one_line(out):
    made = site.Site(out)
    with pytest.raises(ValueError, match="README.md has a link to absent.md, which is not there"):
        made.linked(ROOT / "README.md", '<a href="absent.md">', out)
    with pytest.raises(ValueError, match="which is not there"):
        made.followed(ROOT / "README.md", "../outside.md")


def test_the_deck_needs_nothing_and_shows_every_lesson(deck):
    page = Links(deck)
    assert 22 <= page.tags.count("section") <= 30
    assert all(source.startswith("data:image/") for source in page.sources)
    assert all(link.startswith("https://") for link in page.links)
    plan = slides.plan(slides.PLAN.read_text(encoding="utf-8"))
    shown = {slide.document.path for slide in plan}
    assert shown >= set(LESSONS) and all(slide.chapters for slide in plan)
    counts = [sum(name in slide.chapters for slide in plan) for name in slides.CHAPTERS.values()]
    assert 10 <= counts[0] <= 15 and min(counts) >= 10
    assert "url(" not in deck.read_text(encoding="utf-8")


@pytest.mark.parametrize("text, message", [
    ("which_sentences talk", "'which_sentences talk' must be the name of a lesson"),
    ("which_sentence 3", "must be the name of a lesson, and perhaps talk, 1, 2"),
    ("which_sentence\n    A score", "0 sentences of .*which_sentence.md begin with 'A score'"),
    ("which_sentence\n    The", r"\d+ sentences of .*which_sentence.md begin with 'The'"),
    ("which_sentence\n    figure absent", "which_sentence.md has no figure absent"),
    ("which_sentence\n    table The words", "has no table in 'The words'"),
    ("which_sentence\n    list Absent", "has no bullet_list in 'Absent'"),
])
def test_a_piece_that_is_not_there_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        for slide in slides.plan(text):
            slide.pieces()


def test_a_sentence_is_taken_whole_and_alone():
    (slide,) = slides.plan("which_sentence 2\n    A *score* is\n")
    heading, (piece,) = slide.pieces()
    assert heading == "The words" and slide.chapters == ["session-2"]
    assert piece.startswith("<p>A <em>score</em> is a number") and piece.endswith("selected.</p>")


def test_headings_are_named_as_on_github():
    taken = set()
    assert pages.new_anchor("What's `this`?", taken) == "whats-this"
    assert pages.new_anchor("Whats this", taken) == "whats-this-1"


def test_code_is_coloured_and_kept():
    code = '>>> x = "a # b"  # if <c>\nFalse\n'
    found = pages.coloured(code)
    assert '<span class="comment"># if &lt;c&gt;</span>' in found
    assert '<span class="string">&quot;a # b&quot;</span>' in found
    assert re.sub("<[^>]*>", "", found) == pages.escape(code)


NOTES = (ROOT / "course" / "instructor.md").read_text(encoding="utf-8")


def test_the_notes_are_about_every_lesson_and_have_twenty_questions():
    for lesson in LESSONS:
        title = pages.Document(lesson).title.partition(". ")[2]
        part = NOTES.partition(f"### {title}\n")[2].partition("#")[0]
        for name in ("The point", "The usual misunderstanding", "Ask", "Answer"):
            assert f"*{name}.*" in part, f"{title}: {name}"
    questions = re.findall(r"^\*\*(\d+)\.\*\* \*(\d+) points, \[(.*?)\]", NOTES, re.MULTILINE)
    assert [int(number) for number, _, _ in questions] == [*range(1, 21)]
    assert f"{sum(int(points) for _, points, _ in questions)} points" in NOTES


@pytest.mark.parametrize("name", ["instructor.md", "lab_gpu.md"])
def test_what_they_compute_is_right(name):
    text = (ROOT / "course" / name).read_text(encoding="utf-8")
    examples = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, name, name, 0)
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


def test_the_lab_s_program_prints_a_line_for_each_number_of_rows(capsys):
    assert bus.main(["--device", "cpu", "--rows", "50", "--missing", "1,7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 1", "| 7"]
    assert len(set(line.count("|") for line in lines[-4:])) == 1
    assert bus.main(["--missing", "0"]) == 2


OVERFLOW = """selector => {
    const element = document.querySelector(selector);
    return element.scrollHeight - element.clientHeight;
}"""


@pytest.mark.slow
def test_the_deck_is_turned_by_keys_and_every_slide_fits(deck):
    with in_browser(deck, height=800, ready="section:not([hidden])") as (page, complaints):
        n_slides = page.locator("section").count()
        for number in range(1, n_slides + 1):
            assert page.evaluate("location.hash") == f"#{number}"
            assert page.locator("section:visible").count() == 1
            for part in ("", " .pieces"):
                overflow = page.evaluate(OVERFLOW, f"section:not([hidden]){part}")
                assert overflow <= 1, f"slide {number}{part}"
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Home")
        page.select_option("#chapter", "talk")
        page.keyboard.press("PageDown")
        assert page.evaluate("location.hash") == "#talk/2" and not complaints
        page.evaluate("location.hash = 'session-2'")
        page.wait_for_function("location.hash === '#session-2/1'")
        page.emulate_media(media="print")
        chapter = page.locator("section[data-chapters~=session-2]").count()
        assert 0 < page.locator("section:visible").count() == chapter < n_slides


@pytest.mark.slow
def test_a_search_finds_folded_answers_of_other_lessons(out):
    with in_browser(out / "index.html", width=390, ready="main") as (page, complaints):
        page.keyboard.press("/")
        page.keyboard.type("seeds longest query")
        page.keyboard.press("Enter")
        page.wait_for_selector("details[open] mark")
        assert "which_sentence" in page.url and page.locator("details[open]").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert all(line.startswith(out.as_uri()) for line in complaints)
