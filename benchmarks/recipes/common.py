"""What recipes share: stages as commands, policies asked several times, and means with their errors."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.demo import command  # noqa: E402
from minirlhf import UserError, checkpoint, data  # noqa: E402
from minirlhf.interop.fetch import download  # noqa: E402
from minirlhf.rewards import fields_read, load_rewards  # noqa: E402
from minirlhf.support import functions  # noqa: E402
from minirlhf.support.rows import Reads  # noqa: E402
from minirlhf.support.text import escaped  # noqa: E402
from minirlhf.tools import evaluate  # noqa: E402

Row = dict[str, object]


def write_rows(file: Path, rows: Iterable[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def wheels(folder: Path, pins: Mapping[str, str]) -> list[Path]:
    """Packages' wheels, from a folder or fetched into it; each hash is verified.  Raises UserError.

    pins: {"name-version-python": sha256}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{name}-none-any.whl": name for name in pins}
    absent = [name for file, name in files.items() if not file.exists()]
    missing = {"==".join(name.split("-")[:2]): pins[name] for name in absent}
    options = "--only-binary", ":all:", "--ignore-requires-python"  # nothing of them will run
    reason = download(folder, missing, *options) if missing else ""
    for file, name in files.items():
        if not file.exists():
            raise UserError(f"{file}: cannot be fetched ({reason}): put it there")
        if hashlib.sha256(file.read_bytes()).hexdigest() != pins[name]:
            raise UserError(f"{file}: sha256 is not {pins[name]}: delete it")
    return [*files]


def stage(script: str, out: Path, seed: int, *options: object) -> float:
    """Train a stage, or go on with it; the seconds that it took, those of an earlier call included."""
    command(script, "--out", out, "--seed", seed, "--resume", *options)
    return json.loads((out / "config.json").read_text())["results"]["seconds"]


@dataclass
class Asked:
    """What a policy wrote on the prompts of a file, and the reward of each response."""

    prompts: list[str]
    rows: list[Row]
    responses: list[list[str]]  # [samples][prompts]
    scores: list[list[float]]  # the same
    seconds: float

    def pass_at(self, k: int) -> dict[str, float]:
        """The chance that one of k samples is right, {mean, se} over prompts (Chen et al. 2021, unbiased)."""
        n, chances = len(self.scores), []
        for right in zip(*self.scores, strict=True):
            wrong = sum(score < 1 for score in right)
            chances.append(1 - math.comb(wrong, k) / math.comb(n, k))
        return {"mean": mean(chances), "se": stdev(chances) / math.sqrt(len(chances))}

    def examples(self, count: int) -> list[Row]:
        """The first prompts, each with its first response."""
        rows = zip(self.prompts, self.responses[0], self.scores[0], strict=True)
        return [{"prompt": p, "response": r, "score": s} for p, r, s in list(rows)[:count]]


def opened(policy: Path, file: Path, tokens: int, temperature: float, reads: Reads = ()) -> tuple:
    """(model, tokenizer, prompts in ids, their records, sampling): what it takes to let a checkpoint answer."""
    tokenizer, model = checkpoint.tokenizer_of(policy), checkpoint.load_gpt(policy).eval()
    room = model.config.context - tokens
    source = data.load(file, reads=reads)
    prompts, records = data.prompts_and_records(tokenizer, source.records, 1, room, "error")
    settings = {"response_tokens": tokens, "temperature": temperature, "stop": True}
    return model, tokenizer, prompts, records, evaluate.sampling_of(settings, tokenizer)


def ask(policy: Path, file: Path, reward: str, samples: int, tokens: int, temperature: float = 1.0) -> Asked:
    """Let a checkpoint answer each prompt of a file `samples` times."""
    began = time.perf_counter()
    rewards = load_rewards([reward])
    model, tokenizer, prompts, records, sampling = opened(
        policy, file, tokens, temperature, fields_read(rewards)
    )
    responses, scores = [], []
    for k in range(samples):
        shown, written = evaluate.write(model, prompts, sampling, 1000 + k).decode(tokenizer)
        responses.append(written)
        scores.append(functions.call(rewards[0][1], shown, written, reward, records))
    rows = [record.row for record in records]
    return Asked(shown, rows, responses, scores, time.perf_counter() - began)


def measured(results: dict, read: Callable[[dict], float | None]) -> bool:
    """Whether every seed has this number."""
    return None not in map(read, results["seeds"].values())


def over_seeds(results: dict, read: Callable[[dict], float], digits: int = 1, scale: float = 100) -> str:
    """ "96.2 ± 0.4": the mean of a number over seeds, and its standard error, which one seed does not have."""
    values = [scale * read(found) for found in results["seeds"].values()]
    error = f" ± {stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def before_and_after(
    results: dict,
    reads: Sequence[Callable[[dict], float]],
    names: Sequence[str] = ("before", "after"),
    controls: Sequence[tuple[str, str]] = (),
) -> list[list[str]]:
    """Rows of a table: the SFT model's numbers over seeds, GRPO's, the difference of the two, and controls.

    reads: one per column; each gets what a seed's results have under the first or the second of `names`, or
    under the name of a control, (label, name)."""
    sft, grpo = names
    of = lambda name: lambda read: lambda found: read(found[name])
    lines = {
        "SFT": of(sft),
        "GRPO": of(grpo),
        "the difference": lambda read: lambda found: read(found[grpo]) - read(found[sft]),
    }
    lines |= {label: of(name) for label, name in controls}
    return [[label, *(over_seeds(results, of(read)) for read in reads)] for label, of in lines.items()]


def means_of(*measures: str) -> list[Callable[[dict], float]]:
    """For before_and_after: the means of {measure: {mean, se}}."""
    return [lambda found, m=measure: found[m]["mean"] for measure in measures]


def side_by_side(
    results: dict, asked: Callable[[str], str], names: Sequence[str] = ("before", "after")
) -> list[list[str]]:
    """Rows of a table: the first seed's sample prompts, as `asked` shortens them, and both responses."""
    first = next(iter(results["seeds"].values()))
    pairs = zip(*(first[name]["examples"] for name in names), strict=True)
    return [[shown(asked(x["prompt"])), *(shown(y["response"].strip()) for y in (x, z))] for x, z in pairs]


def shown(text: str) -> str:
    """A text in a cell of a table, as code, whatever a model wrote."""
    plain = escaped(text.strip("\n").replace("\n", " ⏎ ")).replace("|", "\\|").replace("`", "'")
    return f"`{plain}`" if plain else "(nothing)"
