"""The page's work in a terminal."""

import time

from minirlhf import UserError
from minirlhf.feedback.store import Store, rater_name
from minirlhf.support.text import visible

PAIR = {  # key: (label, answer)
    "1": ("first, much better", {"choice": "left", "strength": 2}),
    "2": ("first", {"choice": "left", "strength": 1}),
    "3": ("tie", {"choice": "tie"}),
    "4": ("second", {"choice": "right", "strength": 1}),
    "5": ("second, much better", {"choice": "right", "strength": 2}),
    "0": ("both bad", {"choice": "bad"}),
}
RATING = {
    str(n): (word, {"rating": n})
    for n, word in enumerate(("very bad", "bad", "middling", "good", "very good"), 1)
}
SKIP, UNDO, QUIT = "s", "u", "q"


def rate(store: Store, name: str) -> None:
    """Judge items until there are none, or until q.  A line is a key, then a note: '2 shorter'."""
    rater = rater_name(name)
    if store.meta["guidelines"]:
        print(visible(store.meta["guidelines"]))
    item, refusal = store.next(rater), ""
    while item is not None:
        show(item, store.progress(rater))
        answers = PAIR if item["mode"] == "pair" else RATING
        start = time.monotonic()
        key, note = ask(answers, refusal)
        seconds, refusal = time.monotonic() - start, ""
        if key == QUIT:
            break
        try:
            if key == UNDO:
                item = store.undo(rater)
            elif key in answers or key == SKIP:
                answer = {"skip": True} if key == SKIP else answers[key][1]
                answer = answer | {"note": note, "seconds": seconds}
                item = store.vote(rater, item["item"], item["lease"], answer)
            else:
                refusal = f"{visible(key)!r} is no key. "
        except UserError as error:
            refusal = f"{error}. "
            item = store.next(rater)
    print(f"\n{store.progress(rater)['done']} judged; the same command goes on")


def show(item: dict, progress: dict[str, int]) -> None:
    print(f"\n[{progress['done']} done, {progress['left']} left]  {visible(item['prompt'])}")
    labels = ("first", "second") if item["mode"] == "pair" else ("text",)
    for label, text in zip(labels, item["texts"], strict=True):
        print(f"  {label + ':':8s}{visible(text)}")


def ask(answers: dict, refusal: str) -> tuple[str, str]:
    """(key, note) from the terminal; the key is QUIT at the end of the input and after Ctrl-C."""
    labels = {key: label for key, (label, _) in answers.items()} | {SKIP: "skip", UNDO: "undo", QUIT: "quit"}
    keys = ", ".join(f"{key} {label}" for key, label in labels.items())
    try:
        key, _, note = input(f"{refusal}{keys}, then a note if you like: ").strip().partition(" ")
    except (EOFError, KeyboardInterrupt):
        return QUIT, ""
    except UnicodeDecodeError:  # not in the terminal's encoding
        return "?", ""
    return key, note
