"""A store with a few items, and a rater who answers without looking."""

import pytest

from minirlhf.feedback.store import Policy, Store


def make_items(pairs: int = 0, ratings: int = 0, **common) -> list[dict]:
    found = [
        {"mode": "pair", "prompt": f"Prompt {i}:", "a": f" first {i}", "b": f" second {i}"}
        for i in range(pairs)
    ]
    found += [{"mode": "rating", "prompt": f"Prompt {i}:", "a": f" text {i}"} for i in range(ratings)]
    return [item | common for item in found]


@pytest.fixture
def make_store(tmp_path):
    """make_store(pairs, ratings, **policy) -> a new Store; without gold items and repeats unless they are asked for."""

    def make(pairs: int = 0, ratings: int = 0, name: str = "store.db", **policy) -> Store:
        store = Store(
            tmp_path / name, Policy(**({"repeat_every": 0, "gold_every": 0} | policy)), create=True, seed=1
        )
        store.add(make_items(pairs, ratings))
        return store

    return make


@pytest.fixture
def judge():
    """judge(store, rater, n, answer) -> the item after n votes; `answer` is an answer or a function of the item."""

    def work(store: Store, rater: str, n: int = 10**6, answer=None) -> dict | None:
        item = store.next(rater)
        while item and n:
            plain = {"choice": "left"} if item["mode"] == "pair" else {"rating": 4}
            said = answer(item) if callable(answer) else answer or plain
            item, n = store.vote(rater, item["item"], item["lease"], said), n - 1
        return item

    return work
