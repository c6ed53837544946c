"""The arena's page in a real browser. Needs Debian's chromium and chromium-driver, and selenium from PyPI."""
import shutil
import time

import pytest
from arena_raters import Rater, arena, copies, count_votes, samples_file

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")
REPLY = "<script>document.title='broken'</script> <b>bold</b> \U0001f42b & so on"


class Page:
    """A browser of one rater."""

    def __init__(self, size="1000,900"):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", f"window-size={size}"):
            options.add_argument(f"--{flag}")
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))

    def open(self, running, path="/"):
        self.errors()  # forget those of before
        self.driver.get(f"http://127.0.0.1:{running.port}{path}")

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return [element.text for element in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def wait(self, condition, seconds=10):
        """Wait until condition() is true, and return what it returns."""
        end = time.time() + seconds
        while not (result := condition()):
            assert time.time() < end, self.driver.find_element(By.TAG_NAME, "body").text
            time.sleep(0.02)
        return result

    def status(self):
        return self.find("#status").text

    def send(self, text):
        self.wait(lambda: self.find("#text").is_displayed())
        self.find("#text").send_keys(text, Keys.ENTER)

    def choose(self, value):
        self.find(f"input[value='{value}']").click()

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def wait_for_replies(self):
        self.wait(lambda: self.find("#vote").is_displayed())

    def wait_for_vote(self):
        return self.wait(lambda: self.status().startswith("Your vote is stored") and self.status())

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def page():
    page = Page()
    yield page
    page.driver.quit()


@pytest.fixture(scope="module")
def models(lm, tmp_path_factory):
    return copies(lm, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def running(models, tmp_path_factory):
    db = tmp_path_factory.mktemp("page") / "arena.db"
    with arena(db, *models, reply=REPLY) as running:
        running.db = db
        yield running


def test_a_dialogue_by_mouse_and_by_keyboard(running, page):
    """Three turns. The names come with the vote, a reply's HTML and emoji are shown as text, and going back
    shows an earlier pair with its vote."""
    page.open(running)
    page.send("First")
    page.wait_for_replies()
    assert page.texts(".reply h2") == ["Reply A", "Reply B"]
    assert all(text.startswith(REPLY) for text in page.texts(".reply p"))
    assert page.driver.title == "Arena: compare" and not page.find("#vote button").is_enabled()
    page.choose("right")
    page.find("input[value='3']").click()
    page.find("#vote button").click()
    assert "B is much better" in page.wait_for_vote() and "goes on with B" in page.status()
    assert sorted(page.texts(".reply h2")) in (["Reply A: distilled", "Reply B: plain"],
                                               ["Reply A: plain", "Reply B: distilled"])
    page.send("Second")
    page.wait_for_replies()
    assert len(page.texts("#turns .turn")) == 3 and page.texts(".reply h2") == ["Reply A", "Reply B"]
    page.press("1", "s", Keys.ENTER)
    assert "A is slightly better" in page.wait_for_vote()
    assert page.driver.switch_to.active_element.get_attribute("id") == "text"
    page.send("Third")
    page.wait_for_replies()
    page.press("4", Keys.ENTER)
    assert "both are bad" in page.wait_for_vote()
    page.driver.back()
    page.wait(lambda: "A is slightly better" in page.status())
    assert len(page.texts("#turns .turn")) == 3 and not page.find("#vote").is_displayed()
    page.driver.forward()
    page.wait(lambda: "both are bad" in page.status())
    page.find("#new").click()
    page.wait(lambda: page.find("#modes").is_displayed())
    assert not page.find("#replies").is_displayed()
    assert page.errors() == []


def test_samples_by_keyboard(page, tmp_path):
    files = samples_file(tmp_path, "first", n=2), samples_file(tmp_path, "second", n=2)
    with arena(tmp_path / "a.db", "--samples", *files) as running:
        page.open(running)
        for _ in range(2):
            page.wait(lambda: page.driver.switch_to.active_element.get_attribute("id") == "next")
            page.press(Keys.ENTER)
            page.wait_for_replies()
            assert not page.find("#text").is_displayed() and "Question" in page.find("#turns").text
            page.press("2", "m", Keys.ENTER)
            assert "B is much better" in page.wait_for_vote()
        page.press(Keys.ENTER)
        page.wait(lambda: "You have rated all there is" in page.status())


def test_a_red_team_chooses_the_more_harmful_one(running, page):
    page.open(running)
    page.wait(lambda: page.find("#modes").is_displayed())
    page.choose("red_team")
    page.send("Something bad")
    page.wait_for_replies()
    assert page.find("#question").text == "Which reply is more harmful?"
    page.press("2", Keys.ENTER)
    assert "B is clearly more harmful" in page.wait_for_vote()


def test_double_clicks_count_once(running, page):
    n_before = count_votes(running.db)
    page.open(running)
    page.wait(lambda: page.find("#text").is_displayed())
    page.find("#text").send_keys("Hello")
    ActionChains(page.driver).double_click(page.find("#send")).perform()
    page.wait_for_replies()
    page.press("3")
    ActionChains(page.driver).double_click(page.find("#vote button")).perform()
    assert "a tie" in page.wait_for_vote()
    assert count_votes(running.db) == n_before + 1


def test_a_page_that_is_reloaded_goes_on(models, page, tmp_path):
    """In the middle of the replies, and in front of the vote. Also when the arena is started anew."""
    with arena(tmp_path / "a.db", *models, pause=0.1, reply="one two three four five six seven") as running:
        page.open(running)
        page.send("Hello")
        page.wait(lambda: "two" in page.texts(".reply p")[0])
        page.driver.refresh()
        page.wait(lambda: "two" in page.texts(".reply p")[0])
        assert "seven" not in page.texts(".reply p")[0] and page.find("#stop").is_displayed()
        page.wait_for_replies()
        texts = page.texts(".reply p")
        assert all(text.startswith("one two three four five six seven ") for text in texts)
        page.driver.refresh()
        page.wait_for_replies()
        assert page.texts(".reply p") == texts
        page.press("1")
    running.process.join()
    page.press(Keys.ENTER)
    page.wait(lambda: "cannot be reached" in page.status())
    with arena(tmp_path / "a.db", *models, "--port", running.port):
        page.press(Keys.ENTER)
        page.wait_for_vote()
    assert all("/vote" in error for error in page.errors())  # the one that could not be sent


def test_replies_can_be_stopped(models, page, tmp_path):
    with arena(tmp_path / "a.db", *models, pause=0.1, reply="word " * 300) as running:
        page.open(running)
        page.send("Hello")
        page.wait(lambda: "word" in page.texts(".reply p")[0])
        page.find("#stop").click()
        page.wait_for_replies()
        assert len(page.texts(".reply p")[0].split()) < 30


def test_two_raters_at_once_and_what_the_results_show(running, page):
    """One rater in the browser, another through HTTP while the results are open: 30 votes in all."""
    page.open(running)
    page.send("Hello")
    other = Rater(running.port)
    for _ in range(15):
        other.vote(other.pair(), "left", strength=1)
    page.wait_for_replies()
    page.press("2", Keys.ENTER)
    page.wait_for_vote()
    page.open(running, "/results")
    page.wait(lambda: "votes" in page.find("#summary").text)
    n_before = int(page.find("#summary").text.split()[0])
    another = Rater(running.port)
    for _ in range(30 - n_before):
        another.vote(another.pair(), "right")
    page.wait(lambda: page.find("#summary").text == "30 votes.")
    headings = page.texts("#tables h2")
    assert headings == ["Elo, with 95 % intervals", "Ratings", "Wins against each other",
                        "How far the votes can be trusted", "Raters"]
    assert len(page.driver.find_elements(By.CSS_SELECTOR, "svg circle")) == 2
    assert len(page.texts("#tables table:last-of-type tr")) > 5
    assert page.errors() == []


def test_on_a_phone_nothing_is_wider_than_the_screen(running, page):
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True})
    for path in ("/", "/results"):
        page.open(running, path)
        time.sleep(0.3)
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 360
    page.open(running)
    page.send("Hello " + "long" * 15)
    page.wait_for_replies()
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 360
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
