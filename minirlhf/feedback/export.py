"""Judgements as JSONL, for train_rm.py and other trainers.

    preferences.jsonl  {prompt, response_a, response_b, votes: {rater: a|b|tie}, strengths: {rater: -2..2}}
    ratings.jsonl      {prompt, response, ratings: {rater: 1..5}, scale}
    pairs.jsonl        {prompt, chosen, rejected} by majority, without ties: for other trainers
    events.jsonl       everything that was done, with its item: skips, undone votes, notes, gold, repeats

A prompt that a checkpoint laid out by its chat template comes as {role, content} messages, and so do the
responses to it.  The first three hold each rater's current vote on each item, without gold items and repeats,
which measure raters.  "Both bad" prefers neither text: there it is a tie.
"""

import json
from pathlib import Path

from minirlhf import UserError
from minirlhf.feedback.store import SCALE, Store
from minirlhf.support.conversation import BESIDE
from minirlhf.support.files import write_atomically

STRENGTH = {"a": 1, "tie": 0, "b": -1}


def tables(store: Store) -> dict[str, list[dict]]:
    """{file name without .jsonl: rows}"""
    items: dict[str, list[dict]] = {}
    for vote in store.judgements():
        if vote["gold"] is None and not vote["repeat"]:
            items.setdefault(vote["item"], []).append(vote)
    found = {"preferences": [], "ratings": [], "pairs": [], "events": store.events()}
    for votes in items.values():
        prompt, a, b = (votes[0][key] for key in ("prompt", "a", "b"))
        beside = {name: votes[0]["source"][name] for name in BESIDE if name in votes[0]["source"]}
        if messages := votes[0]["source"].get("messages"):  # a conversation goes back to where it came from
            prompt = messages
            a, b = (text and [{"role": "assistant", "content": text.removeprefix(" ")}] for text in (a, b))
        if b is None:
            ratings = {v["rater"]: v["rating"] for v in votes}
            row = {"prompt": prompt, "response": a, "ratings": ratings, "scale": SCALE}
            found["ratings"].append(row | beside)
            continue
        choices = {v["rater"]: "tie" if v["choice"] == "bad" else v["choice"] for v in votes}
        strengths = {v["rater"]: STRENGTH[choices[v["rater"]]] * v.get("strength", 1) for v in votes}
        row = {"prompt": prompt, "response_a": a, "response_b": b, "votes": choices, "strengths": strengths}
        found["preferences"].append(row | beside)
        lead = sum(STRENGTH[choice] for choice in choices.values())
        if lead:
            chosen, rejected = (a, b) if lead > 0 else (b, a)
            found["pairs"].append({"prompt": prompt, "chosen": chosen, "rejected": rejected} | beside)
    return found


def export(store: Store, out: Path) -> None:
    """Write each table that has rows, its file whole or not at all; remove the file of one that has none."""
    found = tables(store)
    if not found["events"]:
        raise UserError(
            f"{store.path}: no judgements yet: collect some with python -m minirlhf.feedback serve"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, rows in found.items():
            file = out / f"{name}.jsonl"
            if rows:
                write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                print(f"{file}: {len(rows)} rows")
            else:
                file.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror}") from None
