"""What PPO maximises: functions by name and the Scorer; the baselines of a reward model (measure/baselines.py)."""

import math
import sys

import numpy as np
import pytest
import torch

from minirlhf import UserError, data, rewards
from minirlhf.measure import baselines, rules
from minirlhf.measure.stats import pearson
from minirlhf.model import GPTConfig, RewardEnsemble
from minirlhf.rewards import RewardReader, Scorer
from minirlhf.rollout import Texts
from minirlhf.support import functions
from minirlhf.tokenizer import Tokenizer


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
    assert (name, weight, functions.call(fn, ["a", "b"], ["hey!!", "hm"])) == (
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
    "body, reason",
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise ValueError('two\\nlines\\x1b[31m')", "ValueError: two lines"),
        (
            "def f(prompts): return []",
            "too many positional arguments: want a function of (prompts, responses)",
        ),
        ("f = 3", "no such function"),
    ],
)
def test_a_module_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, body, reason):
    """Whatever it does while it loads, and before any training: the exit code is ours (2)."""
    (tmp_path / "odd_rules.py").write_text(body + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_rules", raising=False)
    with pytest.raises(UserError) as error:
        rewards.load_rewards(["odd_rules:f"])
    assert str(error.value).startswith("--reward odd_rules:f: ") and reason in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "result, problem",
    [
        ([1.0], "returned 1 numbers for 2 responses"),
        ([], "returned 0 numbers for 2 responses"),
        (None, "returned NoneType, not a list of numbers"),
        ("ab", "returned str, not a list of 2 numbers"),
        ({"a": 1, "b": 2}, "returned dict, not a list of 2 numbers"),
        ([1.0, math.nan], "row 1: nan is not a finite number (response 's two')"),
        ([math.inf, 0], "row 0: inf is not a finite number (response 'r')"),
        (["1", 0], "row 0: '1' is not a finite number (response 'r')"),
        ([0, None], "row 1: None is not a finite number (response 's two')"),
        ([10**400, 0], "is not a finite number (response 'r')"),
        (torch.zeros(2, 2), "row 0: tensor([0., 0.]) is not a finite number (response 'r')"),
    ],
    ids=str,
)
def test_call_checks_what_a_function_returns(result, problem):
    with pytest.raises(UserError) as error:
        functions.call(lambda prompts, responses: result, ["p", "q"], ["r", "s\ntwo"], "mine:f")
    assert str(error.value).startswith("--reward mine:f: ")
    assert problem.replace("s two", "s\\ntwo") in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "result", [(1, True), np.float32([1, 1]), torch.ones(2), iter([1.0, 1.0]), {0: 1.0, 1: 1.0}.values()]
)
def test_call_takes_any_sequence_of_numbers(result):
    assert functions.call(lambda prompts, responses: result, ["p", "q"], ["r", "s"]) == [1.0, 1.0]


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), ConnectionError("judge:\nreset")], ids=repr)
def test_H13_a_function_that_fails_is_one_line(error):
    def f(prompts, responses):
        raise error

    with pytest.raises(UserError, match=f"^--reward mine:f failed: {type(error).__name__}: ") as found:
        functions.call(f, ["p"], ["r"], "mine:f")
    assert str(found.value).isprintable()


def test_a_function_gets_copies():
    def greedy(prompts, responses):
        prompts.clear()
        responses[:] = ["x"] * len(responses)
        return [len(r) for r in responses]

    prompts, responses = ["p", "q"], ["long", "longer"]
    assert functions.call(greedy, prompts, responses) == [1.0, 1.0]
    assert (prompts, responses) == (["p", "q"], ["long", "longer"])


# ----------------------------------------------------------------------------- the sum of them


BYTES, OTHER = Tokenizer({bytes([b]): b for b in range(256)}), Tokenizer.train(["abc abd"] * 3, 260)


def texts_of(tokenizer: Tokenizer, rows: list[tuple[str, str]], ended: bool = True) -> Texts:
    prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt, _ in rows]
    responses = [[*tokenizer.encode(response), *[tokenizer.eot] * ended] for _, response in rows]
    return Texts(*data.collate(prompts, tokenizer.pad, side="left"), *data.collate(responses, tokenizer.pad))


def reward_model(tokenizer: Tokenizer, context: int = 32, members: int = 3, seed: int = 0) -> RewardReader:
    torch.manual_seed(seed)
    model = RewardEnsemble(GPTConfig(tokenizer.vocab_size, context, 1, 2, 16), "last+mean", members)
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    return RewardReader(model.eval(), tokenizer)


ROWS = [("ab", "c abd"), ("", "abc abc abc abc"), ("abd ", "d")]


def test_the_score_is_the_weighted_sum_of_its_parts():
    """A reward model less its members' disagreement, and rules; the judge is asked and never obeyed."""
    texts, ours, judge = texts_of(BYTES, ROWS), reward_model(BYTES), reward_model(BYTES, seed=1)
    specs = rewards.load_rewards(["rm:2", "minirlhf.rewards:length:-3", "minirlhf.rewards:repetition"])
    scores, parts = Scorer(specs, BYTES, ours, judge, disagreement_coef=0.5)(texts)
    mean, spread = ours.model(texts.tokens, texts.mask)
    responses = [response for _, response in ROWS]
    rules_sum = torch.tensor(
        [
            -3 * a + b
            for a, b in zip(rewards.length([], responses), rewards.repetition([], responses), strict=True)
        ]
    )
    torch.testing.assert_close(scores, 2 * (mean - 0.5 * spread) + rules_sum)
    assert spread.min() > 0.01 and rules_sum.abs().max() > 0.01
    assert parts.keys() == {"objective/rm_scores", "objective/rm_disagreement", "objective/judge"}
    torch.testing.assert_close(parts["objective/rm_scores"], mean)
    torch.testing.assert_close(parts["objective/rm_disagreement"], spread)
    torch.testing.assert_close(parts["objective/judge"], judge.model(texts.tokens, texts.mask)[0])
    assert not torch.equal(parts["objective/judge"], mean) and not scores.requires_grad


def test_a_scorer_may_have_no_reward_model():
    seen = []

    def mine(prompts, responses):
        seen.append((prompts, responses))
        return [float(len(p) - len(r)) for p, r in zip(prompts, responses, strict=True)]

    scores, parts = Scorer([("mine:f", mine, 0.5)], BYTES)(texts_of(BYTES, ROWS))
    assert scores.tolist() == [0.5 * (len(p) - len(r)) for p, r in ROWS] and parts == {}
    assert seen == [([p for p, _ in ROWS], [r for _, r in ROWS])]  # without <bos>, EOS and padding


def test_members_to_disagree_are_needed():
    alone = reward_model(BYTES, members=1)
    with pytest.raises(
        UserError, match="--disagreement-coef: the reward model has one member: train it with --members 3"
    ):
        Scorer(rewards.load_rewards(["rm"]), BYTES, alone, disagreement_coef=0.5)
    assert Scorer(rewards.load_rewards(["rm"]), BYTES, alone)(texts_of(BYTES, ROWS))[0].isfinite().all()


@pytest.mark.parametrize("microbatch", [1, 2, None])
def test_scores_do_not_know_microbatches(microbatch):
    texts, ours = texts_of(BYTES, ROWS), reward_model(BYTES)
    scores = Scorer(rewards.load_rewards(["rm"]), BYTES, ours, ours, microbatch=microbatch)(texts)
    whole = ours.model(texts.tokens, texts.mask)[0]
    torch.testing.assert_close(scores[0], whole)
    torch.testing.assert_close(scores[1]["objective/judge"], whole)


@pytest.mark.parametrize("ended", [True, False])
def test_H16_a_reader_with_another_tokenizer_and_a_shorter_context(ended):
    """It reads the text in its own tokens, as in its training: cut at the end where it is too long, and counted."""
    texts, ours = texts_of(OTHER, ROWS, ended), reward_model(BYTES, context=12)
    scores, _, was_cut = ours.scores(texts, OTHER)
    for row, (prompt, response) in enumerate(ROWS):
        own = [BYTES.bos, *BYTES.encode(prompt + response), *[BYTES.eot] * ended]
        alone = ours.model(*data.collate([own[:12]], BYTES.pad))[0]
        torch.testing.assert_close(scores[row : row + 1], alone)
        assert was_cut[row] == (len(own) > 12)
    assert was_cut.tolist() == [0, 1, 0]
    parts = Scorer(rewards.load_rewards(["rm"]), OTHER, ours)(texts)[1]
    assert torch.equal(parts["objective/rm_cut"], was_cut)


# ----------------------------------------------------------------------------- the rules that are shipped


def test_shipped_rules():
    def each(fn, *responses):
        return functions.call(fn, [""] * len(responses), list(responses))

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
    monkeypatch.setattr(rules, "BLOCKED_WORDS", {"kitten"})
    assert rewards.blocked_words(["", ""], ["A kitten.", "damn"]) == [1.0, 0.0]


# ----------------------------------------------------------------------------- baselines of a reward model


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
