"""`python -m minirlhf.conformance`: it catches every planted bug, finds no fault with ours, and takes any signature."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minirlhf import UserError
from minirlhf.tools.conformance.kinds import KINDS, PROPERTIES
from minirlhf.tools.conformance.subject import Subject, check
from tests.planted import BUGS, HEALTHY, policy_loss_of

ROOT = Path(__file__).resolve().parents[1]


def asked(kind: str, function, **options) -> dict[str, object]:
    subject = Subject(function, KINDS[kind], **options)
    return {p.title: check(subject, p) for p in PROPERTIES[kind]}


def property_of(kind: str, number: str, title: str):
    found = [p for p in PROPERTIES[kind] if p.number == number and p.title.startswith(title)]
    assert len(found) == 1, (kind, number, title)
    return found[0]


NAMES = [f"{b.number}-{b.kind}-{getattr(b.function, '__name__', '')}-{b.title[:20]}" for b in BUGS]


@pytest.mark.parametrize("bug", BUGS, ids=NAMES)
def test_planted_bugs_are_caught(bug):
    asked = property_of(bug.kind, bug.number, bug.title)
    for seed in range(3):
        outcome = check(Subject(bug.function, KINDS[bug.kind], seed=seed, **bug.options), asked)
        assert outcome.status == "FAILS", outcome
        lines = dict(outcome.lines)
        assert lines["example"] and lines["got"] != lines["right"] and lines["effect"]
        assert "Error" not in lines["got"], (
            outcome
        )  # caught by a number, not by a crash of the planted function


def test_every_property_catches_something():
    caught = {property_of(bug.kind, bug.number, bug.title) for bug in BUGS}
    assert {p for properties in PROPERTIES.values() for p in properties} == caught


@pytest.mark.parametrize(
    ("kind", "function", "options"),
    HEALTHY,
    ids=[f"{kind}-{'-'.join(map(str, o.get('fixed', {}).values()))}" for kind, _, o in HEALTHY],
)
def test_ours_hold(kind, function, options):
    for seed in range(3):
        for outcome in asked(kind, function, seed=seed, **options).values():
            meant = kind == "averaging" or outcome.status == "holds"
            assert meant and outcome.status != "FAILS", outcome


def test_every_kind_has_one_that_holds():
    assert {kind for kind, _, _ in HEALTHY} == {*KINDS} == {*PROPERTIES}
    assert all(p.consequence and len(p.number) <= 3 for ps in PROPERTIES.values() for p in ps)


# ----------------------------------------------------------------------------- other signatures


def theirs(logp, old_logp, adv, padding, eps_low, eps_high, scale):
    """Names of its own, an inverted float mask, two bounds, losses per token in a dict beside something else."""
    keep = 1 - padding
    ratio = ((logp - old_logp) * keep).clamp(max=20).exp()
    losses = -torch.minimum(adv * ratio, adv * ratio.clamp(1 - eps_low, 1 + eps_high))
    return {"ratio": ratio, "losses": scale * losses * keep}


ADAPTED = {
    "rename": {
        "logp": "new_logprobs",
        "old_logp": "logprobs",
        "adv": "advantages",
        "padding": "response_mask",
        "eps_low": "clip_range.low",
        "eps_high": "clip_range.high",
    },
    "fixed": {"scale": 1.0},
    "mask": "inverted-float",
    "output": ("key:losses", "tensor"),
}


def test_a_function_with_names_of_its_own():
    assert {o.status for o in asked("policy_loss", theirs, **ADAPTED).values()} == {"holds"}


def test_its_bugs_are_found_all_the_same():
    found = asked("policy_loss", theirs, **ADAPTED | {"fixed": {"scale": -1.0}}).values()
    assert {"D12", "D4", "P20"} <= {o.asked.number for o in found if o.status == "FAILS"}


def test_a_sum_over_tokens_is_divided_by_us():
    def summed(new_logprobs, logprobs, advantages, response_mask, clip_range):
        return policy_loss_of(lambda A, r, low, high: torch.maximum(-A * r, -A * r.clamp(low, high)))(
            new_logprobs, logprobs, advantages, response_mask, clip_range, denominator=1
        )

    found = asked("policy_loss", summed, output=("sum",)).values()
    assert {o.status for o in found} == {"holds", "-"}
    assert [o.remark for o in found if o.status == "-"] == ["it takes no weights"]


def test_what_a_function_lacks_is_not_asked():
    """Neither mask, clip range nor denominator: what holds of whole rows at the usual range is asked all the same."""

    def bare(new_logprobs, logprobs, advantages):
        ratio = (new_logprobs - logprobs).exp()
        return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()

    found = asked("policy_loss", bare).values()
    assert [o.asked.number for o in found if o.status == "holds"] == ["D12", "D12", "P20", "D4"]
    remarks = {o.remark.partition(":")[0] for o in found if o.status == "-"}
    assert remarks == {f"it takes no {x}" for x in ("clip_range", "response_mask", "denominator", "weights")}


def test_what_raises_fails_with_its_words():
    def no_pair_of_lengths(x, mask):
        if not mask.any():
            raise ValueError("nothing is real")
        return torch.where(mask, x, 0.0).sum() / mask.sum()

    found = asked("masked_mean", no_pair_of_lengths)["no real token gives a finite number"]
    assert found.status == "FAILS" and ("got", "ValueError: nothing is real") in found.lines


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rename": {"a": "logprobs"}}, "has no parameter a; it has logprobs, ref_logprobs"),
        ({"rename": {"logprobs": "x"}}, "--rename to x: our names are logprobs, ref_logprobs"),
        ({"fixed": {"a": 1}}, "has no parameter a"),
        ({"output": ("tuple:3",)}, "--output tuple:3: there is no such part"),
        ({"output": ("key:loss",)}, "--output key:loss: there is no such part"),
    ],
    ids=str,
)
def test_a_wrong_adapter_is_the_users_mistake(options, said):
    from minirlhf.ppo import kl_estimates

    with pytest.raises(UserError) as error:
        Subject(kl_estimates, KINDS["kl"], **options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("kind", "function", "said"),
    [
        ("kl", lambda p, q: p, "has no parameter logprobs (it has p, q): add --rename THEIRS=logprobs"),
        ("kl", lambda logprobs, ref_logprobs: logprobs, "say which one, as --output k3"),
        (
            "kl",
            lambda logprobs, ref_logprobs, k: logprobs,
            "needs k, which is none of our names: add --set k=VALUE",
        ),
        (
            "kl",
            lambda logprobs, ref_logprobs: 1 / 0,
            "called for the first time, the function fails: ZeroDivision",
        ),
        ("kl", lambda logprobs, ref_logprobs: sys.exit(3), "the function fails: SystemExit: 3"),
        ("masked_mean", lambda x, mask: 1.0, "returns a float: choose a part"),
        ("kl_loss", lambda new_logprobs, ref_logprobs: new_logprobs, "add --output tensor"),
    ],
)
def test_a_wrong_signature_is_the_users_mistake(kind, function, said):
    with pytest.raises(UserError) as error:
        Subject(function, KINDS[kind])
    assert said in str(error.value)


# ----------------------------------------------------------------------------- the command


def test_the_command_tells_everything_about_a_failure(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_k3.py").write_text("def k3(a, b):\n    return (a - b).exp() - 1 - (a - b)\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = [
        "mine_k3:k3",
        "--as",
        "kl",
        "--rename",
        "a=logprobs",
        "--rename",
        "b=ref_logprobs",
        "--output",
        "k3",
    ]
    assert run("minirlhf.conformance", *words, "--seed", 3) == 1
    out, err = capsys.readouterr()
    assert out.startswith(
        "mine_k3:k3 as kl, seed 3\n-       D1   k1 = logprobs - ref_logprobs: it returns no k1\n"
    )
    assert (
        """
FAILS   P7   the means of k1 and of k3 under the policy are KL(policy || reference)
             example  policy [0.8, 0.2], reference [0.5, 0.5]: mean of k3 under the policy
             got      0.167255
             right    0.192745
             effect   the logged KL is that of the reversed distributions, and as a penalty it has the wrong size or sign
             seen in  a well-known book's code and its own test
"""
        in out
    )
    assert out.endswith("\n0 hold, 3 fail, 2 not asked\n") and err == ""
    assert run("minirlhf.conformance", *words, "--accept", "P7", "--accept", "P10") == 0
    assert capsys.readouterr().out.endswith("\n0 hold, 0 fail, 2 not asked, 3 accepted\n")


def test_a_module_of_the_current_folder_is_found(tmp_path):
    """In a process of its own, as a user runs it."""
    (tmp_path / "mine_mean.py").write_text("def mean(x, mask):\n    return x[mask].mean()\n")
    words = [sys.executable, "-m", "minirlhf.conformance", "mine_mean:mean", "--as", "masked_mean"]
    done = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "" and "FAILS   D22  no real token" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["minirlhf.ppo:kl_estimates"], "want module:function and --as KIND, one of kl, kl_loss"),
        (["kl", "--as", "kl"], "kl: want package.module:function"),
        (["no_such:f", "--as", "kl"], "cannot import no_such: ModuleNotFoundError"),
        (["minirlhf.ppo:no_such", "--as", "kl"], "minirlhf.ppo has no no_such: check the spelling"),
        (["minirlhf.ppo:math", "--as", "kl"], "minirlhf.ppo:math is no function"),
        (["minirlhf.ppo:kl_estimates", "--as", "kll"], "invalid choice: 'kll'"),
        (["minirlhf.ppo:kl_estimates", "--as", "kl", "--output", "k4"], "--output k4: want tuple:N"),
        (["minirlhf.ppo:kl_estimates", "--as", "kl", "--accept", "P99"], "--accept P99: no property"),
        (["minirlhf.ppo:kl_estimates", "--as", "kl", "--rename", "a"], "--rename a: want NAME=VALUE"),
        (["minirlhf.ppo:kl_estimates", "--as", "kl", "--set", "a="], "--set a=: want NAME=VALUE"),
    ],
)
def test_a_mistake_is_one_line(run, capsys, words, said):
    assert run("minirlhf.conformance", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and said in err


def test_the_list_is_a_table_of_every_property(run, capsys):
    assert run("minirlhf.conformance", "--list") == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    titles = {(p.number, p.title.replace("||", "\\|\\|")) for ps in PROPERTIES.values() for p in ps}
    assert {tuple(row.split(" | ", 2)[:2]) for row in rows} == {(f"| {n}", title) for n, title in titles}
    assert all(row.count(" | ") == 4 for row in rows)


def test_the_pages_count_what_there_is():
    bugs, properties = len({bug.function for bug in BUGS}), sum(map(len, PROPERTIES.values()))
    page, readme = ((ROOT / name).read_text() for name in ("docs/conformance.md", "README.md"))
    assert f"holds {bugs} functions with a bug each; each of the {properties} properties" in page
    assert f"the same for the objectives: {properties} properties" in readme


@pytest.mark.parametrize("library", ["trl", "verl", "openrlhf"])
def test_the_page_counts_what_libraries_hold(library):
    """Sums over the raw output, every property of which is one that is asked today."""
    raw = (ROOT / f"benchmarks/results/conformance_{library}.txt").read_text()
    counts = [
        map(int, found) for found in re.findall(r"^(\d+) hold, (\d+) fail, (\d+) not asked$", raw, re.M)
    ]
    sums = " | ".join(str(sum(column)) for column in zip(*counts, strict=True))
    assert (
        f"(../benchmarks/results/conformance_{library}.txt)) | {sums} |"
        in (ROOT / "docs/conformance.md").read_text()
    )
    for part in raw.split("\n\n")[1:]:
        kind = re.match(r".+ as (\w+), seed", part)[1]
        asked = re.findall(r"^(?:holds|FAILS|-)\s+(\w+)\s+(.+)$", part, re.M)
        assert len(asked) == len(PROPERTIES[kind])
        for (number, told), p in zip(asked, PROPERTIES[kind], strict=True):
            assert number == p.number and told.startswith(p.title)


def test_the_page_lists_the_properties(run, capsys):
    """docs/conformance.md's table is what --list prints."""
    assert run("minirlhf.conformance", "--list") == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs/conformance.md").read_text()
