"""Translation: a reward model of Chinese-English translations by professional raters, and what it chooses.

The data are Google's MQM ratings (Freitag et al. 2021, Apache-2.0), tables with one row per error: WMT 2023
(ten systems, three raters per translation) and TED talks (one rater, references).  A translation costs what
its errors add up to.  Of WMT, documents are for training or for the test as a whole; the talks are all for the
test.  A reward model, a linear head on SmolLM2's first layers, sees the translation alone.  Another compares it with
the other systems' translations of the segment.
"""

import hashlib
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np

from benchmarks.demo import table
from benchmarks.recipes import frozen, judged
from benchmarks.recipes.common import over_seeds
from minirlhf import UserError
from minirlhf.feedback.raters import combine_raters
from minirlhf.measure import baselines
from minirlhf.measure.agreement import krippendorff_alpha
from minirlhf.measure.stats import pearson
from minirlhf.support.sources import lines_of

BESIDE = "reward model, beside the others"
Scores = Sequence[float] | None  # higher is better; None where a library is missing
DATA = ("WMT 2023's Chinese-English table of wmt-mqm-human-evaluation", "that of the TED talks")
FOLDS = 3  # a third of the documents is for the test
LAYERS, STRENGTH = 16, 1e-2  # of SmolLM2's 30, and the ridge penalty: chosen on seed 1's training documents
NEEDED = ("system", "doc", "rater", "source", "target", "category", "severity")
SEGMENTS = ("globalSegId", "seg_id")  # the two spellings of the column that numbers segments
PEOPLE = ("ref", "refA", "refB")  # translations by people among the systems
REFERENCE = "refB"  # the better of the two that TED has
COSTS = {"major": 5.0, "minor": 1.0, "neutral": 0.0, "no-error": 0.0}


@dataclass
class Translation:
    """A system's translation of a segment, and what each rater's errors in it add up to."""

    system: str
    document: str
    segment: str
    source: str
    target: str
    costs: dict[str, float] = field(default_factory=dict)  # by rater, 0 or more, lower is better

    @property
    def cost(self) -> float:
        """The mean over raters."""
        return mean(self.costs.values())


def cost_of(category: str, severity: str) -> float:
    """What an error costs (Freitag et al. 2021, table 1).  Raises UserError for another severity."""
    category, severity = category.strip().lower(), severity.strip().lower()
    if category.startswith("non-translation"):
        return 25.0
    if severity == "minor" and category.startswith("fluency/punctuation"):
        return 0.1
    if severity not in COSTS:
        raise UserError(f"severity: {severity!r:.40} is none of {', '.join(COSTS)}")
    return COSTS[severity]


def read(file: Path) -> list[Translation]:
    """The translations of a table, in its order.  Raises UserError('file:line: field: reason').

    Rows of the raters' attention tests (HOTW) are left out.
    """
    found: dict[tuple[str, ...], Translation] = {}
    names: list[str] = []
    for number, line in lines_of(file, hashlib.sha256()):
        try:
            cells = line.decode().split("\t")
            if not names:
                names = cells
                segment = next((name for name in SEGMENTS if name in names), SEGMENTS[0])
                if missing := [name for name in (*NEEDED, segment) if name not in names]:
                    raise UserError(
                        f"no column {', '.join(missing)}: want a table of wmt-mqm-human-evaluation"
                    )
            if len(cells) != len(names):
                raise UserError(f"{len(cells)} columns, but the heading has {len(names)}")
            row = dict(zip(names, cells, strict=True))
            if row["system"] == "system" or row["severity"].startswith(
                "HOTW"
            ):  # headings stand in the middle, too
                continue
            source, target = (
                row[name].replace("<v>", "").replace("</v>", "") for name in ("source", "target")
            )
            key = row["system"], row["doc"], row[segment]
            one = found.setdefault(key, Translation(*key, source, target))
            cost = cost_of(row["category"], row["severity"])
            one.costs[row["rater"]] = one.costs.get(row["rater"], 0.0) + cost
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:{number}: not UTF-8: {error.reason}") from None
        except UserError as error:
            raise UserError(f"{file}:{number}: {error}") from None
    if not found:
        raise UserError(f"{file}: no translation in it")
    return list(found.values())


def document_of(item: Translation) -> str:
    return item.document


def groups_of(items: Iterable[Translation]) -> list[list[int]]:
    """The places of the items, by segment."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        found[item.document, item.segment].append(i)
    return list(found.values())


# ---------------------------------------------------------------- what is learnt


def quality(cost: float) -> float:
    """0 where nothing is wrong, else below: the tenth error matters less than the first."""
    return -math.log1p(cost)


def targets(items: Sequence[Translation]) -> list[list[float]]:
    """Each rater's quality of each item, minus the mean over all translations of the segment."""
    found = [[quality(cost) for cost in item.costs.values()] for item in items]
    for group in groups_of(items):
        middle = mean(mean(found[i]) for i in group)
        for i in group:
            found[i] = [rating - middle for rating in found[i]]
    return found


def votes_of(items: Sequence[Translation]) -> tuple[list[int], list[dict[str, float]]]:
    """Each two translations of a segment that a rater judged both: their places, one after the other, and the votes.

    A rater votes 1 for the first if its errors cost less, 0 if the second's do, else .5.
    """
    places, votes = [], []
    for group in groups_of(items):
        for i, j in itertools.combinations(group, 2):
            a, b = items[i].costs, items[j].costs
            if found := {rater: float(1 + np.sign(b[rater] - a[rater])) / 2 for rater in a if rater in b}:
                places += [i, j]
                votes.append(found)
    return places, votes


def shares_of(votes: Sequence[dict[str, float]], raters: str = "mean") -> np.ndarray:
    """The first one's share of each pair's votes; with "model" raters count by their reliability."""
    values, names = [list(vote.values()) for vote in votes], [list(vote) for vote in votes]
    return combine_raters(values, names, raters, votes=True)[0]


# ---------------------------------------------------------------- what is measured


def pair_accuracy(scores: Sequence[float], costs: Sequence[float], groups: Iterable[Sequence[int]]) -> float:
    """How often the higher score is the translation that costs less, over all pairs within a group.

    Equal scores count a half, pairs of equal cost do not count.
    """
    scores, costs = np.asarray(scores, dtype=float), np.asarray(costs, dtype=float)
    right = pairs = 0.0
    for group in groups:
        score, cost = scores[group], costs[group]
        better = np.triu(np.sign(cost[None] - cost[:, None]), 1)  # 1: the row's item costs less
        agreement = np.sign(score[:, None] - score[None]) * better
        pairs += np.count_nonzero(better)
        right += (agreement[better != 0] + 1).sum() / 2
    return right / pairs


def chosen_cost(scores: Sequence[float], costs: Sequence[float], groups: Iterable[Sequence[int]]) -> float:
    """The mean cost of the translation with each group's highest score; of several, the mean."""
    found = []
    for group in groups:
        best = max(scores[i] for i in group)
        found.append(mean(costs[i] for i in group if scores[i] == best))
    return mean(found)


def measured(
    scores: Scores, items: Sequence[Translation], costs: Sequence[float] | None = None
) -> dict[str, float] | None:
    """Pair accuracy within a segment, Pearson's r with minus the cost, and the cost of what is chosen.

    costs: the items' own, unless given.
    """
    if scores is None:
        return None
    costs, groups = costs or [item.cost for item in items], groups_of(items)
    return {
        "pairs": float(pair_accuracy(scores, costs, groups)),
        "r": pearson(scores, [-cost for cost in costs]),
        "chosen": float(chosen_cost(scores, costs, groups)),
    }


def one_rater(items: Sequence[Translation]) -> dict[str, float | None]:
    """Each rater in turn as the score, judged by the mean of the others; and Krippendorff's alpha of all."""
    ratings = [[item.costs[rater] for rater in sorted(item.costs)] for item in items]
    turns = []
    for i in range(min(map(len, ratings))):
        others = [mean(r[:i] + r[i + 1 :]) for r in ratings]
        turns.append(measured([-r[i] for r in ratings], items, others))
    alpha = krippendorff_alpha([[quality(cost) for cost in r] for r in ratings])
    return {name: mean(turn[name] for turn in turns) for name in turns[0]} | {"alpha": alpha}


def within_segments(items: Sequence[Translation]) -> dict[str, float]:
    """Shares of the variance of quality, and how far two raters agree, within segments.

    raters: r of two raters' qualities, each minus the rater's mean over the segment.  within: the share of
    the variance of the mean quality that lies within segments.  system: the share of that which lies between
    the means of systems.
    """
    known = np.array([mean(map(quality, item.costs.values())) for item in items])
    centred, pairs = known.copy(), []
    for group in groups_of(items):
        centred[group] -= known[group].mean()
        raters = set.intersection(*(set(items[i].costs) for i in group))
        rated = np.array([[quality(items[i].costs[rater]) for i in group] for rater in sorted(raters)])
        rated = rated.reshape(-1, len(group))
        rated -= rated.mean(1, keepdims=True)
        pairs += [rated[[a, b]] for a in range(len(rated)) for b in range(len(rated)) if a != b]
    systems = defaultdict(list)
    for item, value in zip(items, centred, strict=True):
        systems[item.system].append(value)
    between = sum(len(values) * mean(values) ** 2 for values in systems.values()) / len(items)
    return {
        "raters": pearson(*np.concatenate(pairs, 1)),
        "within": float(centred.var() / known.var()),
        "system": float(between / centred.var()),
    }


def longer(items: Sequence[Translation]) -> list[float]:
    return [float(len(item.target)) for item in items]


def beside_others(items: Sequence[Translation], states: np.ndarray, *more: Sequence[float]) -> np.ndarray:
    """[items, C + more]: mean hidden states [items, C] and further numbers, minus the mean over the segment."""
    found = np.column_stack([states, *more])
    for group in groups_of(items):
        found[group] -= found[group].mean(0)
    return found


def similarity(texts: Sequence[str], references: Sequence[str]) -> Scores:
    """chrF of each text with its reference (Popovic 2015); None without sacrebleu."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        return None
    chrf = CHRF()
    return [
        chrf.sentence_score(*pair).score / 100 for pair in zip(texts, [[r] for r in references], strict=True)
    ]


def alike(items: Sequence[Translation]) -> Scores:
    """Each translation's mean chrF with the others of its segment; None without sacrebleu."""
    found = {}
    for group in groups_of(items):
        for i in group:
            others = [items[j].target for j in group if j != i]
            found[i] = similarity([items[i].target] * len(others), others)
    return None if None in found.values() else [mean(found[i] or [0.0]) for i in range(len(items))]


def of_system(learnt: Sequence[Translation], items: Sequence[Translation]) -> list[float]:
    """Minus the mean cost, in training, of the system that wrote each translation."""
    costs = costs_by_system(learnt)
    return [-mean(costs[item.system]) for item in items]


def costs_by_system(items: Sequence[Translation]) -> dict[str, list[float]]:
    found = defaultdict(list)
    for item in items:
        found[item.system].append(item.cost)
    return found


def against_reference(items: Sequence[Translation], ted: Path) -> Scores:
    """chrF of each translation with the one by people; None without sacrebleu."""
    references = {(x.document, x.segment): x.target for x in read(ted) if x.system == REFERENCE}
    if missing := [x for x in items if (x.document, x.segment) not in references]:
        where = f"{missing[0].document}, segment {missing[0].segment}"
        raise UserError(f"{ted}: no translation by {REFERENCE} of {where}")
    return similarity([x.target for x in items], [references[x.document, x.segment] for x in items])


def counted_words(learnt: Sequence[Translation], tested: Sequence[Translation]) -> Scores:
    """What a ridge regression on TF-IDF makes of translations; a fifth of the documents chooses its strength."""
    fit, choose = judged.divide(learnt, document_of, 5, 0)
    texts = [[item.target for item in items] for items in (fit, choose, tested)]
    known = [[mean(ratings) for ratings in targets(items)] for items in (fit, choose)]
    return baselines.tfidf_ridge(texts[0], known[0], texts[1], known[1], texts[2], characters=True)


# ---------------------------------------------------------------- one seed


def run(home: Path, seed: int, smoke: bool, wmt: Path, ted: Path) -> dict:
    began = time.perf_counter()
    whole = judged.backbone(home, smoke)
    base = frozen.shallow(whole, 1 if smoke else LAYERS)
    items, talks = read(wmt), [item for item in read(ted) if item.system not in PEOPLE]
    learnt, test = judged.divide(items, document_of, FOLDS, seed)
    parts = learnt, test, talks
    texts = [[("", item.target) for item in part] for part in parts]
    everything = [*itertools.chain(*texts)]
    states = frozen.states_of(base, everything, home.parent)
    fluency = frozen.states_of(whole, everything, home.parent, judged.mean_logprob)

    places, votes = votes_of(learnt)
    vectors, likeness, compared = [states(part) for part in texts], [alike(part) for part in parts], None
    head = frozen.fit(shares_of(votes), vectors[0][places], STRENGTH)
    frozen.save(home / "rm", base, head, STRENGTH)
    if None not in likeness:
        columns = zip(parts, vectors, map(fluency, texts), likeness, strict=True)
        compared = [beside_others(part, *numbers) for part, *numbers in columns]

    def beside(raters: str) -> list[Scores]:
        """The scores of test and talks by a head that reads each translation beside the others."""
        if compared is None:
            return [None, None]
        head = frozen.fit(shares_of(votes, raters), compared[0][places], STRENGTH, unscaled=2)
        return [head(part).tolist() for part in compared[1:]]

    by = {
        "reward model": [head(part).tolist() for part in vectors[1:]],
        BESIDE: beside("mean"),
        f"{BESIDE}, raters weighed": beside("model"),
        "TF-IDF + ridge": [counted_words(learnt, test), None],
        "longer text": [longer(test), longer(talks)],
        "most like the others (chrF)": likeness[1:],
        "its system's mean in training": [of_system(learnt, test), None],
        "chrF with a reference": [None, against_reference(talks, ted)],
    }
    return {
        "seconds": time.perf_counter() - began,
        "learnt": [len(learnt), len(votes)],
        "test": [len(test), len(talks)],
        "wmt": {name: measured(scores, test) for name, (scores, _) in by.items()},
        "ted": {name: measured(scores, talks) for name, (_, scores) in by.items()},
        "people": one_rater(test),
        "within": within_segments(items),
        "systems": systems_of(learnt, test),
    }


def systems_of(learnt: Sequence[Translation], test: Sequence[Translation]) -> dict[str, float]:
    """Mean costs on the test: of all, of the system that is best in training, of each segment's best."""
    costs = costs_by_system(learnt)
    best = min(costs, key=lambda system: mean(costs[system]))
    return {
        "any": mean(item.cost for item in test),
        "best": mean(item.cost for item in test if item.system == best),
        "oracle": mean(min(test[i].cost for i in group) for group in groups_of(test)),
    }


def made_up(home: Path) -> list[Path]:
    """Two files of their form, for the smoke run: five systems, of which the last leaves words out."""
    home.mkdir(parents=True, exist_ok=True)
    files = [home / "wmt.tsv", home / "ted.tsv"]
    for file, people, raters, segment in zip(files, ([], [REFERENCE]), (3, 1), SEGMENTS, strict=True):
        lines = ["\t".join((*NEEDED, segment))]
        for place in range(40):
            words = [f"w{(place * 7 + word * 3) % 50}" for word in range(8)]
            for system in ["1", "2", "3", "4", "5", *people]:
                target = " ".join([*words[: 5 if system == "5" else 8], "by", system])
                for rater in range(raters):
                    severity = (
                        "Major" if system == "5" else ("no-error", "Minor", "Major")[(place + rater) % 3]
                    )
                    cells = (
                        system,
                        f"doc{place // 5}",
                        f"r{rater}",
                        f"源{place}",
                        target,
                        "Accuracy",
                        severity,
                    )
                    lines.append("\t".join((*cells, str(place))))
        file.write_text("\n".join(lines) + "\n")
    return files


def tables(results: dict) -> list[str]:
    first = next(iter(results["seeds"].values()))
    columns = {"pairs": (1, 100), "r": (2, 1), "chosen": (2, 1)}  # decimals, scale

    def row(label: str, part: str, scorer: str | None, measures: Sequence[str] = tuple(columns)) -> list[str]:
        of = lambda found: found[part] if scorer is None else found[part][scorer]
        return [label, *(over_seeds(results, lambda f, m=m: of(f)[m], *columns[m]) for m in measures)]

    def scorers(part: str, *measures: str) -> list[list[str]]:
        rows = []
        for name in (name for name, found in first[part].items() if found):
            label = f"**{name}**" if name.startswith("reward model") else name
            rows.append(row(label, part, name, measures))
            if name.startswith(BESIDE):
                rows[-1][2] = ""  # r: these scores have a mean of 0 in each segment
        return rows

    wmt = scorers("wmt", *columns)
    wmt.append(row("one rater, against the other two", "people", None))
    for name, label in (("any", "any system"), ("oracle", "the best of the ten")):
        wmt.append([label, "", "", over_seeds(results, lambda f, n=name: f["systems"][n], 2, 1)])
    ted = scorers("ted", "pairs", "r")
    return [
        table(["WMT 2023", "pairs right, %", "r", "MQM of the choice"], wmt),
        table(["TED talks", "pairs right, %", "r"], ted),
    ]
