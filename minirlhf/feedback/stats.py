"""How far the judgements can be trusted: agreement, each rater's reliability, position bias, throughput.

Gold items and repeats measure raters; agreement is over the other items, one vote a rater and item.
"""

from collections import defaultdict
from itertools import combinations
from statistics import mean, median

from minirlhf.feedback.store import CHOICES, Store
from minirlhf.measure.agreement import krippendorff_alpha
from minirlhf.measure.stats import pearson, wilson

SIDE = {"a": -1, "tie": 0, "b": 1}  # x strength: a choice on a scale of -2..2, on which `bad` has no place


def says(vote: dict) -> str | int:
    """The answer without its strength: a, b, tie or bad, or the rating."""
    return vote["rating"] if vote["mode"] == "rating" else vote["choice"]


def scale(vote: dict) -> float | None:
    """The answer as a number, where it is one."""
    if vote["mode"] == "rating":
        return vote["rating"]
    return SIDE[vote["choice"]] * vote.get("strength", 1) if vote["choice"] in SIDE else None


def rate_of(hits: list[bool]) -> dict | None:
    """{n, rate, interval} with Wilson's 95 % interval [D24]."""
    return (
        {"n": len(hits), "rate": mean(hits), "interval": list(wilson(sum(hits), len(hits)))} if hits else None
    )


def agreement(votes: list[dict]) -> dict:
    """Of one mode: raw agreement (two raters of an item give the same answer) and Krippendorff's alpha [D23]."""
    units = defaultdict(list)
    for vote in votes:
        units[vote["item"]].append(vote)
    same = [says(v) == says(w) for unit in units.values() for v, w in combinations(unit, 2)]
    number = lambda answer: CHOICES.index(answer) if isinstance(answer, str) else answer
    scaled = [[x for vote in unit if (x := scale(vote)) is not None] for unit in units.values()]
    alpha = {
        "nominal": krippendorff_alpha([[number(says(v)) for v in unit] for unit in units.values()], "nominal")
    }
    alpha |= {level: krippendorff_alpha(scaled, level) for level in ("ordinal", "interval")}
    shared = sum(len(unit) > 1 for unit in units.values())
    # Alpha needs two raters on an item: without any there is none to tell, rather than 0.
    return {"items": len(units), "votes": len(votes), "shared": shared, "pairs": len(same),
            "raw": mean(same) if same else None, "alpha": alpha if same else None}  # fmt: skip


def reliability(rater: str, votes: list[dict]) -> dict:
    """What one rater's votes say of them; with the others on the same items: same answer as their majority (ratings: r with
    their mean). A gold rating is right within one point."""
    own = [v for v in votes if v["rater"] == rater]
    first = {v["item"]: v for v in own if not v["repeat"]}
    right = lambda v: (
        abs(v["rating"] - int(v["gold"])) <= 1 if v["mode"] == "rating" else v["choice"] == v["gold"]
    )
    others = defaultdict(list)
    for v in votes:
        if v["rater"] != rater and not v["repeat"] and v["gold"] is None and v["item"] in first:
            others[v["item"]].append(v)
    with_majority, mine, theirs = [], [], []
    for item, said in others.items():
        if first[item]["mode"] == "rating":
            mine.append(first[item]["rating"])
            theirs.append(mean(v["rating"] for v in said))
        else:
            answers = [v["choice"] for v in said]
            top = {a for a in answers if answers.count(a) == max(map(answers.count, answers))}
            if len(top) == 1:  # the others have a majority
                with_majority.append(first[item]["choice"] in top)
    return {
        "votes": len(own),
        "median_seconds": median(v["seconds"] for v in own),
        "gold": rate_of([right(v) for v in own if v["gold"] is not None and not v["repeat"]]),
        "self": rate_of(
            [says(v) == says(first[v["item"]]) for v in own if v["repeat"] and v["item"] in first]
        ),
        "with_majority": rate_of(with_majority),
        "with_mean_pearson": pearson(mine, theirs) if len(mine) > 2 else None,
    }


def summarise(store: Store) -> dict:
    """Everything that `print_stats` shows, for JSON."""
    votes = store.judgements()
    plain = [v for v in votes if v["gold"] is None and not v["repeat"]]
    decided = [v for v in votes if v["mode"] == "pair" and v["choice"] in ("a", "b")]
    seconds = sum(v["seconds"] for v in votes)
    return {
        "items": {
            r["mode"]: r["n"] for r in store.rows("SELECT mode, count(*) AS n FROM items GROUP BY mode")
        },
        "agreement": {
            m: agreement(chosen)
            for m in ("pair", "rating")
            if (chosen := [v for v in plain if v["mode"] == m])
        },
        "raters": {rater: reliability(rater, votes) for rater in sorted({v["rater"] for v in votes})},
        "left_chosen": rate_of([v["choice"] == v["shown"][0] for v in decided]),
        "throughput": {
            "votes": len(votes),
            "seconds": seconds,
            "per_hour": 3600 * len(votes) / seconds if seconds else None,
        },
        "events": {
            r["kind"]: r["n"] for r in store.rows("SELECT kind, count(*) AS n FROM events GROUP BY kind")
        },
    }


def print_stats(found: dict) -> None:
    percent = lambda r: (
        f"{r['rate']:.0%} [{r['interval'][0]:.0%}, {r['interval'][1]:.0%}] of {r['n']}" if r else "-"
    )
    print("items:", ", ".join(f"{n} {mode}" for mode, n in found["items"].items()) or "none")
    for mode, a in found["agreement"].items():
        print(
            f"\n{mode}: {a['votes']} votes on {a['items']} items, {a['shared']} of them judged by two raters or more"
        )
        if a["alpha"]:
            alpha = ", ".join(f"{level} {value:.3f}" for level, value in a["alpha"].items())
            print(
                f"  raw agreement {a['raw']:.1%} of {a['pairs']} rater pairs; Krippendorff's alpha: {alpha}"
            )
    print(
        f"\n{'rater':16s}{'votes':>6s}{'seconds':>9s}  {'gold right':24s}{'same again':24s}{'with the others':24s}"
    )
    for name, r in found["raters"].items():
        with_mean = "" if r["with_mean_pearson"] is None else f" r {r['with_mean_pearson']:.2f}"
        print(f"{name:16s}{r['votes']:6d}{r['median_seconds']:9.1f}  {percent(r['gold']):24s}{percent(r['self']):24s}"
              f"{percent(r['with_majority'])}{with_mean}")  # fmt: skip
    if left := found["left_chosen"]:
        biased = not left["interval"][0] <= 0.5 <= left["interval"][1]
        print(
            f"\nleft chosen: {percent(left)}"
            + (": a position bias" if biased else ": no position bias shown")
        )
    speed = found["throughput"]
    if speed["per_hour"]:
        print(
            f"throughput: {speed['votes']} votes in {speed['seconds'] / 60:.1f} minutes, {speed['per_hour']:.0f} an hour"
        )
