"""The report of a run (minirlhf/tools/report/), from made-up measurements with the keys that the stages write."""

import base64
import hashlib
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from minirlhf import UserError
from minirlhf.measure import stats
from minirlhf.measure.agreement import human_ceiling
from minirlhf.rollout import Texts
from minirlhf.support import cli
from minirlhf.tools import evaluate
from minirlhf.tools.report import __main__ as command
from minirlhf.tools.report import follow, page, plot

HOSTILE = "<script src=//x.y>alert(1)</script><img src=x onerror='a'>&\"\u202e</div>"
PPO_KEYS = {
    "objective/kl",
    "objective/rm_scores",
    "objective/scores",
    "objective/judge",
    "policy/entropy_avg",
    "val/response_length",
}


def measured(rng, texts=60):
    """What train_rm.py's report holds of a model of ratings, through the functions that make it."""
    truth = rng.normal(size=texts)
    measure = lambda scores: {
        "pearson": stats.pearson(scores, truth),
        "spearman": stats.spearman(scores, truth),
        "pair_accuracy": stats.pair_accuracy(scores, truth),
        "pair_accuracy_1": stats.pair_accuracy(scores, truth, min_gap=1.0),
    }
    noisy = lambda sigma: truth + rng.normal(0, sigma, texts)
    raters = [list(t + rng.normal(0, 1, 10)) for t in truth]
    return {
        "test": {"n": texts} | measure(noisy(1)) | {"calibration": stats.calibration(noisy(1), truth)},
        "baselines": {
            "longer text": measure(noisy(9)),
            "VADER lexicon": None,
            "TF-IDF + ridge": measure(noisy(2)),
        },
        "humans": human_ceiling(raters, rng),
        "seconds": 119.7,
    }


def made_up(readers=("score", "judge", "lexicon"), iterations=60, seed=0):
    """(results.json as evaluate.py writes it, PPO's metrics): the judge leaves the reward model as KL grows."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, iterations + 1) / iterations
    kl = 9 * (1 - np.exp(-3 * t)) * (0.4 + 0.6 * t) + rng.normal(0, 0.25, iterations)
    curves = {"score": 1.9 * (1 - np.exp(-kl / 3.5)), "judge": 1.7 * (1 - np.exp(-kl / 3)) - 0.012 * kl**2}
    noisy = lambda x, sigma: (x + rng.normal(0, sigma, iterations)).tolist()
    columns = {"objective/kl": kl.tolist(), "objective/rm_scores": noisy(curves["score"], 0.12),
               "policy/entropy_avg": noisy(4.1 - 1.6 * t, 0.08), "val/response_length": noisy(20 - 4 * t, 0.7)}  # fmt: skip
    if "judge" in readers:
        columns["objective/judge"] = noisy(curves["judge"], 0.1)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    base = {name: rng.normal(size=256).tolist() for name in readers}
    looks = evaluate.text_measures(Texts(*(torch.ones(2, 4, dtype=d) for d in (int, bool) * 2)), eos=0)
    row = lambda shift, kl, entropy: (
        evaluate.compare({n: (np.array(v) * 0.5 + shift).tolist() for n, v in base.items()}, base)
        | {"kl": kl, "entropy": entropy}
        | looks
    )
    samples = [{"prompt": "the film is", "sft": f" dull, no. {i}", "ppo": f" a delight, no. {i}", "kl": 8.25,
                "score_sft": -0.5, "score_ppo": 1.75} for i in range(3)]  # fmt: skip
    results = {
        "sft": {"val_bits_per_byte": 1.8934, "best_step": 900, "seconds": 200.0},
        "rm": measured(rng),
        "sft_samples": evaluate.compare(base, base) | {"kl": 0.0, "entropy": 4.1} | looks,
        "best_of_n": {"4": row(0.7, 0.636, None), "16": row(1.1, 1.835, None)},
        "ppo": row(1.6, 8.7, 2.6) | {"seconds": 160.9},
        "samples": samples,
        "prompts": 256,
        "seed": 7,
        "versions": {"python": "3.12.0", "torch": "2.13.0", "triton": "not installed"},
    }
    if "judge" in readers:
        results |= {"rm_optimised": measured(rng), "judge": measured(rng)}
    return results, [{"step": i} | row for i, row in enumerate(rows, 1)]


def write_run(run: Path, results: dict, ppo: list[dict], sft=(), rm=()) -> Path:
    for stage, rows in {"sft": sft, "rm": rm, "ppo": ppo}.items():
        (run / stage).mkdir(parents=True, exist_ok=True)
        if rows:
            (run / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "results.json").write_text(json.dumps(results, indent=1))
    return run


@pytest.fixture
def run_report(monkeypatch, capsys):
    """Run the command on a folder: (the page, what was printed)."""

    def call(run: Path) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["report", str(run)])
        command.main()
        return (run / "report.html").read_text(encoding="utf-8"), capsys.readouterr().out

    return call


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text; fails where a </div> or </p> closes nothing."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.text, self.open, self.within = [], "", 0, ""
        self.feed(html)
        assert self.open == 0

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.within = tag
        self.open += tag == "div"

    def handle_endtag(self, tag):
        self.open -= tag == "div"
        self.within = ""

    def handle_data(self, data):
        self.text += "" if self.within in ("script", "style") else data


def test_a_whole_run(tmp_path, run_report):
    results, ppo = made_up()
    sft = [{"step": 1, "train/loss": 5.0}, {"step": 2, "train/loss": 4.0, "val/bits_per_byte": 2.3456}]
    run = write_run(tmp_path / "demo", results, ppo, sft, [{"step": 9, "member": 0, "val/pearson": 0.6123}])
    html, out = run_report(run)
    shown = Page(html)
    png = (run / "reward_kl.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20], "big") == 1500  # 10 inches at 150 dpi
    assert sorted(p.name for p in run.iterdir()) == [
        "ppo",
        "report.html",
        "results.json",
        "reward_kl.png",
        "rm",
        "sft",
    ]
    p, rm = results["ppo"], results["rm"]
    low, high = p["judge_win_rate_interval"]
    for text in (
        f"{p['judge_win_rate']:.1%}", f"judge: wins over SFT ({low:.1%} to {high:.1%}), at KL 8.7 nats per sequence",
        f"{rm['test']['pearson']:.3f}", f"TF-IDF + ridge {rm['baselines']['TF-IDF + ridge']['pearson']:.3f}",
        f"one human {rm['humans']['one_pearson']:.3f}", "1.893", "12 min 00 s", "2 min 00 s", "best of 16", "half the humans",
        f"{p['lexicon_win_rate']:.1%}", f"{rm['test']['calibration']['bins'][0][0]:+.2f}", "256 test prompts", "Seed 7",
        "torch 2.13.0", " a delight, no. 2", "score +1.75, KL 8.2 nats", "SFT 2.346 bits per byte", "reward model 0.612",
    ):  # fmt: skip
        assert text in shown.text, text
    for text in (
        "SFT",
        "1.893",
        "judge",
        f"{p['judge_win_rate']:.1%}",
        "12 min 00 s",
        str(run / "reward_kl.png"),
    ):
        assert text in out, text
    assert len(out.splitlines()) == 7  # five stages, their sum, the paths
    assert 'name="viewport"' in html and "color-scheme: light dark" in html


def test_plotted_keys_are_those_that_ppo_logs():
    root = Path(page.__file__).parents[3]
    source = [root / "train_ppo.py", root / "minirlhf/ppo.py", root / "minirlhf/rewards.py"]
    logged = {
        name for file in source for name in re.findall(r'"([a-z]+/\w+)"', file.read_text(encoding="utf-8"))
    }
    plotted = {*follow.REWARD_METRICS, follow.JUDGE_METRIC, *(metric for metric, _ in follow.STRIPS.values())}
    assert plotted == PPO_KEYS and plotted <= logged


def test_F19_text_of_models_and_users_is_escaped(tmp_path, run_report, monkeypatch):
    monkeypatch.setattr(plot, "draw", lambda *shown: b"")
    results, ppo = made_up()
    results["samples"] = [results["samples"][0] | {"prompt": HOSTILE, "sft": HOSTILE, "ppo": HOSTILE}]
    results["versions"] |= {"torch": HOSTILE, HOSTILE: "1"}
    results["rm"]["baselines"][HOSTILE] = None
    results["split"] = HOSTILE
    shown = Page(run_report(write_run(tmp_path / "<b>'run", results, ppo))[0])
    tags = [tag for tag, _ in shown.elements]
    assert not {"iframe", "form", "object", "img", "svg"} & set(tags)
    assert tags.count("script") == 2 and tags.count("style") == 1
    assert all(not key.startswith("on") for _, attributes in shown.elements for key in attributes)
    links = [a[key] for _, a in shown.elements for key in ("src", "href", "srcset", "action") if key in a]
    assert all(link.startswith("#") or link == "data:," for link in links)
    # prompt twice, both texts, a version and a name of one, baseline, split
    assert shown.text.count(HOSTILE) == 8
    assert "<b>'run" in shown.text


def test_F19_a_page_in_a_terminal_cannot_steer_it(tmp_path, run_report, monkeypatch):
    monkeypatch.setattr(plot, "draw", lambda *shown: b"")
    results, ppo = made_up()
    results["samples"] = [results["samples"][0] | {"prompt": "a\x1b[31mb\nc", "sft": "\x9b1m"}]
    page = run_report(write_run(tmp_path / "run", results, ppo))[0]
    assert "\x1b" not in page and "\x9b" not in page
    assert "a\\x1b[31mb\nc" in page


def test_F19_the_page_allows_its_own_script_and_style_alone(tmp_path, run_report, monkeypatch):
    monkeypatch.setattr(plot, "draw", lambda *shown: b"")
    html = run_report(write_run(tmp_path, *made_up()))[0]
    shown = Page(html)
    (policy,) = [a["content"] for _, a in shown.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.keys() == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag, rule in ("script>", "script-src"), ("style>", "style-src"):
        (text,) = re.findall(f"<{tag}(.*?)</{tag}", html, re.S)
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert (
        "url(" not in html
        and "@import" not in html
        and "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    )


def mutations():
    """(field, its new value): every kind of value in every kind of place."""
    wrong = [
        None,
        True,
        "x",
        HOSTILE,
        [],
        {},
        [1],
        -1,
        1e400,
        math.nan,
        10**400,
        "\ud800",
        "x" * 5000,
        [[[]]],
    ]
    places = [
        ("seed",), ("prompts",), ("split",), ("versions",), ("versions", "torch"), ("reward",), ("reward", 0),
        ("sft",), ("sft", "val_bits_per_byte"), ("sft", "seconds"), ("rm",), ("rm", "test"), ("rm", "test", "pearson"),
        ("rm", "test", "calibration"), ("rm", "test", "calibration", "bins"), ("rm", "test", "calibration", "bins", 0),
        ("rm", "test", "calibration", "bins", 0, 0), ("rm", "baselines"), ("rm", "baselines", "longer text"),
        ("rm", "baselines", "longer text", "pearson"), ("rm", "humans"), ("rm", "humans", "one_pearson"), ("rm", "seconds"),
        ("judge",), ("judge", "test"), ("sft_samples",), ("sft_samples", "kl"), ("sft_samples", "entropy"), ("best_of_n",),
        ("best_of_n", "4"), ("best_of_n", "4", "score"), ("best_of_n", "4", "score_interval"), ("ppo",), ("ppo", "kl"),
        ("ppo", "judge"), ("ppo", "judge_win_rate"), ("ppo", "judge_win_rate_interval"), ("ppo", "seconds"), ("samples",),
        ("samples", 0), ("samples", 0, "prompt"), ("samples", 0, "kl"), ("samples", 0, "score_sft"),
    ]  # fmt: skip
    return [(place, value) for place in places for value in wrong]


def test_F19_any_value_anywhere_is_shown_or_refused_in_one_line(tmp_path, run_report, monkeypatch, capsys):
    """Of results.json.  The plot is tried by the next test, where a page is written."""
    monkeypatch.setattr(plot, "draw", lambda *shown: b"")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    whole, ppo = made_up(iterations=3)
    write_run(tmp_path, whole | {"reward": ["rm"]}, ppo)
    whole = (tmp_path / "results.json").read_text()
    pages = 0
    for place, value in mutations():
        results = at = json.loads(whole)
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
        (tmp_path / "results.json").write_text(json.dumps(results))
        try:
            html, _ = run_report(tmp_path)
        except UserError as refused:
            assert str(refused).startswith(f"{tmp_path}/results.json: ") and "\n" not in str(refused), place
            assert len(str(refused)) < 300 and str(place[0]) in str(refused)
        else:
            pages += 1
            assert [tag for tag, _ in Page(html).elements].count("script") == 2 and "<img" not in html
    assert 60 < pages < 300


@pytest.mark.parametrize("place, value", [
    (("sft_samples", "entropy"), None), (("ppo", "judge"), None), (("ppo", "kl"), None), (("ppo", "score"), 1e29),
    (("best_of_n", "4", "score"), None), (("best_of_n", "4"), {}), (("sft_samples",), {}), (("ppo",), {}),
])  # fmt: skip
def test_odd_rows_are_drawn(tmp_path, run_report, place, value):
    results, ppo = made_up(iterations=12)
    at = results
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    run_report(write_run(tmp_path, results, ppo))


@pytest.mark.parametrize("line, message", [
    ('{"step": 4, "objective/kl": "x"}', "'objective/kl': expected a number, found 'x'"),
    ('{"step": 4, "objective/kl": null}', "'objective/kl': expected a number, found None"),
    ('{"step": true}', "'step': expected a number, found True"), ("[4]", "expected an object, found a list"),
    ('{"val/pearson": NaN}', "'val/pearson': expected a number, found nan"), ("[" * 100_000, "not JSON"),
    ('{"step": 1', "not JSON"), ("", "not JSON"),
])  # fmt: skip
def test_metrics_that_hold_no_numbers_are_one_line(tmp_path, run_report, line, message):
    results, ppo = made_up(iterations=3)
    write_run(tmp_path, results, ppo)
    with open(tmp_path / "ppo" / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError) as refused:
        run_report(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/ppo/metrics.jsonl:4: ") and message in str(
        refused.value
    )
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "missing", ["objective/kl", "objective/rm_scores", "objective/judge", "step", "val/response_length"]
)
def test_metrics_with_holes_are_drawn(tmp_path, run_report, missing):
    results, ppo = made_up(iterations=12)
    for row in ppo[3:7]:
        del row[missing]
    run_report(write_run(tmp_path, results, ppo))


def test_a_policy_of_functions_alone(tmp_path, run_report):
    """Without a reward model, `score` is the reward, and so it is called."""
    results, ppo = made_up(("score",))
    results["reward"] = ["minirlhf.rewards:length"]
    ppo = [
        {"objective/scores" if k == "objective/rm_scores" else k: v for k, v in row.items()} for row in ppo
    ]
    shown = Page(run_report(write_run(tmp_path, results, ppo))[0])
    assert "reward: wins over SFT" in shown.text and "reward model: wins" not in shown.text


def test_a_policy_of_dpo_bears_its_name(tmp_path, run_report):
    """Page and terminal called every policy PPO, also one that minirlhf.evaluate --policy had compared."""
    results, ppo = made_up()
    results["policy"] = "DPO"
    html, out = run_report(write_run(tmp_path, results, ppo))
    shown = Page(html)
    line = next(line for line in out.splitlines() if "at KL 8.7 nats" in line)
    assert line.startswith("DPO ") and f"{results['ppo']['judge_win_rate']:.1%}" in line
    assert "DPO, score +1.75, KL 8.2 nats" in shown.text and "PPO, score" not in shown.text
    table = shown.text.partition("Against SFT, on")[2].partition("Reward model and people")[0]
    assert "best of 16DPO" in "".join(table.split("\n")) and "PPO" not in table
    results["policy"] = "<b>"
    with pytest.raises(UserError, match="policy: expected PPO or DPO, found '<b>'"):
        run_report(write_run(tmp_path / "odd", results, ppo))


def without(name):
    """A run in which an optional piece is missing, and what its page must hold instead."""
    results, ppo = made_up(("score",) if name == "judge and lexicon" else ("score", "judge", "lexicon"))
    rm = results["rm"]
    if name == "judge and lexicon":
        rm["baselines"] = dict.fromkeys(rm["baselines"])
        return results, ppo, ["reward model: wins over SFT (", "TF-IDF + ridge", "–"], ["judge", "lexicon:"]
    if name == "judge in training":
        return (
            results,
            [{k: v for k, v in row.items() if k != "objective/judge"} for row in ppo],
            ["judge: wins"],
            [],
        )
    if name == "ratings":  # choices have neither raters nor a calibration
        choices = {"n": 60, "accuracy": 0.75}
        results["rm"] = {"test": choices, "baselines": {"longer text": {"accuracy": 0.53}}, "seconds": 9.0}
        return results, ppo, ["75.0%", "choices right", "longer text", "53.0%"], ["calibration"]
    if name == "results of the stages":  # evaluate.py was given checkpoints from elsewhere
        results |= {"sft": {}, "rm": {}}
        results.pop("rm_optimised"), results.pop("judge"), results["ppo"].pop("seconds")
        return results, [], ["judge: wins over SFT (", "0 min 00 s"], ["Pearson r", "TF-IDF"]
    if name == "the end of an interrupted stage":
        results |= {"rm": {}, "judge": {}}
        return results, ppo[:1], ["judge: wins over SFT"], []
    results["best_of_n"], results["samples"] = {}, []
    return results, ppo, ["judge: wins over SFT ("], ["best of", "delight"]


OPTIONAL = ["judge and lexicon", "judge in training", "ratings", "results of the stages",
            "the end of an interrupted stage", "best of n and samples"]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_pieces_may_be_missing(tmp_path, run_report, name, monkeypatch):
    results, ppo, present, absent = without(name)
    shown = Page(run_report(write_run(tmp_path, results, ppo))[0])
    for text in present:
        assert text in shown.text, text
    for text in absent:
        assert text not in shown.text, text


def test_a_half_written_line_is_not_read(tmp_path, run_report, monkeypatch):
    monkeypatch.setattr(plot, "draw", lambda writers, history, label: repr(history).encode())
    results, ppo = made_up()
    html, _ = run_report(write_run(tmp_path, results, ppo))
    with open(tmp_path / "ppo" / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "objective/k')
    assert run_report(tmp_path)[0] == html


def test_best_of_n_and_sft_lie_where_results_say():
    """The markers of the left panel, read back from the figure: [SFT, best of 4, best of 16, PPO] x [reward model, judge]."""
    from matplotlib.figure import Figure

    results, ppo = made_up()
    writers = {"SFT": results["sft_samples"], "best of 4": results["best_of_n"]["4"], "PPO": results["ppo"]}
    figures, savefig = [], Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k))
        plot.draw(writers, ppo, "reward model")
    left = figures[0].axes[0]
    markers = [c.get_offsets().tolist() for c in left.collections if len(c.get_offsets()) == 2]
    assert markers == [[[row["kl"], row["score"]], [row["kl"], row["judge"]]] for row in writers.values()]
    lines = {line.get_label(): line for line in left.lines}
    assert {"reward model", "judge"} <= set(lines)
    # A centred moving average: of 60 iterations over 7, so that the fourth point is the mean of the first seven.
    x, y = lines["judge"].get_data()
    assert len(y) == len(ppo)
    assert y[3] == pytest.approx(np.mean([m["objective/judge"] for m in ppo[:7]]))
    assert x[0] == pytest.approx(np.mean([m["objective/kl"] for m in ppo[:4]]))  # at the end, what there is


def test_what_is_missing_is_told(tmp_path, run_report, monkeypatch, capsys):
    remedy = f"^{tmp_path}/results.json: missing or incomplete: run python -m minirlhf.evaluate --run {tmp_path} first$"
    with pytest.raises(UserError, match=remedy):
        run_report(tmp_path)
    (tmp_path / "results.json").write_text('{"ppo": {}}')
    with pytest.raises(UserError, match=remedy):
        run_report(tmp_path)
    (tmp_path / "results.json").write_text("{'ppo': {}}")
    with pytest.raises(
        UserError, match=r"results.json: not JSON \(.*\): run the command that wrote it again$"
    ):
        run_report(tmp_path)
    results, ppo = made_up()
    write_run(tmp_path, results, ppo)
    (tmp_path / "ppo" / "metrics.jsonl").write_text('{"step": 1}\n{step: 2}\n')
    with pytest.raises(UserError, match=r"ppo/metrics.jsonl:2: not JSON"):
        run_report(tmp_path)
    write_run(tmp_path, results, ppo)
    (tmp_path / "results.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"results.json: cannot be read: 'utf-8' codec can't decode"):
        run_report(tmp_path)
    write_run(tmp_path, results, ppo)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(UserError, match=r"^the plot needs matplotlib: pip install 'minirlhf\[report\]'$"):
            run_report(tmp_path)
    assert not list(tmp_path.glob("*.html")) and not list(
        tmp_path.glob("*.png")
    )  # nothing written by any of them
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        cli.run_script(command.main)
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "nowhere").exists()
