"""The web page of the server, in Chromium."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from serving import Running, serving

from turbosparse.pack import pack
from turbosparse.serving.app import PAGE

TOKENS = 12
KEY = "a key"


@pytest.fixture
def server(packed_mistral: Path) -> Iterator[Running]:
    with serving(packed_mistral) as running:
        yield running


class Page:
    """What a user sees and does. Elements are named by CSS selectors."""

    def __init__(self, browser: Any, address: str, width: int = 1280, **settings: object):
        self.browser = browser
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(address + "/page/theme.js")  # a storage that nothing fills
        given = {"temperature": 0, "max_tokens": TOKENS, **settings}
        self.script("localStorage['turbosparse.settings'] = JSON.stringify(arguments[0])", given)
        browser.get(address)
        browser.get_log("browser")
        self.load()

    def load(self) -> None:
        self.browser.refresh()
        self.wait(lambda: self.text("#model") or self.script("return settings.open"))

    def script(self, source: str, *given: object) -> Any:
        return self.browser.execute_script(source, *given)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        return str(self.all(selector)[-1].text)

    def click(self, selector: str) -> None:
        self.all(selector)[-1].click()

    def type(self, selector: str, text: str) -> None:
        self.all(selector)[-1].send_keys(text)

    def wait(self, until: Callable[[], object]) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.browser, 60, poll_frequency=0.05).until(lambda _: until())

    def ask(self, text: str, *, wait: bool = True) -> None:
        self.type("#input", text + "\n")
        if wait:
            self.wait(lambda: self.idle)

    @property
    def idle(self) -> bool:
        return bool(self.script("return send.ariaLabel === 'Send'"))

    @property
    def tokens(self) -> int:
        """Columns of the heat map; 0 before there is one."""
        return int(self.script("return map.style.width ? map.width : 0"))

    @property
    def stored(self) -> list[list[str]]:
        """The texts of every conversation that the browser keeps."""
        return list(
            self.script(
                "return Object.keys(localStorage).filter((name) => name.includes('.chat.'))"
                ".map((name) => JSON.parse(localStorage[name]).messages.map((m) => m.content))"
            )
        )

    def errors(self) -> list[str]:
        return [line["message"] for line in self.browser.get_log("browser")]


def test_a_message_is_answered_and_its_sparsity_shown(browser: Any, server: Running) -> None:
    page = Page(browser, server.address)
    page.ask("One")
    assert [len(texts) for texts in page.stored] == [2]
    assert page.text("article.user .body") == "One"
    shown = page.script("return [map.width, map.height, map.getBoundingClientRect().width]")
    assert shown[:2] == [TOKENS, 2]
    assert shown[2] > 10
    asleep = float(page.text("#asleep").removesuffix(" %"))
    assert 10 < asleep < 90
    assert page.text("article.assistant footer").endswith(f"{asleep:.0f} % asleep")
    colours = page.script(
        "const { data } = map.getContext('2d').getImageData(0, 0, map.width, map.height);"
        "return new Set(Array.from({ length: data.length / 4 }, (_, i) => data[4 * i])).size"
    )
    assert colours > 1
    assert "(" in page.text("#read")
    assert "prompt tokens read" in page.text("#list")
    assert page.errors() == []


def test_the_experts_of_a_mixture_are_counted(
    browser: Any, sparse: Callable[..., Path], shared: Callable[..., Path]
) -> None:
    packed = shared("packed-mixtral-q8", partial(pack, str(sparse("mixtral")), quant="q8"))
    with serving(packed) as running:
        page = Page(browser, running.address)
        page.ask("One")
        assert "experts used\n2 of 4" in page.text("#list")


def test_a_reload_keeps_the_conversation_and_its_figures(browser: Any, server: Running) -> None:
    page = Page(browser, server.address)
    page.ask("One")
    page.ask("Two")

    def seen() -> list[Any]:
        bodies = [body.text for body in page.all("article .body")]
        return [*bodies, page.text("#panel"), page.script("return map.toDataURL()")]

    before = seen()
    page.load()
    assert seen() == before
    assert len(page.all("article")) == 4
    page.click("#new")
    assert page.all("article") == []
    page.click("#conversations button:first-child")
    assert len(page.all("article")) == 4
    page.browser.execute_script("document.querySelector('.remove').click()")
    assert page.stored == []
    assert page.errors() == []


def test_an_answer_is_stopped_and_written_anew(browser: Any, server: Running) -> None:
    page = Page(browser, server.address, max_tokens=60)
    server.slow_down(0.1)
    page.ask("One", wait=False)
    page.wait(lambda: page.tokens >= 2)
    page.click("#send")
    page.wait(lambda: page.idle)
    assert "Stopped." in page.text("article.assistant footer")
    page.wait(lambda: server.count("requests_total", end="cancelled") == 1)
    assert 2 <= page.tokens < 60
    page.click("button[title='Write the answer anew']")
    page.wait(lambda: not page.idle)
    page.type("body", "\ue00c")  # Escape
    page.wait(lambda: page.idle)
    page.wait(lambda: server.count("requests_total", end="cancelled") == 2)
    assert len(page.all("article")) == 2


def test_an_error_of_the_server_stands_under_the_message(browser: Any, server: Running) -> None:
    page = Page(browser, server.address)
    page.ask("x" * 1000)
    assert "shorten the prompt" in page.text("article.assistant footer")
    assert page.idle


@pytest.mark.parametrize("width", [320, 390])
def test_nothing_is_wider_than_a_phone(browser: Any, server: Running, width: int) -> None:
    page = Page(browser, server.address, width)

    def fits() -> bool:
        return bool(page.script("return document.documentElement.scrollWidth <= innerWidth"))

    assert fits()
    page.ask("A message " + "that-goes-on" * 12)
    assert fits()
    for opens, drawer, closes in (
        ("#panel-open", "#panel", "#panel-close"),
        ("#sidebar-open", "#sidebar", "#shade"),
    ):
        assert not page.all(drawer)[0].is_displayed()
        page.click(opens)
        page.wait(lambda drawer=drawer: page.all(drawer)[0].is_displayed())
        assert fits()
        page.script("document.querySelector(arguments[0]).click()", closes)
        page.wait(lambda drawer=drawer: not page.all(drawer)[0].is_displayed())


def test_settings_are_kept_and_sent(browser: Any, packed_mistral: Path) -> None:
    with serving(packed_mistral, key=KEY) as running:
        page = Page(browser, running.address, max_tokens=3)
        assert page.all("#settings")[0].is_displayed(), "a missing key asks for one"
        page.type("[name=key]", KEY)
        page.type("[name=system]", "Be brief.")
        page.script("document.querySelector('[name=theme]').value = 'dark'")
        page.script(
            "document.querySelector('[name=theme]').dispatchEvent(new Event('input', {bubbles: 1}))"
        )
        page.click("#settings .primary")
        page.wait(lambda: page.text("#model") == packed_mistral.name)
        page.load()
        page.ask("One")
        assert page.tokens == 3
        assert "longest answer" in page.text("article.assistant footer")
        dark = page.script("return getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", dark))) < 150


MARKDOWN = {
    "plain <b>text</b>": "<p>plain &lt;b&gt;text&lt;/b&gt;</p>",
    "a\n\nb\nc": "<p>a</p><p>b\nc</p>",
    "## Head **bold**": "<h4>Head <strong>bold</strong></h4>",
    "*a* **b *c*** `<i>` ~~d~~": (
        "<p><em>a</em> <strong>b <em>c</em></strong> <code>&lt;i&gt;</code> <del>d</del></p>"
    ),
    "2 * 3 * 4 and snake_case_name": "<p>2 * 3 * 4 and snake_case_name</p>",
    "- a\n- b\n  - c\n\n1. d": (
        "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ul>"
        '<ol start="1"><li><p>d</p></li></ol>'
    ),
    "> said\n> so": "<blockquote><p>said\nso</p></blockquote>",
    "a | b\n--|--\n1 | <x>": (
        '<div class="table"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1</td><td>&lt;x&gt;</td></tr></tbody></table></div>"
    ),
    "```py\nx = '<b>'\n\ny": (
        '<figure class="code"><div class="head"><span>py</span><button type="button" class="copy">'
        "Copy</button></div><pre><code>x = '&lt;b&gt;'\n\ny</code></pre></figure>"
    ),
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "[x](https://a.b/c)": (
        '<p><a href="https://a.b/c" target="_blank" rel="noopener noreferrer">x</a></p>'
    ),
    "\\*a\\*": "<p>*a*</p>",
    "---": "<hr>",
}


def test_markdown_becomes_nodes_and_never_markup(browser: Any, server: Running) -> None:
    Page(browser, server.address)
    made = browser.execute_async_script(
        "const [texts, done] = arguments; import('/page/markdown.js').then(({ render }) => {"
        "  done(texts.map((text) => {"
        "    const grown = document.createElement('div'), whole = document.createElement('div');"
        "    for (let end = 1; end <= text.length; end++) render(grown, text.slice(0, end));"
        "    render(whole, text);"
        "    return [grown.innerHTML, whole.innerHTML];"
        "  }));"
        "}, (error) => done(`${error}`));",
        list(MARKDOWN),
    )
    for (text, expected), (grown, whole) in zip(MARKDOWN.items(), made, strict=True):
        assert whole == expected, text
        assert grown == expected, f"{text}, letter by letter"


def test_no_text_keeps_the_renderer_busy(browser: Any, server: Running) -> None:
    Page(browser, server.address)
    busy = ["*" * 20_000, "[" * 20_000, "> " * 5_000, "- " * 5_000, "`a" * 10_000, "|-" * 10_000]
    lengths = browser.execute_async_script(
        "const [texts, done] = arguments; import('/page/markdown.js').then(({ render }) => {"
        "  done(texts.map((text) => {"
        "    const made = document.createElement('div'); render(made, text);"
        "    return made.textContent.length;"
        "  }));"
        "}, (error) => done(`${error}`));",
        busy,
    )
    assert all(isinstance(length, int) for length in lengths), lengths


def test_the_page_holds_no_inline_script_and_nothing_from_elsewhere() -> None:
    sources = {path.name: path.read_text() for path in PAGE.iterdir()}
    html = sources["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for name, source in sources.items():
        assert "innerHTML" not in source, name
        found = re.findall(r"https?://[\w./]+", source)
        assert set(found) <= {"http://www.w3.org/2000/svg"}, name
    for linked in re.findall(r'(?:src|href)="([^"]+)"', html):
        assert linked in sources
