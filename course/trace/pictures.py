"""Pictures of a trace page: python -m course.trace.pictures PAGE.html --out PREFIX

Writes PREFIX_light.png and PREFIX_dark.png, of the page as it opens. It needs
`pip install playwright` and a Chromium.
"""

import argparse
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_page(path: Path, scheme: str = "light", width: int = 1280, height: int = 800,
              ready: str = "#answer [role=button]", **how):
    """The page in a browser that cannot reach any network, when it has an element that `ready`
    selects. Yields playwright's `Page` and a list of what the page complains of or tries to fetch.
    `how` are more options of the page, of playwright. ValueError if there is no browser."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        raise ValueError("no Chromium, or no playwright (pip install playwright)")
    complaints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme,
                                reduced_motion="reduce", offline=True, **how)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url))
        page.goto(path.resolve().as_uri())
        page.wait_for_selector(ready)
        complaints.remove(path.resolve().as_uri())  # the page itself
        yield page, complaints
        browser.close()


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", required=True, help="how the names of the pictures begin")
    args = parser.parse_args(arguments)
    try:
        for scheme in ("light", "dark"):
            with open_page(args.page, scheme) as (page, _):
                page.screenshot(path=f"{args.out}_{scheme}.png")
    except ValueError as error:
        print(f"pictures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
