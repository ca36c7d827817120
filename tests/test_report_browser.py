"""The report's page in a real browser: what a reader sees, by mouse, by touch and by keyboard, and what it never does."""

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="no selenium: pip install 'minirlhf[dev]'")
import chromium
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_report import HOSTILE, made_up, write_run
from test_report_live import add, metric, sample, start

from minirlhf.tools.report import facts, follow, page
from minirlhf.tools.report import results as results_of

pytestmark = chromium.needs_browser
SCORES = {"great": 2.0, "dull": -1.5, HOSTILE: 0.25}


def text_of(words: list[str], score: float) -> dict:
    n = len(words)
    return {
        "tokens": [*(f" {word}" for word in words), ""],
        "ended": True,
        "kl": 3.25,
        "score": score,
        "judge": score / 2,
        "decisive": [0],
        "columns": {
            "replaced": [*(SCORES.get(word, 0.1) for word in words), None],
            "nats": [0.5] * n + [-0.25],
            "entropy": [1.0 + i for i in range(n)] + [0.125],
            "probability": [0.5] * n + [0.004],
        },
        "others": [[["good", 0.25], [HOSTILE, 0.125]]] * n + [[]],
    }


def explained(samples: int = 2) -> dict:
    row = {
        "prompt": "The film is",
        "sft": text_of(["dull", HOSTILE], -1.0),
        "ppo": text_of(["great", "fun"], 1.5),
    }
    return {
        "version": 1, "policy": "PPO", "reward": "reward model", "split": "test", "seed": 1, "prompts": 256,
        "replacements": 8, "left_out": f"DPO has no critic {HOSTILE}", "kl_coef": 0.1, "samples": [row] * samples,
    }  # fmt: skip


def write_page(folder: Path, texts: int = 60, why: dict | None = None) -> Path:
    """A whole run's page, with texts of ten iterations."""
    results, ppo = made_up()
    run = write_run(folder / "demo", results, ppo)
    rows = [
        sample(
            1 + i % 10, f" text {i} {HOSTILE if i == 7 else 'fine'}", score=(i * 37 % 100) / 10 - 5, kl=i / 8
        )
        for i in range(texts)
    ]
    add(run / "ppo/samples.jsonl", "".join(rows))
    (run / "why.json").write_text(json.dumps(explained() if why is None else why))
    return render(run)


def render(run: Path) -> Path:
    results, found = results_of.load_results(run / "results.json"), facts.load(run / "why.json")
    html = page.page("demo", [page.Run("demo", follow.Followed(run).update(), results)], found)
    (run / "report.html").write_text(html, encoding="utf-8")
    return run / "report.html"


class Tab:
    def __init__(self, driver):
        self.driver = driver

    def open(self, file: Path) -> None:
        self.driver.get(file.as_uri())

    def js(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def css(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
        )

    def until(self, condition, what: str):
        return WebDriverWait(self.driver, chromium.WAIT, 0.05).until(lambda _: condition(), what)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def asked(self) -> list[str]:
        """All addresses that the page asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        found = [
            m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in found if not url.startswith(("data:", "chrome"))]

    def seconds_of_work(self) -> float:
        """The page's CPU seconds so far: the clock on the wall would tell how busy the machine is."""
        self.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        found = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(m["value"] for m in found if m["name"] == "TaskDuration")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("profile"), "1280,900") as driver:
        yield Tab(driver)


@pytest.fixture
def shown(tab, tmp_path):
    """The tab with a whole page in it, and its file."""
    file = write_page(tmp_path)
    tab.asked(), tab.complaints()
    tab.open(file)
    return tab, file


def test_the_page_asks_nobody_and_runs_nothing_of_a_text(shown):
    tab, file = shown
    time.sleep(0.5)  # an image that fails to load would run its handler by now
    assert tab.asked() == [file.as_uri()] and tab.complaints() == []
    assert tab.js("return document.scripts.length") == 2
    assert tab.js("return document.querySelectorAll('main img, main script, main a').length") == 0
    assert tab.texts(".t").count(HOSTILE) == 2  # as a token, in both samples
    assert HOSTILE in tab.texts("#why-view > p")[0]
    # Not even by the page's own policy: an injected script and style do nothing.
    tab.js(
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned = 1\">');"
    )
    time.sleep(0.3)
    assert tab.js("return window.pwned === undefined")
    assert all("Content Security Policy" in line for line in tab.complaints())


def test_numbers_of_a_token_by_mouse_touch_and_keyboard(shown):
    tab, _ = shown
    great = tab.css(".pair .t")[3]
    assert great.text == "great" and great.get_attribute("aria-label") == "great: Score share +2.00 points"
    great.click()
    assert not tab.js("return document.getElementById('tip').hidden")
    assert tab.texts("#tip .word") == ["great"]
    assert tab.texts("#tip dd") == ["+2.00 points", "+0.50 nats", "1.00 nats", "50%"]
    assert tab.texts("#tip p")[-1] == f"Instead: good 25%, {HOSTILE} 13%"
    tab.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert tab.texts("#tip .word") == ["end of the text"] and tab.texts("#tip dd")[0] == "\u2013"
    tab.press(Keys.HOME)
    assert tab.texts("#tip .word") == ["great"]
    tab.press(Keys.ESCAPE)
    assert tab.js("return document.getElementById('tip').hidden")
    # One stop per text, and the measures are radio buttons.
    assert tab.js("return document.querySelectorAll('.t[tabindex=\"0\"]').length") == 4
    tab.css("input[name=measure]")[0].send_keys(Keys.ARROW_RIGHT)
    assert tab.css(".pair .t")[3].get_attribute("aria-label") == "great: Nats +0.50 nats"
    assert "likelier" in tab.texts("#can")[0] and "It cannot tell: " in tab.texts("#cannot")[0]


def test_colours_have_a_side_and_a_strength(shown):
    tab, _ = shown
    read = "return [...document.querySelectorAll('.pair .t')].map((e) => [e.className, e.style.getPropertyValue('--a')])"
    dull, hostile, end, great = tab.js(read)[:4]
    assert "neg" in dull[0] and "key" in dull[0] and "pos" in great[0] and "pos" in hostile[0]
    assert float(great[1]) == 1 and float(hostile[1]) == pytest.approx(0.125, abs=1e-3)
    assert end == ["t end", "0.000"]  # no number


def test_everything_is_reached_by_tab(shown):
    tab, _ = shown
    tab.js("document.body.focus()")
    seen = []
    name = "const e = document.activeElement; return e.id || e.name || e.dataset.sort || e.getAttribute('class') || e.tagName"
    for _ in range(40):
        tab.press(Keys.TAB)
        seen.append(tab.js(name))
    wanted = {"A", "measure", "svg", "find", "step", "sort", "direction", "score", "more"}
    assert wanted <= {*seen}, wanted - {*seen}
    assert any(name.startswith("t ") for name in seen)


def column(tab, name: str) -> list[float]:
    numbers = tab.js(
        'return [...document.querySelectorAll(`#rows td[data-name="${arguments[0]}"]`)].map((e) => e.textContent)',
        name,
    )
    return [float(x.replace("\u2212", "-")) for x in numbers]


def test_texts_are_sorted_searched_and_filtered(shown):
    tab, _ = shown
    assert tab.texts("#found") == ["60 of 60 texts"] and len(tab.css("#rows tr")) == 40
    tab.css("#heads button[data-sort=score]")[0].click()
    scores = column(tab, "score")
    assert scores == sorted(scores, reverse=True) and scores[0] == 4.9
    assert tab.js("return document.querySelector('th[aria-sort=descending]').textContent") == "score \u2193"
    tab.press(Keys.ENTER)  # the same head again, by keyboard: the focus stayed
    assert column(tab, "score") == sorted(column(tab, "score")) and column(tab, "score")[0] == -5
    tab.js("document.getElementById('more').click()")
    assert len(tab.css("#rows tr")) == 60
    tab.css("#find")[0].send_keys("TEXT 7 script")
    assert tab.texts("#found") == ["1 of 60 texts"]
    assert tab.texts("#rows td.words") == [f"It is text 7 {HOSTILE}"]
    assert "text" in tab.texts("#rows mark") and "script" in tab.texts("#rows mark")
    tab.css("#find")[0].clear()
    tab.css("#find")[0].send_keys(" ")
    tab.js("const s = document.getElementById('step'); s.value = '3'; s.dispatchEvent(new Event('change'))")
    assert {*column(tab, "iteration")} == {3} and tab.texts("#found") == ["6 of 60 texts"]


def test_curves_tell_their_numbers(shown):
    tab, _ = shown
    first = tab.css("figure svg")[0]
    assert first.get_attribute("aria-label").startswith("Reward against distance, mean score. reward model: ")
    assert len(tab.css("figure:not([hidden])")) == 5
    tab.js("arguments[0].focus()", first)
    tab.press(Keys.ARROW_LEFT)
    assert tab.texts("#readout")[0].startswith("Iteration 60: score ")
    tab.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert tab.texts("#readout")[0].startswith("Iteration 58: score ")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_and_a_desktop_in_both_schemes(shown, width, scheme):
    tab, file = shown
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        tab.open(file)
        assert tab.js("return document.documentElement.scrollWidth <= innerWidth")
        ink, paper = tab.js("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
        assert (brightness(ink) > brightness(paper)) == (scheme == "dark")
        tab.js("document.querySelectorAll('.pair .t')[3].click()")
        box = tab.js(
            "const b = document.getElementById('tip').getBoundingClientRect(); return [b.left, b.right]"
        )
        assert box[0] >= 0 and box[1] <= width
    finally:
        tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def brightness(colour: str) -> float:
    return sum(float(x) for x in colour[colour.index("(") + 1 : -1].split(",")[:3])


def test_the_largest_page_is_below_3_mb_and_opens_within_a_second_of_work(tab, tmp_path):
    why = explained(400)
    for row in why["samples"]:
        row["ppo"] = text_of(["word"] * 60, 1.0)
    file = write_page(tmp_path, texts=30_000, why=why)
    assert 1_500_000 < file.stat().st_size < 3_000_000
    work = tab.seconds_of_work()
    tab.open(file)
    after = tab.seconds_of_work()
    assert after - (work if after > work else 0) < 1  # another process may have taken over
    assert "are left out, evenly, to keep the page small" in tab.texts("#found")[0]
    assert "more are in why.json" in tab.texts("#why-view > p")[0]


@given(st.lists(st.text(st.characters(codec=None), max_size=12) | st.sampled_from(["</script>", "<!--<script>", "\u2028", HOSTILE]),
                min_size=1, max_size=6))  # fmt: skip
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_arrives_as_it_was(tab, tmp_path_factory, texts):
    run = tmp_path_factory.mktemp("fuzz")
    add(run / "ppo/metrics.jsonl", metric(1))
    add(run / "ppo/samples.jsonl", "".join(sample(1, text) for text in texts))
    html = page.page("fuzz", [page.Run("fuzz", follow.Followed(run).update())])
    (run / "report.html").write_bytes(html.encode("utf-8", "replace"))
    tab.complaints()
    tab.open(run / "report.html")
    broken = lambda text: text.encode("utf-8", "replace").decode()
    arrived = tab.js("return DATA.runs[0].samples.map((row) => row[2])")
    assert arrived == [broken(text) for text in texts]
    # In the order of the table, which sorts by iteration and is stable.
    want = [broken("It is" + text).replace("\x00", "\x00") for text in texts]
    assert tab.texts("#rows td.words") == want
    assert tab.complaints() == [] and tab.js("return window.pwned === undefined")


def test_a_live_page_follows_and_does_not_move_the_reader(tab, tmp_path):
    run = tmp_path / "live"
    process, line = start(run, "--watch", "--port", 0)
    try:
        address = line.split()[0]
        tab.asked()
        tab.driver.get(address)
        tab.until(lambda: "Waiting for" in tab.texts("#live")[0], "the wait")
        add(run / "sft/metrics.jsonl", '{"step": 1, "train/loss": 5.0}\n{"step": 2, "train/loss": 4.5}\n')
        tab.until(lambda: tab.texts("#live")[0] == "Live: SFT, step 2.", "SFT")
        add(run / "ppo/metrics.jsonl", "".join(metric(i) for i in range(1, 30)))
        add(run / "ppo/samples.jsonl", "".join(sample(i, f" text {i}") for i in range(1, 30)))
        tab.until(lambda: tab.texts("#live")[0] == "Live: PPO, iteration 29.", "PPO")
        tab.until(lambda: len(tab.css("#rows tr")) == 29, "texts")
        tab.css("#find")[0].send_keys("text 1")
        tab.js("document.querySelectorAll('#rows tr')[5].scrollIntoView({ behavior: 'instant' }); pointAt(7)")
        where, rows = tab.js("return [scrollY, document.getElementById('rows').textContent]")
        add(run / "ppo/metrics.jsonl", metric(30)[:30])  # half a line
        add(run / "ppo/samples.jsonl", sample(30, " text 100"))
        tab.until(lambda: not tab.js("return document.getElementById('fresh').hidden"), "new texts")
        assert tab.texts("#live")[0] == "Live: PPO, iteration 29."
        add(run / "ppo/metrics.jsonl", metric(30)[30:])
        tab.until(lambda: tab.texts("#live")[0] == "Live: PPO, iteration 30.", "the whole line")
        now = tab.js("return [scrollY, document.getElementById('rows').textContent]")
        assert now[1] == rows and abs(now[0] - where) < 80  # the button above the table
        assert tab.texts("#readout")[0].startswith("Iteration 7: ")
        assert tab.js("return document.activeElement.id") == "find"
        tab.css("#fresh")[0].click()
        assert " text 100" in "".join(tab.texts("#rows td.words"))
        (run / "results.json").write_text(json.dumps(made_up()[0]))
        tab.until(lambda: "New results are there" in tab.texts("#live")[0], "results")
        assert all(url.startswith(address) for url in tab.asked())
        process.kill()
        process.wait()
        tab.until(lambda: "The server does not answer" in tab.texts("#live")[0], "its end")
        assert len(tab.css("figure:not([hidden])")) >= 4
    finally:
        process.kill()
