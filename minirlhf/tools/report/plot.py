"""RUN/reward_kl.png: the scores against the distance from SFT, for README.md and its like."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from minirlhf import UserError
from minirlhf.tools.report.follow import JUDGE_METRIC, REWARD_METRICS, STRIPS
from minirlhf.tools.report.results import Row

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#707070"  # of Okabe and Ito: told apart by the colour-blind
SCORERS = {"score": ("reward model", BLUE), "judge": ("judge", ORANGE)}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The moving average of [N]; near the ends it is that of the values there are."""
    if not len(values):
        return values
    ones = np.ones(window)
    count = np.convolve(np.ones(len(values)), ones, "same")
    return np.convolve(values, ones, "same") / count


def draw(writers: dict[str, Row], history: list[Row], reward_label: str) -> bytes:
    """PNG.  Left: scores against KL, a dot per iteration; right: what becomes of the texts meanwhile."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plot needs matplotlib: pip install 'minirlhf[report]'") from None
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    axes = figure.subplot_mosaic([["left", key] for key in STRIPS], width_ratios=(1.6, 1))
    window = len(history) // 10 | 1
    _draw_scores(axes["left"], writers, history, reward_label, window)
    for key, (metric, label) in STRIPS.items():
        rows = [row for row in history if metric in row and "step" in row]
        steps, values = (np.array([row[name] for row in rows]) for name in ("step", metric))
        if writers["SFT"].get(key) is not None:
            axes[key].axhline(writers["SFT"][key], color=GREY, lw=1, ls="--")
        axes[key].plot(steps, values, color=GREY, lw=0.8, alpha=0.6)
        axes[key].plot(steps, smooth(values, window), color="black", lw=1.6)
        axes[key].set_title(label, fontsize=10, loc="left")
        axes[key].tick_params(labelbottom=key == "mean_length")
    axes["mean_length"].set_xlabel("PPO iteration (dashed: SFT)")
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(0.04, 0.12)
        panel.grid(alpha=0.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw_scores(
    left: Any, writers: dict[str, Row], history: list[Row], reward_label: str, window: int
) -> None:
    reward_metric = next((m for m in REWARD_METRICS if any(m in row for row in history)), REWARD_METRICS[0])
    metrics = {"score": reward_metric, "judge": JUDGE_METRIC}
    history = [row for row in history if "objective/kl" in row and reward_metric in row]
    for key, (label, colour) in SCORERS.items():
        rows = [row for row in history if metrics[key] in row]  # none if the judge did not watch
        kl, scores = (np.array([row[name] for row in rows]) for name in ("objective/kl", metrics[key]))
        left.scatter(kl, scores, s=12, color=colour, alpha=0.3, linewidths=0)
        shown = len(rows) or key in [*writers.values()][-1]
        left.plot(
            smooth(kl, window),
            smooth(scores, window),
            color=colour,
            lw=2.2,
            label=(reward_label if key == "score" else label) if shown else None,
        )
    for name, row in writers.items():
        scores = {key: row[key] for key in SCORERS if row.get(key) is not None}
        if row.get("kl") is None or not scores:
            continue
        marker, size = {"SFT": ("o", 46), "PPO": ("*", 190), "DPO": ("*", 190)}.get(name, ("D", 46))
        colours = [SCORERS[key][1] for key in scores]
        places = [row["kl"]] * len(scores), list(scores.values())
        left.scatter(*places, size, colours, marker=marker, edgecolors="white", zorder=3)
        above = (row["kl"], max(scores.values()))
        left.annotate(
            f"{name:.30}",
            above,
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            parse_math=False,
        )
    both = [row for row in history if metrics["judge"] in row]
    if both:
        kl, scores, judge = (
            smooth(np.array([row[name] for row in both]), window)
            for name in ("objective/kl", metrics["score"], metrics["judge"])
        )
        label = f"gap: what only the {reward_label} sees"
        left.fill_between(kl, scores, judge, where=scores > judge, color=GREY, alpha=0.18, lw=0, label=label)
    left.plot([], [], "D", color=GREY, ms=5, label="on test prompts (dots: in training)")
    left.set(
        xlabel="KL to the SFT model, nats per sequence", ylabel="mean score", title="Reward against distance"
    )
    left.legend(fontsize=8.5, frameon=False)
