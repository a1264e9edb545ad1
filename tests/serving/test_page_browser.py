"""The page in a browser: headless Chromium by its driver, with the keyboard, at phone width, in the dark.

Skipped where there is no Chromium; `.ci/run` installs it where it can.
"""

import shutil

import polars as pl
import pytest

from recllm.serving.recommender import Recommender
from tests.serving.live import live, served

selenium = pytest.importorskip("selenium", reason="selenium is not installed; wanted pip install -e '.[dev]'")

from selenium import webdriver  # noqa: E402 - it may be missing
from selenium.webdriver.chrome.service import Service as Driver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no Chromium with its driver; wanted apt-get install chromium chromium-driver",
)

PATIENCE = 120
"""Seconds until a test that waits for what does not come fails."""
HOSTILE = '<img src=x onerror="document.title=1">&amp;'


@pytest.fixture(scope="module")
def address(recommender):
    """A service whose first item has a title that would be markup."""
    hostile = Recommender(recommender.parts, recommender.name, recommender.dataset)
    titles = hostile.item_titles.to_list()
    titles[2] = HOSTILE
    hostile.item_titles = pl.Series(titles)
    with live(lambda: served(hostile), deadline=PATIENCE) as it:
        yield it.url


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    # Nothing but the service itself can be reached.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Driver(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a test does with the page."""

    def __init__(self, browser):
        self.browser = browser

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition):
        return WebDriverWait(self.browser, PATIENCE).until(lambda _: condition())

    def answered(self, words):
        """Wait until the status says something."""
        self.until(lambda: words in self.one("#status").text)

    @property
    def focus(self):
        return self.browser.switch_to.active_element

    @property
    def recommended(self):
        return [title.text for title in self.all("#steps > :last-child button.title")]


@pytest.fixture
def page(browser, address):
    """The page as it opens: the first user that the log knows is asked about."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get(address)
    it = Page(browser)
    it.answered("10 items for user")
    yield it
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_it_opens_with_the_lists_of_a_user(page, recommender):
    user = int(page.one("#user").get_attribute("value"))
    assert page.recommended == recommender.recommend([user], k=10)["title"].to_list()
    captions = [caption.text.splitlines()[0] for caption in page.all("#steps caption")]
    assert captions == ["1. popularity", "2. crm", "3. lm: what is recommended"]
    assert len(page.all("#prompts pre")) == 2
    assert len(page.all("#gate tbody tr")) > 1
    assert page.all("#retrieved tbody tr")
    assert page.one("#results").get_attribute("aria-busy") == "false"
    assert not page.one("#alert").is_displayed()
    headings = [heading.text for heading in page.all("h2") if heading.is_displayed()]
    assert headings[:3] == ["Who", "Add an event", "The list after each step"]


def test_an_event_less_changes_the_list_and_can_be_undone(page, recommender):
    before = page.recommended
    button = page.one("#history button")
    assert button.accessible_name.startswith("Remove ")
    button.click()
    page.until(lambda: page.one("#changes").is_displayed())
    page.until(lambda: page.focus.get_attribute("id") == "changes-heading")
    lines = [line.text for line in page.all("#moves tbody tr")]
    assert len(lines) >= 10
    assert "Without" in page.one("#change-words").text
    assert page.recommended != before or all("new" not in line for line in lines)
    page.one("#undo").click()
    page.until(lambda: not page.one("#changes").is_displayed())
    page.until(lambda: page.recommended == before)


def test_a_taste_is_clicked_together_by_keyboard_alone(page):
    # From the top: the link to the results, the user's id, its button, then nobody.
    page.browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    names = []
    for _ in range(4):
        page.focus.send_keys(Keys.TAB)
        names.append(page.focus.get_attribute("id") or page.focus.text)
    assert names == ["To the results", "user", "Show", "nobody"]
    page.focus.send_keys(Keys.ENTER)
    page.answered("nobody in particular")
    assert "most popular" in page.one("#steps-words").text
    page.until(lambda: page.focus.get_attribute("id") == "query")
    page.focus.send_keys("onerror")
    page.until(lambda: page.one("#found-status").text == "1 item found.")
    # Its title is text, and nothing of it was run.
    assert page.one("#found button").text == f"Add {HOSTILE}"
    assert not page.all("#found img")
    page.focus.send_keys(Keys.TAB)
    assert page.focus.get_attribute("id") == "opinion"
    page.focus.send_keys(Keys.TAB)
    assert page.focus.text == f"Add {HOSTILE}"
    page.focus.send_keys(Keys.SPACE)
    page.until(lambda: page.focus.get_attribute("id") == "changes-heading")
    assert f"With {HOSTILE} (rated 5)" in page.one("#change-words").text
    assert page.one("#history tbody th").text.startswith(HOSTILE)
    assert page.browser.title == "Why this list? – recllm"
    assert not page.all("main img")


def test_a_title_is_asked_about(page):
    last = page.all("#steps > :last-child button.title")[-1]
    title = last.text
    last.click()
    page.until(lambda: title in page.one("#retrieved-words").text)
    page.until(lambda: page.focus.get_attribute("id") == "retrieved-heading")
    assert page.all("#steps > :last-child button.title")[-1].get_attribute("aria-pressed") == "true"
    assert title in page.all("#prompts pre")[-1].text


def test_what_goes_wrong_is_said(page, address):
    page.browser.execute_script("state.removed = [123456]; ask()")
    page.until(lambda: page.one("#alert").is_displayed())
    assert "event 123456 is removed; wanted 0 to" in page.one("#alert").text
    page.one("#who button").click()
    page.until(lambda: not page.one("#alert").is_displayed())
    # The browser notes the refusal itself; nothing else was wrong.
    notes = [line for line in page.browser.get_log("browser") if line["level"] == "SEVERE"]
    assert all("422" in line["message"] for line in notes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(page, scheme):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
    )
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    width = page.browser.execute_script("return document.documentElement.scrollWidth")
    assert width == 390
    light = page.browser.execute_script(
        "const [r, g, b] = getComputedStyle(document.querySelector('h1')).color.match(/\\d+/g).map(Number);"
        "return r + g + b > 384"
    )
    assert light == (scheme == "dark")
    for selector in ("#user", "#query", "#opinion", "#nobody", "#undo"):
        if page.one(selector).is_displayed():
            assert page.one(selector).size["height"] >= 36, selector  # fingers
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
