"""The page in a real browser: chromium, headless, driven through selenium; no network but loopback."""

import json
import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flask", reason="pip install 'minirlhf[feedback]'")
import chromium  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from benchmarks.feedback import running_server  # noqa: E402
from minirlhf import data  # noqa: E402
from minirlhf.feedback.export import tables  # noqa: E402
from minirlhf.feedback.store import Store  # noqa: E402

pytestmark = chromium.needs_browser
PAYLOADS = [
    "<script>window.pwned=1</script>",
    '<img src=x onerror="window.pwned=1">',
    "</p><svg onload=window.pwned=1>",
]
MEANS = {
    "1": ("left", 2),
    "2": ("left", 1),
    "3": ("tie", None),
    "4": ("right", 1),
    "5": ("right", 2),
    "0": ("bad", None),
}
PAUSE = 0.3  # the page takes no key sooner than .2 s after it has shown an item


@contextmanager
def browser(profile: Path, size: str = "1100,760"):
    with chromium.browser(profile, size) as driver:
        yield Tab(driver)


class Tab:
    def __init__(self, driver):
        self.driver = driver

    def find(self, name: str):
        return self.driver.find_element(By.ID, name)

    def until(self, condition, what: str):
        return WebDriverWait(self.driver, chromium.WAIT, 0.02).until(lambda _: condition(), what)

    def text(self, name: str) -> str:
        return self.driver.execute_script("return document.getElementById(arguments[0]).textContent", name)

    def join(self, address: str, name: str) -> None:
        self.driver.get(address)
        self.until(lambda: self.find("name").is_displayed(), "the form")
        self.find("name").send_keys(name, Keys.ENTER)
        self.until(lambda: self.find("item").is_displayed() or self.find("done").is_displayed(), "an item")

    def key(self, key: str) -> None:
        time.sleep(PAUSE)
        self.driver.switch_to.active_element.send_keys(key)

    def vote(self, key: str, note: str = "") -> None:
        """Press a key and wait until the page has counted one more."""
        done = int(self.text("count").split()[0])
        if note:
            self.key("n")
            self.driver.switch_to.active_element.send_keys(note, Keys.ESCAPE)
        self.key(key)
        self.until(lambda: int(self.text("count").split()[0]) == done + 1, f"the answer to {key}")

    def shown(self) -> tuple:
        """(prompt, the texts in their order), read at once: the page may be about to change."""
        ids = "['#prompt', '.text'].flatMap((s) => [...document.querySelectorAll(s)])"
        return tuple(self.driver.execute_script(f"return {ids}.map((e) => e.textContent)"))


def pressed(store: Store) -> list:
    """What the store holds of each vote, as keys and in the order in which the texts were shown."""
    found = []
    for v in store.judgements():
        if v["mode"] == "rating":
            found.append(((v["prompt"], v["a"]), str(v["rating"])))
        else:
            side = {v["shown"][0]: "left", v["shown"][1]: "right"}.get(v["choice"], v["choice"])
            key = next(k for k, meaning in MEANS.items() if meaning == (side, v.get("strength")))
            found.append(((v["prompt"], *(v[c] for c in v["shown"])), key))
    return found


def test_ten_items_in_each_mode_by_keyboard_undo_and_resume(make_store, tmp_path):
    store = make_store(pairs=10, ratings=10, raters=1)
    done = []
    with running_server(store.path, "--repeat-every", 0) as (_, address):
        with browser(tmp_path / "first") as tab:
            tab.join(address, "Ann")
            for key in "1234502":
                done.append((tab.shown(), key))
                tab.vote(key, "two lines" if key == "0" else "")
            # Undo the last, and judge it the other way.
            tab.key("u")
            tab.until(lambda: tab.text("count").startswith("6"), "undo")
            assert tab.shown() == done[-1][0] and "You said: Left" in tab.text("previous")
            done[-1] = (done[-1][0], "4")
            tab.vote("4")
            left_off = tab.shown()
        with browser(tmp_path / "second") as tab:  # another browser, the next day
            tab.join(address, "ann")
            assert tab.text("count").startswith("7 done") and tab.shown() == left_off
            for key in [Keys.ARROW_LEFT, "5", "3", *"1234512345"]:
                done.append((tab.shown(), "2" if key == Keys.ARROW_LEFT else key))
                tab.vote(key)
            assert tab.find("done").is_displayed()
    assert len(done) == 20 and pressed(store) == done
    assert [v["note"] for v in store.judgements() if "note" in v] == ["two lines"]
    assert all(v["seconds"] > 0 for v in store.judgements())

    # The export holds exactly that.
    found, said = tables(store), dict(done)
    for row in found["preferences"]:
        order = (row["prompt"], row["response_a"], row["response_b"])
        key = said.get(order) or said[order[0], order[2], order[1]]
        choice = {"left": "a", "right": "b"}.get(MEANS[key][0], "tie")
        if order not in said:
            choice = {"a": "b", "b": "a"}.get(choice, choice)
        assert row["votes"] == {"ann": choice}
    ratings = [(row["prompt"], row["response"], row["ratings"], row["scale"]) for row in found["ratings"]]
    assert ratings == [(*texts, {"ann": int(key)}, (1, 5)) for texts, key in done[10:]]
    assert len(found["preferences"]) == len(found["ratings"]) == 10 and len(found["events"]) == 22
    for name in ("preferences", "ratings"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in found[name]))
        assert len(data.load(file).records) == 10


def test_payloads_stay_text(make_store, tmp_path):
    store = make_store()
    store.add([{"mode": "pair", "prompt": PAYLOADS[0], "a": PAYLOADS[1], "b": PAYLOADS[2]},
               {"mode": "rating", "prompt": PAYLOADS[1], "a": PAYLOADS[0] + PAYLOADS[2]}])  # fmt: skip
    store.set_guidelines(PAYLOADS[1])
    with running_server(store.path) as (_, address), browser(tmp_path / "profile") as tab:
        tab.join(address, "ann")
        assert {*tab.shown()} == {*PAYLOADS}
        tab.vote("2", PAYLOADS[1])
        assert tab.shown() == (PAYLOADS[1], PAYLOADS[0] + PAYLOADS[2])
        tab.vote("4", PAYLOADS[0])
        tab.key("g")
        tab.key("h")
        tab.until(lambda: PAYLOADS[1] in tab.text("judged") and PAYLOADS[0] in tab.text("judged"), "history")
        assert tab.text("guidelines-text") == PAYLOADS[1]
        time.sleep(0.5)  # an image that fails to load would run its handler by now
        assert tab.driver.execute_script(
            "return window.pwned === undefined && !document.querySelector('main img, aside img, svg')"
        )
        assert tab.driver.execute_script("return document.scripts.length") == 1


def test_a_vote_that_fails_stays_in_the_page(make_store, tmp_path):
    store = make_store(ratings=3)
    with browser(tmp_path / "profile") as tab:
        with running_server(store.path, "--repeat-every", 0) as (process, address):
            tab.join(address, "ann")
            other = sqlite3.connect(store.path, isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            before = tab.shown()
            tab.key("5")
            tab.until(lambda: tab.find("error").is_displayed(), "the error")
            assert "NOT stored" in tab.text("error-text") and "locked" in tab.text("error-text")
            tab.key("1")  # no other answer in its place
            other.execute("ROLLBACK")
            other.close()
            assert tab.shown() == before and store.judgements() == []
            tab.find("retry").click()
            tab.until(lambda: tab.text("count").startswith("1 done"), "the second sending")
            assert not tab.find("error").is_displayed()
            process.kill()
            process.wait()
            tab.key("4")
            tab.until(lambda: "cannot be reached" in tab.text("error-text"), "the error")
        port = int(address.rstrip("/").rsplit(":", 1)[1])
        with running_server(store.path, "--repeat-every", 0, port=port):
            tab.key("r")
            tab.until(lambda: tab.text("count").startswith("2 done"), "the second sending")
    assert [v["rating"] for v in store.judgements()] == [5, 4] and len(store.events()) == 2


def test_edit_from_the_list_with_a_token_on_a_telephone(make_store, tmp_path):
    store, token = make_store(pairs=2), "a-token-that-is-long-enough"
    options = ("--repeat-every", 0, "--host", "127.0.0.1", "--token", token)
    with (
        running_server(store.path, *options) as (_, address),
        browser(tmp_path / "profile", size="500,800") as tab,
    ):
        tab.driver.get(address)
        tab.until(lambda: tab.find("name").is_displayed(), "the form")
        assert token not in tab.driver.current_url and not tab.find("token").is_displayed()
        tab.find("name").send_keys("ann", Keys.ENTER)
        tab.until(lambda: tab.find("item").is_displayed(), "an item")
        assert tab.driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        first = tab.shown()
        time.sleep(PAUSE)
        tab.driver.find_element(By.CSS_SELECTOR, "button[data-key='2']").click()  # by touch
        tab.until(lambda: tab.text("count").startswith("1 done"), "a vote")
        tab.find("show-history").click()
        tab.until(lambda: tab.driver.find_elements(By.CSS_SELECTOR, "#judged button"), "the list")
        tab.driver.find_element(By.CSS_SELECTOR, "#judged button").click()
        tab.until(lambda: tab.shown() == first, "the item again")
        tab.key("5")
        tab.until(lambda: tab.shown() != first, "the next item")
        tab.find("show-history").click()
        tab.until(lambda: "Right, much better" in tab.text("judged"), "the list")
    (vote,) = store.judgements()
    assert vote["choice"] == vote["shown"][1] and vote["strength"] == 2 and len(store.events()) == 2
