"""How far the judgements can be trusted: agreement, each rater's reliability, position bias, throughput.

Gold items and repeats measure raters; agreement is over the other items, with one vote per rater and item.
What cannot be measured is None, and is printed as "-".
"""

from collections import defaultdict
from itertools import combinations
from statistics import mean, median

from minirlhf.feedback.store import CHOICES, Store
from minirlhf.measure.agreement import krippendorff_alpha
from minirlhf.measure.stats import pearson, wilson

SIDE = {
    "a": -1,
    "tie": 0,
    "b": 1,
}  # times the strength: a choice on a scale of -2..2, which has no place for `bad`


def answer_of(vote: dict) -> str | int:
    """The answer without its strength: a, b, tie or bad, or the rating."""
    return vote["rating"] if vote["mode"] == "rating" else vote["choice"]


def number_of(vote: dict) -> float | None:
    """The answer as a number; None for `bad`."""
    if vote["mode"] == "rating":
        return vote["rating"]
    return SIDE[vote["choice"]] * vote.get("strength", 1) if vote["choice"] in SIDE else None


def rate_of(hits: list[bool]) -> dict | None:
    """{n, rate, interval} with Wilson's 95 % interval [D24]; None of nothing."""
    if not hits:
        return None
    return {"n": len(hits), "rate": mean(hits), "interval": list(wilson(sum(hits), len(hits)))}


def agreement(votes: list[dict]) -> dict:
    """Agreement within one mode: pairs of raters who give the same answer, and Krippendorff's alpha [D23]."""
    units = defaultdict(list)
    for vote in votes:
        units[vote["item"]].append(vote)
    same = [answer_of(v) == answer_of(w) for unit in units.values() for v, w in combinations(unit, 2)]
    code = lambda answer: CHOICES.index(answer) if isinstance(answer, str) else answer
    coded = [[code(answer_of(vote)) for vote in unit] for unit in units.values()]
    scaled = [[x for vote in unit if (x := number_of(vote)) is not None] for unit in units.values()]
    return {
        "items": len(units),
        "votes": len(votes),
        "shared": sum(len(unit) > 1 for unit in units.values()),
        "pairs": len(same),
        "raw": mean(same) if same else None,
        "alpha": {
            "nominal": krippendorff_alpha(coded, "nominal"),
            "ordinal": krippendorff_alpha(scaled, "ordinal"),
            "interval": krippendorff_alpha(scaled, "interval"),
        },
    }


def reliability(rater: str, votes: list[dict]) -> dict:
    """What one rater's votes tell about them.

    gold               right on items whose answer is known; a rating is right within one point
    self               the same answer to a repeated item
    with_majority      the answer that most of the others gave to the same pair
    with_mean_pearson  r with the mean of the others' ratings
    """
    own = [vote for vote in votes if vote["rater"] == rater]
    first = {vote["item"]: vote for vote in own if not vote["repeat"]}
    others = defaultdict(list)
    for vote in votes:
        plain = not vote["repeat"] and vote["gold"] is None
        if plain and vote["rater"] != rater and vote["item"] in first:
            others[vote["item"]].append(vote)

    with_majority, mine, theirs = [], [], []
    for item, given in others.items():
        if first[item]["mode"] == "rating":
            mine.append(first[item]["rating"])
            theirs.append(mean(vote["rating"] for vote in given))
            continue
        answers = [vote["choice"] for vote in given]
        most = max(map(answers.count, answers))
        top = {answer for answer in answers if answers.count(answer) == most}
        if len(top) == 1:  # the others have a majority
            with_majority.append(first[item]["choice"] in top)
    repeats = [vote for vote in own if vote["repeat"] and vote["item"] in first]
    return {
        "votes": len(own),
        "median_seconds": median(vote["seconds"] for vote in own),
        "gold": rate_of([is_right(vote) for vote in own if vote["gold"] is not None and not vote["repeat"]]),
        "self": rate_of([answer_of(vote) == answer_of(first[vote["item"]]) for vote in repeats]),
        "with_majority": rate_of(with_majority),
        "with_mean_pearson": pearson(mine, theirs) if len(mine) > 2 else None,
    }


def is_right(vote: dict) -> bool:
    """Whether a vote on a gold item gives the known answer; a rating may be off by one point."""
    if vote["mode"] == "rating":
        return abs(vote["rating"] - int(vote["gold"])) <= 1
    return vote["choice"] == vote["gold"]


def summarise(store: Store) -> dict:
    """Everything that `print_stats` shows, for JSON."""
    votes = store.judgements()
    plain = [vote for vote in votes if vote["gold"] is None and not vote["repeat"]]
    decided = [vote for vote in votes if vote["mode"] == "pair" and vote["choice"] in ("a", "b")]
    seconds = sum(vote["seconds"] for vote in votes)
    count = lambda column, table: {
        row[column]: row["n"]
        for row in store.rows(f"SELECT {column}, count(*) AS n FROM {table} GROUP BY {column}")
    }
    by_mode = {mode: [vote for vote in plain if vote["mode"] == mode] for mode in ("pair", "rating")}
    return {
        "items": count("mode", "items"),
        "agreement": {mode: agreement(chosen) for mode, chosen in by_mode.items() if chosen},
        "raters": {rater: reliability(rater, votes) for rater in sorted({vote["rater"] for vote in votes})},
        "left_chosen": rate_of([vote["choice"] == vote["shown"][0] for vote in decided]),
        "throughput": {
            "votes": len(votes),
            "seconds": seconds,
            "per_hour": 3600 * len(votes) / seconds if seconds else None,
        },
        "events": count("kind", "events"),
    }


def percent(rate: dict | None) -> str:
    if rate is None:
        return "-"
    low, high = rate["interval"]
    return f"{rate['rate']:.0%} [{low:.0%}, {high:.0%}] of {rate['n']}"


def print_stats(found: dict) -> None:
    """Print what `summarise` found; "-" stands for what cannot be measured."""
    print("items:", ", ".join(f"{n} {mode}" for mode, n in found["items"].items()) or "none")
    for mode, a in found["agreement"].items():
        shared = f"{a['shared']} of them judged by two raters or more"
        print(f"\n{mode}: {a['votes']} votes on {a['items']} items, {shared}")
        raw = "-" if a["raw"] is None else f"{a['raw']:.1%}"
        alpha = ", ".join(f"{k} {'-' if v is None else f'{v:.3f}'}" for k, v in a["alpha"].items())
        print(f"  raw agreement {raw} of {a['pairs']} pairs of raters; Krippendorff's alpha: {alpha}")

    heads = f"{'gold right':24s}{'same again':24s}{'with the others':24s}"
    print(f"\n{'rater':16s}{'votes':>6s}{'seconds':>9s}  {heads}")
    for name, r in found["raters"].items():
        with_others = percent(r["with_majority"])
        if r["with_mean_pearson"] is not None:
            with_others = f"{with_others} r {r['with_mean_pearson']:.2f}".removeprefix("- ")
        rates = f"{percent(r['gold']):24s}{percent(r['self']):24s}{with_others}"
        print(f"{name:16s}{r['votes']:6d}{r['median_seconds']:9.1f}  {rates}")

    verdict = ""
    if left := found["left_chosen"]:
        biased = not left["interval"][0] <= 0.5 <= left["interval"][1]
        verdict = ": a position bias" if biased else ": no position bias shown"
    print(f"\nleft chosen: {percent(left)}{verdict}")
    speed = found["throughput"]
    per_hour = "-" if speed["per_hour"] is None else f"{speed['per_hour']:.0f}"
    print(f"throughput: {speed['votes']} votes in {speed['seconds'] / 60:.1f} minutes, {per_hour} per hour")
