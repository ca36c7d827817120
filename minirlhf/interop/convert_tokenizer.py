"""Byte-level BPE tokenizers of Hugging Face folders and GGUF files as tiktoken encodings, and back.

Both write a token's bytes as printable characters (GPT-2's table) and list the merges; a tiktoken encoding has neither, only
ranks. The two agree where ids follow the order of the merges; whether they do is tried out on every token and on hard texts.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import regex

from minirlhf import UserError
from minirlhf.interop.wordpiece import WordPiece
from minirlhf.support.bpe import BYTES
from minirlhf.tokenizer import GPT2_PATTERN, Tokenizer

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# Bytes that print stand for themselves, the others, in order, for the characters from 256 on (GPT-2, encoder.py).
CHARACTERS = [chr(b if b in PRINTABLE else 256 + b - sum(p < b for p in PRINTABLE)) for b in range(256)]
BYTE_OF = {character: BYTES[b] for b, character in enumerate(CHARACTERS)}

DIGIT = r"\p{N}"
# Digits first, each alone, then GPT-2's words between them: so white space before a digit is at an end of its piece.
SMOLLM_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s+(?![^\s\p{N}])|\s"
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
# A pre-tokenizer is the regexes that cut a text, one after the other; tiktoken takes one regex.
COMBINED = {(DIGIT, GPT2_PATTERN): SMOLLM_PATTERN}
GGUF_STAGES = {
    "gpt-2": (GPT2_PATTERN,),
    "smollm": (DIGIT, GPT2_PATTERN),
    "llama-bpe": (LLAMA3_PATTERN,),
    "qwen2": (QWEN2_PATTERN,),
}
HARD_TEXTS = [
    "", " ", "  ", "\n", "\n\n \n", "\t\tx", " x", "x ", "   x   y  ", "a\r\nb\r\rc", "tail \n", "tail\n  ",
    "\u00a0x\u2003y\u3000z",
    "Hello, world!", "It's I'm you'll we've they'd he's SHE'S DON'T o'clock 'tis ''''s 'sss", "naïve café", "e\u0301 vs \u00e9",
    "1", "12", "123", "1234", "12345678901", " 1 22  333   4444", "3.14159e-10", "$1,000.00", "1st 2nd x1y2z3", "a1 b22  c333",
    "½ ² Ⅷ ٣٤ १२३ 〇", "  1", "x  1", "\n1", "1\n2", "9's 9 's",
    "def f(x):\n    return x  # 4 spaces\n\n\n\tif a!=b: print('{}'.format(x))\n",
    "<html>&amp;</html> {\"k\": [1, 2]} //--==>> ___",
    "你好，世界。你好你好", "こんにちは 世界", "Привет, мир! Как дела?", "مرحبا بالعالم", "שלום", "ภาษาไทย", "हिन्दी", "한국어",
    "🙂🙂 👩‍👩‍👧 🏳️‍🌈 a🙂b", "\ufeffbom \u200bzero\u200d", 
    "\x00\x01\x04!\x06!", "\U000f0000\U0010ffff", "ab\x7f\x80\x85c", "ﬁ ŉ ǆ ſ K",
    "<|endoftext|><|im_start|>user\n<s></s>[CLS]", "http://example.org/a?b=c&d=%20", "aaaaaaaaaaaaaaaaaaaa", "!!!!!!???...",
    "ALL CAPS camelCase snake_case kebab-case", "the quick brown fox jumps over the lazy dog " * 3, " \u0301x", "'\u017f 'S",
]  # fmt: skip


def build(source: Path, vocab: dict[str, int], merges: list[tuple[str, str]], specials: dict[str, int], stages: tuple[str, ...],
          named: dict[str, str | None], vocab_size: int, normalize: str | None = None, hf: dict | None = None,
          ignore_merges: bool = False, reference: Callable[[str], list[int]] | None = None) -> Tokenizer:  # fmt: skip
    """A tiktoken encoding with the ids of `vocab`; `named` says which tokens are bos, eos and pad (None: there is none).
    UserError if any of its ids differs from those of `reference`, or, without one, of the merges applied as listed
    (`ignore_merges`: to words that are no token whole)."""
    products = [left + right for left, right in merges]
    try:
        words = dict.fromkeys([*(token for token in vocab if token in BYTE_OF), *products])
        ranks = {b"".join(BYTE_OF[c] for c in token): vocab[token] for token in words}
        order = [vocab[token] for token in products]
    except KeyError as error:
        raise UserError(
            f"{source}: {error} in the merges is no token of byte-level BPE: this tokenizer is not read"
        ) from None
    # What no merge makes never comes from a text: it is kept as the specials are, so that it can be shown.
    made = {*order}
    specials = {t: i for t, i in vocab.items() if t not in BYTE_OF and i not in made} | specials
    tokens = {*ranks.values(), *specials.values()}
    for name in "bos_token", "eos_token", "pad_token":
        if named.get(name) is not None and named[name] not in specials:
            raise UserError(
                f"{source}: {name} {named[name]!r} is no special token here: correct tokenizer_config.json"
            )
    if named.get("eos_token") is None:
        raise UserError(f"{source}: no eos_token: name the token that ends a text in tokenizer_config.json")
    if max(tokens) >= vocab_size:
        raise UserError(
            f"{source}: id {max(tokens)}, but the model has {vocab_size} rows: take both from one model"
        )
    specials = dict(sorted(specials.items(), key=lambda item: item[1]))
    bos, eot, pad = (specials.get(named.get(name)) for name in ("bos_token", "eos_token", "pad_token"))
    pad = None if pad == eot else pad
    pattern = stages[0] if len(stages) == 1 else COMBINED[stages]
    hf = {"bos_token": named.get("bos_token"), "pad_token": named.get("pad_token"), **(hf or {})}
    try:
        tokenizer = Tokenizer(ranks, pattern, specials, eot, bos, pad, vocab_size, normalize, hf)
    except ValueError as error:
        raise UserError(
            f"{source}: its split {pattern!r} is not read ({error}): this tokenizer is not supported"
        ) from None
    reference = reference or replayer(vocab, merges, stages, normalize, ignore_merges)
    if any(a > b for a, b in pairwise(order)):
        at = next(i for i, (a, b) in enumerate(pairwise(order)) if a > b)
        raise UserError(
            f"{source}: ids do not follow the merges ({products[at + 1]!r}): ids would differ; not supported"
        )
    whole = [text for token in ranks if "\ufffd" not in (text := token.decode("utf-8", "replace"))]
    for text in HARD_TEXTS + whole + ["".join(whole[i : i + 20]) for i in range(0, len(whole), 400)]:
        if (ours := tokenizer.encode(text)) != (theirs := reference(text)):
            raise UserError(
                f"{source}: the ids of {text!r} are {theirs[:20]}, here {ours[:20]}: not supported"
            )
    return tokenizer


def replayer(vocab: dict[str, int], merges: list, stages: tuple[str, ...], normalize: str | None = None,
             ignore_merges: bool = False) -> Callable[[str], list[int]]:  # fmt: skip
    """text -> ids by the merges as listed, lowest first: the definition, slow."""
    order = {tuple(pair): i for i, pair in reversed([*enumerate(merges)])}

    def ids(word: str) -> Iterator[int]:
        parts = [c for c in (CHARACTERS[b] for b in word.encode()) if c in vocab]
        if ignore_merges and "".join(parts) in vocab:
            parts = ["".join(parts)]
        while found := [(order[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in order]:
            i = min(found)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return (vocab[part] for part in parts)

    def cut(pieces: list[str], pattern: str) -> list[str]:  # the matches, and what lies between them
        return [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]

    def replay(text: str) -> list[int]:
        pieces = [unicodedata.normalize(normalize, text) if normalize else text]
        for pattern in stages:
            pieces = cut(pieces, pattern)
        return [i for word in pieces for i in ids(word)]

    return replay


# ----------------------------------------------------------------------------- Hugging Face


def read_json(file: Path) -> dict:
    """A JSON object; {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: {error}: restore the file") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object: restore the file")
    return found


def from_folder(folder: Path, model: dict) -> Tokenizer | WordPiece:
    """The tokenizer of a Hugging Face folder whose config.json is `model`: tokenizer.json, or vocab.json and merges.txt."""
    file, about = folder / "tokenizer.json", read_json(folder / "tokenizer_config.json")
    document, reference = read_json(file), None
    if document.get("model", {}).get("type") == "WordPiece":
        return WordPiece(file)
    if document:
        bpe, stages, normalize = (
            document["model"],
            _stages(document.get("pre_tokenizer"), file),
            _normalizer(document, file),
        )
        odd = [
            key
            for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
            if bpe.get(key)
        ]
        if bpe.get("unk_token") and not bpe["vocab"].keys() >= BYTE_OF.keys():
            odd.append("unk_token")
        if bpe.get("type") != "BPE" or odd:
            raise UserError(
                f"{file}: model {bpe.get('type')} {' '.join(odd)}: only plain byte-level BPE is read"
            )
        vocab, merges = (
            bpe["vocab"],
            [tuple(m.split(" ") if isinstance(m, str) else m) for m in bpe["merges"]],
        )
        specials = {token["content"]: token["id"] for token in document.get("added_tokens", [])}
        reference = _package(file)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        file, vocab = folder / "vocab.json", read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        family = {"gpt2": (GPT2_PATTERN, None), "qwen2": (QWEN2_PATTERN, "NFC")}.get(model.get("model_type"))
        if family is None:
            raise UserError(
                f"{file}: how {model.get('model_type')} splits text is not known: give its tokenizer.json"
            )
        stages, normalize = family[:1], family[1]
        specials = read_json(folder / "added_tokens.json")
        specials |= {token["content"]: int(i) for i, token in about.get("added_tokens_decoder", {}).items()}
    else:
        raise UserError(
            f"{folder}: no tokenizer.json, and no vocab.json with merges.txt: copy the model's tokenizer there"
        )
    vocab = {token: i for token, i in vocab.items() if token not in specials}
    names = {i: token for token, i in (vocab | specials).items()}
    found = read_json(folder / "special_tokens_map.json") | about
    named = {}
    for name in "bos_token", "eos_token", "pad_token":
        value = found[name] if name in found else model.get(f"{name}_id")
        value = value[0] if isinstance(value, list) else value  # several ends: the first
        named[name] = (
            names.get(value)
            if isinstance(value, int)
            else value["content"]
            if isinstance(value, dict)
            else value
        )
        if named[name] in vocab:  # GPT-2's vocab.json lists it among the words
            specials[named[name]] = vocab.pop(named[name])
    template = about.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    hf = {"chat_template": template} if template else {}
    if _opens(document.get("post_processor") or {}, named["bos_token"]):
        hf["add_bos_token"] = True
    ignore = document.get("model", {}).get("ignore_merges", False)
    return build(
        file, vocab, merges, specials, stages, named, model["vocab_size"], normalize, hf, ignore, reference
    )


def _stages(step: dict | None, file: Path) -> tuple[str, ...]:
    """The regexes of a pre-tokenizer in tokenizer.json."""
    found, steps = [], (step or {}).get("pretokenizers", [step or {}])
    for step in steps:
        kind = step.get("type")
        if kind == "Digits" and step.get("individual_digits"):
            found.append(DIGIT)
        elif (
            kind == "Split"
            and step["behavior"] == "Isolated"
            and not step.get("invert")
            and "Regex" in step["pattern"]
        ):
            found.append(step["pattern"]["Regex"])
        elif kind == "ByteLevel" and not step.get("add_prefix_space") and step is steps[-1]:
            found += [GPT2_PATTERN] * step.get("use_regex", True)
        else:
            raise UserError(
                f"{file}: pre_tokenizer {json.dumps(step)[:120]} is not read: byte-level splits by regex only"
            )
    if not found or len(found) > 1 and tuple(found) not in COMBINED or steps[-1].get("type") != "ByteLevel":
        raise UserError(
            f"{file}: pre_tokenizer {[s.get('type') for s in steps]}: this combination is not read"
        )
    return tuple(found)


def _normalizer(document: dict, file: Path) -> str | None:
    step = document.get("normalizer") or {}
    kinds = [part["type"] for part in step.get("normalizers", [step] if step else [])]
    if kinds not in ([], ["NFC"]):
        raise UserError(f"{file}: normalizer {kinds} is not read: only NFC is")
    return kinds[0] if kinds else None


def _opens(step: dict, bos: str | None) -> bool:
    """Does this post-processor put `bos` before a text?"""
    if "processors" in step:
        return any(_opens(part, bos) for part in step["processors"])
    first = (step.get("single") or [{}])[0]
    return bos is not None and first.get("SpecialToken", {}).get("id") == bos


def _package(file: Path) -> Callable[[str], list[int]] | None:
    """The `tokenizers` package's own ids, where it is installed."""
    try:
        from tokenizers import Tokenizer as Reader
    except ImportError:
        return None
    try:
        reader = Reader.from_file(str(file))
    except Exception:  # the package raises bare ones for what it cannot read: then the merges decide
        return None
    reader.no_truncation()
    reader.no_padding()
    reader.encode_special_tokens = True
    return lambda text: reader.encode(text, add_special_tokens=False).ids


# ----------------------------------------------------------------------------- GGUF


def from_gguf(file: Path, fields: dict, vocab_size: int) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata, `fields` (name -> value)."""
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    stages = GGUF_STAGES.get(fields.get("pre"))
    if fields.get("model") != "gpt2" or stages is None:
        kind = f"{fields.get('model')} / {fields.get('pre')}"
        raise UserError(
            f"{file}: tokenizer {kind}: only byte-level BPE, split as {', '.join(GGUF_STAGES)}, is read"
        )
    tokens = fields["tokens"]
    kinds = fields.get("token_type", [1] * len(tokens))  # 1 a word, 2 to 4 special, 5 unused
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == 1}
    specials = {
        token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (2, 3, 4)
    }
    named = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    named = {name: tokens[fields[key]] for name, key in named.items() if key in fields}
    specials |= {token: vocab.pop(token) for token in named.values() if token in vocab}
    hf = {"chat_template": fields["tokenizer.chat_template"]} if "tokenizer.chat_template" in fields else {}
    if fields.get("add_bos_token"):
        hf["add_bos_token"] = True
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    normalize = "NFC" if fields["pre"] == "qwen2" else None
    ignore = fields["pre"] == "llama-bpe"  # llama.cpp reads Llama 3's so, as its own library does
    return build(file, vocab, merges, specials, stages, named, vocab_size, normalize, hf, ignore)


# ----------------------------------------------------------------------------- out


def write(tokenizer: Tokenizer | WordPiece, folder: Path, context: int) -> dict[str, int]:
    """tokenizer.json and tokenizer_config.json for AutoTokenizer; returns the ids that the model's config.json names."""
    if isinstance(tokenizer, WordPiece):
        tokenizer.save(folder)
        about = {"tokenizer_class": "BertTokenizer", "model_max_length": context}
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
        return {"pad_token_id": tokenizer.pad}
    name = {i: token for token, i in tokenizer.specials.items()}
    hf = {"bos_token": name[tokenizer.bos], "pad_token": name[tokenizer.pad], **tokenizer.hf}
    add_bos = hf.pop("add_bos_token", False)
    word = lambda token: "".join(CHARACTERS[b] for b in token)
    ranks = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    # Every pair that makes a token, where a list of merges would have the one met in training: tiktoken joins any of them.
    pairs = ((t[:i], t[i:]) for t in ranks for i in range(1, len(t)))
    merges = [
        [word(left), word(right)]
        for left, right in pairs
        if left in tokenizer.ranks and right in tokenizer.ranks
    ]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    known = {GPT2_PATTERN: [], SMOLLM_PATTERN: [{"type": "Digits", "individual_digits": True}]}
    steps = [*known.get(tokenizer.pattern, [split]), plain | {"use_regex": tokenizer.pattern in known}]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    bos = name[tokenizer.bos]
    opening = [{"SpecialToken": {"id": bos, "type_id": 0}}] if add_bos else []
    sequence = lambda which, kind: [{"Sequence": {"id": which, "type_id": kind}}]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token} | flags for token, i in tokenizer.specials.items()],
        "normalizer": {"type": tokenizer.normalize} if tokenizer.normalize else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": opening + sequence("A", 0),
            "pair": opening + sequence("A", 0) + sequence("B", 1),
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        } if add_bos else None,
        "decoder": plain | {"use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,  # a word that is a token: as tiktoken does
            "vocab": {word(t): tokenizer.ranks[t] for t in ranks} | tokenizer.specials, "merges": merges,
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(
        json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name[tokenizer.eot], "model_max_length": context,
             "clean_up_tokenization_spaces": False}  # fmt: skip
    about |= {key: value for key, value in hf.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    ids = {
        "bos_token_id": hf["bos_token"],
        "eos_token_id": name[tokenizer.eot],
        "pad_token_id": hf["pad_token"],
    }
    return {key: tokenizer.specials[token] for key, token in ids.items() if token is not None}
