"""The page in a real browser: Chromium, driven by playwright."""

import pathlib
import shutil
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("playwright")

from playwright import sync_api

from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.serving.access import Access
from tests.serving import live, small

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 30_000  # milliseconds
SIZES = {"wide": (1280, 800), "narrow": (360, 740)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # playwright's own transport
]


@pytest.fixture(scope="module")
def server():
    small.rows().warm_up()
    with live.serving() as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, browser):
    """Open the page, and fail if it logs anything or asks another host."""
    said, contexts = [], []

    def call(size="wide", scheme="light"):
        width, height = SIZES[size]
        view = {"width": width, "height": height}
        contexts.append(browser.new_context(viewport=view, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        is_other = lambda request: not request.url.startswith((server.url, "data:"))
        page.on("request", lambda x: said.append(x.url) if is_other(x) else None)
        page.goto(server.url)
        page.get_by_role("radio").first.wait_for()
        return page

    yield call
    for context in contexts:
        context.close()
    refused = "Failed to load resource: the server responded with a status of 400 (Bad Request)"
    assert [x for x in said if x != refused] == []


def ask(page, prompt, tokens=6, temperature=0):
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Maximum tokens").fill(str(tokens))
    page.get_by_label("Temperature").fill(str(temperature))
    page.get_by_role("button", name="Send").click()


def finished(page):
    page.locator("#output[aria-busy=false]").wait_for()
    return page.locator("#output").text_content()


def test_an_adapter_is_chosen_and_answers(open_page):
    page = open_page()
    assert page.get_by_role("radio").count() == 3 and page.get_by_label("API key").is_hidden()
    assert page.get_by_text("base with 2 adapters, 64 tokens of context").is_visible()
    page.get_by_role("radio", name="french").check()
    page.get_by_label("Task").select_option("text")
    ask(page, "Hello")
    tokenizer = byte_tokenizer()
    wanted = tokenizer.decode(small.alone(tokenizer.encode_prompt("Hello"), 1, 6))
    assert finished(page) == wanted
    assert page.get_by_role("heading", name="Answer of french").is_visible()
    status = page.get_by_role("status").text_content()
    assert status.startswith("6 tokens in ") and "after a prompt of 5, cut at the maximum" in status


def test_errors_are_shown(open_page):
    page = open_page()
    ask(page, "x" * 100)
    page.locator("#status.bad").wait_for()
    assert "maximum context length is 64 tokens" in page.get_by_role("status").text_content()
    assert page.get_by_role("button", name="Send").is_enabled()


def test_a_key_is_asked_for(browser, tmp_path):
    with live.serving(access=Access("s3cret")) as locked:
        page = browser.new_page(color_scheme="dark", viewport={"width": 360, "height": 740})
        page.set_default_timeout(PATIENCE)
        page.goto(locked.url)
        page.get_by_text("Give the server's API key to begin.").wait_for()
        assert page.get_by_role("radio").count() == 0
        field = page.get_by_label("API key")
        field.fill("wrong")
        field.press("Tab")
        page.get_by_text("This is not the server's key.").wait_for()
        assert field.bounding_box()["height"] >= 44
        page.screenshot(path=tmp_path / "key.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        field.fill("s3cret")
        field.press("Tab")
        page.get_by_role("radio").first.wait_for()
        assert page.get_by_role("status").text_content() == ""
        ask(page, "Hello")
        finished(page)
        assert page.get_by_role("status").text_content().startswith("6 tokens in ")
        page.close()


def test_an_answer_can_be_stopped(open_page, server, monkeypatch):
    step = small.rows().step
    monkeypatch.setattr(small.rows(), "step", lambda: (time.sleep(0.1), step())[1])
    page = open_page()
    page.get_by_label("Prompt", exact=True).fill("a")
    page.get_by_label("Maximum tokens").fill("50")
    page.keyboard.press("Control+Enter")
    page.get_by_text("Answering …").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("Stopped.").wait_for()
    end = time.monotonic() + 10
    while server.scheduler.load[0]:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(open_page, size, scheme, tmp_path):
    """Nothing scrolls sideways, targets are large enough to touch, and text has contrast."""
    page = open_page(size, scheme)
    ask(page, "Hello")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for control in page.locator("button, select, input[type=number], .models label").all():
        assert control.bounding_box()["height"] >= 44
    pairs = page.evaluate(CONTRASTS)
    assert len(pairs) > 10 and min(pairs.values()) >= 4.5, pairs
    shot = pathlib.Path(tmp_path / f"{scheme}-{size}.png")
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 5000


# The contrast, as WCAG computes it, of every element that has text of its own.
CONTRASTS = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = color => color.slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(x => x.nodeType === 3 && x.textContent.trim());
    const hidden = node.disabled || !node.checkVisibility();
    if (!own || hidden || ["SCRIPT", "OPTION"].includes(node.tagName)) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    found[`${node.tagName} ${node.textContent.trim().slice(0, 20)}`] =
      (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
}"""
