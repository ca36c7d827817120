"""A run's logs: metrics and samples as lines of JSON, and in a tracker if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from minirlhf.support import sums
from minirlhf.support.files import write_atomically
from minirlhf.support.track import Tracker

TRACKED_ROWS = 20  # of a rollout's texts: a tracker's page is for looking, and OUT/samples.jsonl has them all


NONE_ENDED = (
    "warning: no response of the first rollout ended by itself: is the prompt laid out as the model was "
    "trained, and is --response-tokens long enough? (docs/troubleshooting.md, never stops)"
)


class MetricLogger:
    """OUT/metrics.jsonl, one JSON object per step, and OUT/samples.jsonl; what is tracked goes there as well.
    Rank 0 alone writes."""

    def __init__(self, out: Path, rank: int, keep_until: int, tracker: Tracker | None = None):
        """keep_until: lines of later steps belong to work that a resumed run does again, and are dropped
        [D21].

        The files are replaced, never cut in place: killed at any moment, a run keeps its history.
        """
        self.out, self.tracker = None if rank else out, tracker
        if rank:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = lines_until(out / name, keep_until)
            copy = out / "latest" / name
            if keep_until and copy.is_file() and sums.agrees(copy):  # whatever became of the other
                kept = lines_until(copy, keep_until)
            if kept:
                write_atomically(out / name, "".join(line + "\n" for line in kept))
            else:
                (out / name).unlink(missing_ok=True)

    def write(self, name: str, step: int, rows: list[dict]) -> None:
        """Append rows to OUT/NAME.jsonl, all with this step."""
        if self.out is not None:
            with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.write(
                    "".join(json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in rows)
                )

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        self.write("metrics", step, [plain])
        if self.tracker:
            self.tracker.scalars(step, {k: v for k, v in plain.items() if isinstance(v, int | float)})

    def samples(self, step: int, rows: list[dict]) -> None:
        self.write("samples", step, rows)
        if self.tracker:
            self.tracker.table(step, "samples", rows[:TRACKED_ROWS])

    def finish(self, results: dict[str, Any]) -> None:
        if self.tracker:
            self.tracker.finish(results)


def lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of a .jsonl file whose step is not larger; a line that a crash tore, or damage, is left
    out."""
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.split("\n")[
        :-1
    ]:  # a line is whole once its newline is written (splitlines also splits inside texts)
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    return kept


SAMPLE_COLUMNS = {
    "objective/scores": "score",
    "objective/rm_scores": "rm",
    "objective/rm_disagreement": "disagreement",
    "objective/judge": "judge",
    "objective/kl": "kl",
    "val/response_length": "length",
}


def sample_rows(prompts: list[str], responses: list[str], per_text: dict[str, Tensor]) -> list[dict]:
    """A rollout's texts and what each model said of them, one row per text."""
    columns = {name: per_text[key].tolist() for key, name in SAMPLE_COLUMNS.items() if key in per_text}
    return [
        {"prompt": prompt, "response": response} | {name: values[i] for name, values in columns.items()}
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def show_rows(rows: list[dict], kl_coef: float) -> str:
    """Episodes as lm-human-preferences prints them: query, response, score, KL, and what PPO maximises."""
    lines = []
    for row in rows:
        total = row["score"] - kl_coef * row["kl"]
        lines.append(f"  {row['prompt']!r} -> {row['response']!r}")
        lines.append(f"    score {row['score']:+.2f}  kl {row['kl']:.1f}  total {total:+.2f}")
    return "\n".join(lines)
