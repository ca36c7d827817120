"""Reward functions by name (minirlhf/rewards.py); the baselines of a reward model (minirlhf/baselines.py)."""

import math
import sys

import pytest

from minirlhf import UserError, rewards
from minirlhf.measure import baselines
from minirlhf.measure.stats import pearson


def test_specs_give_name_function_and_weight():
    rule = "minirlhf.rewards:repetition"
    assert rewards.load_rewards(["rm", "rm:0.5", rule, f"{rule}:-0.5", f"{rule}:1e-3"]) == [
        ("rm", None, 1.0),
        ("rm", None, 0.5),
        (rule, rewards.repetition, 1.0),
        (rule, rewards.repetition, -0.5),
        (rule, rewards.repetition, 0.001),
    ]
    assert rewards.load_rewards([]) == []


def test_a_rule_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "def shout(prompts, responses):\n    return [r.count('!') for r in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    [(name, fn, weight)] = rewards.load_rewards(["my_rules:shout:2"])
    assert (name, weight, rewards.call(fn, ["a", "b"], ["hey!!", "hm"])) == (
        "my_rules:shout",
        2.0,
        [2.0, 0.0],
    )


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("repetition", "want rm"),
        ("rm:", "want rm"),
        ("rm:heavy", "want rm"),
        ("rm:nan", "want rm"),
        ("minirlhf.rewards:length:", "want rm"),
        ("minirlhf.rewards:length:x", "want rm"),
        ("minirlhf.rewards:length:inf", "want rm"),
        ("minirlhf.rewards:length:1:2", "want rm"),
        ("", "want rm"),
        (
            "no_such_module:f",
            "ModuleNotFoundError: No module named 'no_such_module'; is no_such_module on PYTHONPATH",
        ),
        ("minirlhf.rewards:nothing", "no such function in minirlhf.rewards"),
        ("minirlhf.rewards:SPEC", "no such function in minirlhf.rewards"),
        ("..:f", "PYTHONPATH"),
    ],
)
def test_a_bad_spec_is_one_line(spec, reason):
    with pytest.raises(UserError) as error:
        rewards.load_rewards(["rm", spec])
    assert str(error.value).startswith(f"--reward {spec}:") and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_that_breaks_while_loading_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_rules.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match="^--reward broken_rules:f: SyntaxError: .*broken_rules.py.*$"
    ) as error:
        rewards.load_rewards(["broken_rules:f"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "result, got",
    [
        ([1.0], r"\[1.0\]"),
        ([1.0, math.nan], "nan"),
        ([math.inf, 0], "inf"),
        (None, "None"),
        (["a", "b"], r"\['a', 'b'\]"),
    ],
)
def test_call_checks_what_a_function_returns(result, got):
    def mine(prompts, responses):
        return result

    with pytest.raises(UserError, match=f"mine: want 2 finite numbers, one a response; got {got}$"):
        rewards.call(mine, ["p", "q"], ["r", "s"])


def test_shipped_rules():
    def each(fn, *responses):
        return rewards.call(fn, [""] * len(responses), list(responses))

    # "a b c a b c": 3-grams abc bca cab abc, so one of four repeats; case does not hide it.
    assert each(rewards.repetition, "a b c a b C", "a b c d", "a a", "", "no " * 50) == pytest.approx(
        [0.25, 0.0, 0.0, 0.0, 47 / 48]
    )
    # Each response on its own: two equal ones do not repeat each other.
    assert each(rewards.repetition, "a b c d", "a b c d") == [0.0, 0.0]
    # Of "a b c"'s 2-grams "a b" is in one of the two others and "b c" in none; alone in its batch a text is like nothing.
    assert each(rewards.sameness, "A b c", "a b a b", "x") == pytest.approx([0.25, 0.25, 0.0])
    assert each(rewards.sameness, *["fun, moving film"] * 3) == [1.0, 1.0, 1.0] and each(
        rewards.sameness, "a b"
    ) == [0.0]
    assert each(rewards.length, "", "one two  three", "w " * 100) == [0.0, 0.03, 1.0]
    assert each(rewards.blocked_words, "Damn, that IDIOT!", "idiotic", "damn damn") == [2.0, 0.0, 2.0]


def test_blocked_words_can_be_set(monkeypatch):
    monkeypatch.setattr(rewards, "BLOCKED_WORDS", {"kitten"})
    assert rewards.blocked_words(["", ""], ["A kitten.", "damn"]) == [1.0, 0.0]


def test_D15_the_longer_text_is_a_baseline():
    assert baselines.longer_text(["a", "abc", ""]) == [1.0, 3.0, 0.0]


def toy_reviews(n):
    """Texts whose rating is the sum of their words' values; "not bad" is worth more than its words."""
    value = {"good": 2.0, "fine": 1.0, "dull": -1.0, "awful": -2.0, "not bad": 1.5}
    words = list(value)
    texts = [[words[(7 * i + 3 * k * (i % 4 + 1)) % 5] for k in range(3)] for i in range(n)]
    return [" ".join(t) for t in texts], [sum(value[w] for w in t) for t in texts]


@pytest.mark.parametrize("characters", [False, True])
def test_tfidf_ridge_learns_words_and_pairs(characters):
    pytest.importorskip("sklearn")
    texts, ratings = toy_reviews(400)
    data = texts[:300], ratings[:300], texts[300:350], ratings[300:350], texts[350:]
    predicted = baselines.tfidf_ridge(*data, characters=characters)
    assert len(predicted) == 50 and pearson(predicted, ratings[350:]) > 0.95
    assert baselines.tfidf_ridge(*data, characters=characters) == predicted


def test_vader_lexicon_orders_plain_sentiment():
    pytest.importorskip("vaderSentiment")
    good, neutral, bad = baselines.vader_lexicon(["A great film!", "A film.", "A horrible film."])
    assert 1 >= good > neutral == 0 > bad >= -1


@pytest.mark.parametrize("missing", ["vaderSentiment.vaderSentiment", "sklearn.linear_model"])
def test_a_missing_library_gives_none(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # import raises ImportError
    if missing.startswith("vader"):
        assert baselines.vader_lexicon(["x"]) is None
    else:
        assert baselines.tfidf_ridge(["x"], [1.0], ["x"], [1.0], ["x"]) is None
