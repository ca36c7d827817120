"""The page's work in a terminal."""

import time

from minirlhf import UserError
from minirlhf.feedback.store import Store, rater_name
from minirlhf.support.text import visible

PAIR = {"1": ("first, much better", {"choice": "left", "strength": 2}), "2": ("first", {"choice": "left", "strength": 1}),
        "3": ("tie", {"choice": "tie"}), "4": ("second", {"choice": "right", "strength": 1}),
        "5": ("second, much better", {"choice": "right", "strength": 2}), "0": ("both bad", {"choice": "bad"})}  # fmt: skip
RATING = {
    str(n): (word, {"rating": n})
    for n, word in enumerate(("very bad", "bad", "middling", "good", "very good"), 1)
}
MORE = {"s": "skip", "u": "undo", "q": "quit"}


def rate(store: Store, name: str) -> None:
    """Judge items until there are none or `q`. A line is a key, and after a space a note: '2 shorter, but true'."""
    rater, refusal = rater_name(name), ""
    if store.meta["guidelines"]:
        print(visible(store.meta["guidelines"]))
    item = store.next(rater)
    while item is not None:
        answers = PAIR if item["mode"] == "pair" else RATING
        done = store.progress(rater)
        print(f"\n[{done['done']} done, {done['left']} left]  {visible(item['prompt'])}")
        for label, text in zip(
            ("first", "second") if item["mode"] == "pair" else ("text",), item["texts"], strict=True
        ):
            print(f"  {label + ':':8s}{visible(text)}")
        keys = ", ".join(
            f"{key} {label}" for key, label in {**{k: v[0] for k, v in answers.items()}, **MORE}.items()
        )
        start = time.monotonic()
        try:
            key, _, note = input(f"{refusal}{keys}, then a note if you like: ").strip().partition(" ")
        except (EOFError, KeyboardInterrupt):
            key, note = "q", ""
        refusal = ""
        if key == "q":
            break
        try:
            if key == "u":
                item = store.undo(rater)
            elif key in answers or key == "s":
                sent = {"skip": True} if key == "s" else answers[key][1]
                seconds = time.monotonic() - start
                item = store.vote(
                    rater, item["item"], item["lease"], sent | {"note": note, "seconds": seconds}
                )
            else:
                refusal = f"{visible(key)!r} is no key. "
        except UserError as e:
            refusal = f"{e}. "
            item = store.next(rater)
    print(f"\n{store.progress(rater)['done']} judged; the same command goes on")
