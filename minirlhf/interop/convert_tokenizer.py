"""Byte-level BPE tokenizers of Hugging Face folders and GGUF files as our Tokenizer, and back.

Both formats write a token's bytes as printable characters (GPT-2's table) and list the merges. A tiktoken
encoding has neither, only ranks. The two agree where ids follow the order of the merges; whether they do is
tried out on every token, on hard texts and on the added tokens before anything is written.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from minirlhf import UserError
from minirlhf.interop import chat_template
from minirlhf.interop.hard_texts import HARD_TEXTS
from minirlhf.interop.wordpiece import WordPiece
from minirlhf.support.added import FLAGS
from minirlhf.support.bpe import BYTES
from minirlhf.tokenizer import GPT2_PATTERN, Tokenizer

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int], bool], str]  # ids, whether special tokens are left out

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# Bytes that print stand for themselves, the others, in order, for the characters from 256 on (GPT-2,
# encoder.py).
CHARACTERS = [chr(b if b in PRINTABLE else 256 + b - sum(p < b for p in PRINTABLE)) for b in range(256)]
BYTE_OF = {character: BYTES[b] for b, character in enumerate(CHARACTERS)}

DIGIT = r"\p{N}"
# Digits first, each alone, then GPT-2's words between them: white space before a digit ends its piece.
SMOLLM_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s+(?![^\s\p{N}])|\s"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
# A pre-tokenizer is a list of regexes that cut a text one after the other; tiktoken takes one regex.
COMBINED = {(DIGIT, GPT2_PATTERN): SMOLLM_PATTERN}
GGUF_STAGES = {
    "gpt-2": (GPT2_PATTERN,),
    "smollm": (DIGIT, GPT2_PATTERN),
    "llama-bpe": (LLAMA3_PATTERN,),
    "qwen2": (QWEN2_PATTERN,),
}
WORD, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of tokens in a GGUF file; 5 is unused


def build(
    source: Path,
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    specials: dict[str, int],
    stages: tuple[str, ...],
    named: dict[str, str | None],
    vocab_size: int,
    normalize: str | None = None,
    hf: dict | None = None,
    ignore_merges: bool = False,
    reference: tuple[Encode, Decode] | None = None,
    added: dict[str, bool] | None = None,
    flags: dict[str, list[str]] | None = None,
) -> Tokenizer:
    """The Tokenizer with the ids of `vocab` and `specials`.

    named: the tokens that are bos, eos and pad, None where there is none.  added: those of `specials` that
    texts may contain -> whether they are looked for after normalising.  flags: how, see support/added.py.
    ignore_merges: a word that is a token is not merged.  reference: the original's encode and decode; without
    it, the merges are applied as they are listed.  Raises UserError where ids or texts differ from the
    reference's, and for what makes no tokenizer.
    """
    products = [left + right for left, right in merges]
    is_word = lambda token: token in BYTE_OF or ignore_merges and all(c in BYTE_OF for c in token)
    try:
        words = dict.fromkeys([*filter(is_word, vocab), *products])
        ranks = {b"".join(BYTE_OF[c] for c in token): vocab[token] for token in words}
        order = [vocab[token] for token in products]
    except KeyError as error:
        raise UserError(
            f"{source}: {error} in the merges is no token of byte-level BPE: this tokenizer is not read"
        ) from None
    # No text gives a token that no merge makes.  It is kept beside the special tokens, so that it can be
    # shown.
    unreached = {token: i for token, i in vocab.items() if token not in words}
    specials = dict(sorted((unreached | specials).items(), key=lambda item: item[1]))
    for name in "bos_token", "eos_token", "pad_token":
        if named.get(name) is not None and named[name] not in specials:
            raise UserError(
                f"{source}: {name} {named[name]!r} is no special token here: correct tokenizer_config.json"
            )
    if named.get("eos_token") is None:
        raise UserError(f"{source}: no eos_token: name the token that ends a text in tokenizer_config.json")
    _check_rows(source, [*ranks.values(), *specials.values()], vocab_size)
    bos, eot, pad = (specials.get(named.get(name)) for name in ("bos_token", "eos_token", "pad_token"))
    hf = {"bos_token": named.get("bos_token"), "pad_token": named.get("pad_token")} | (hf or {})
    hf |= {"unreached": [*unreached]} if unreached else {}
    try:
        tokenizer = Tokenizer(
            ranks,
            stages[0] if len(stages) == 1 else COMBINED[stages],
            specials,
            eot,
            bos,
            None if pad == eot else pad,
            vocab_size,
            normalize,
            hf,
            added,
            flags,
        )
    except (ValueError, regex.error) as error:
        raise UserError(f"{source}: {error}: this tokenizer is not supported") from None
    for i, (a, b) in enumerate(pairwise(order)):
        if a > b:
            token = products[i + 1]
            raise UserError(
                f"{source}: ids do not follow the merges ({token!r}): they would differ; not supported"
            )
    encode, decode = reference or (replayer(vocab, merges, stages, normalize, ignore_merges, tokenizer), None)
    for text in trial_texts(tokenizer):
        if (ours := tokenizer.encode(text)) != (theirs := encode(text)):
            raise UserError(
                f"{source}: the ids of {text!r:.200} are {theirs[:20]}, here {ours[:20]}: not supported"
            )
    for ids, skip in trial_ids(tokenizer) if decode else ():
        if (ours := tokenizer.decode(ids, skip)) != (theirs := decode(ids, skip)):
            raise UserError(
                f"{source}: the text of ids {ids} is {theirs!r:.200}, here {ours!r:.200}: not supported"
            )
    return tokenizer


def _check_rows(source: Path, ids: list[int], rows: int) -> None:
    """UserError where an id has no row in the model's embedding; so a file cannot hold a million tokens."""
    if (highest := max(ids, default=0)) >= rows:
        raise UserError(f"{source}: id {highest}, but the model has {rows} rows: take both from one model")


def trial_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts on which an imported tokenizer is compared with its original."""
    yield from HARD_TEXTS
    whole = [text for token in tokenizer.ranks if "\ufffd" not in (text := token.decode("utf-8", "replace"))]
    yield from whole
    for i in range(0, len(whole), 400):
        yield "".join(whole[i : i + 20])
    names = [name for name in tokenizer.specials if name not in tokenizer.hf.get("unreached", ())]
    for name in tokenizer.added:
        yield from (name, f"please {name} wait", f"a{name}1", f"{name}{name}", f" {name}\n", f"{name}\u0338")
        yield from (f"{name[:-1]} {name}", f"{name[:1]}{name}", f"{name}{name[1:]}", name.swapcase())
        yield from (
            f"x \u00a0\n{name}  \t\u2003y",
            f"_{name}",
            f"{name}_",
            f"\u4f60{name}.{name}\u0301",
            f"\x1c{name}\x1c",
        )
        for other in names:  # names that overlap, or whose white space may
            if tokenizer.flags.keys() & {name, other}:
                yield f"a{other} {name}  {other} {name}"
            for a, b in (name, other), (other, name):
                yield from (a + b[k:] for k in range(1, len(b)) if a.endswith(b[:k]))
    yield from (f"a {name}b" for name in names)


def trial_ids(tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    """(ids around each name, whether special tokens are left out) whose texts are compared.

    Names that are not ASCII are left out: the package's decoder takes their letters for bytes."""
    before, after = tokenizer.encode(" a"), tokenizer.encode("b")
    for name, i in tokenizer.specials.items():
        if name.isascii() and name not in tokenizer.hf.get("unreached", ()):
            yield from (([*before, i, *after, i], skip) for skip in (True, False))


def replayer(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    stages: tuple[str, ...],
    normalize: str | None = None,
    ignore_merges: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Encode:
    """text -> ids by the merges as they are listed, lowest first: the definition, slow.

    tokenizer: whose added tokens are cut out of the text first."""
    order = {tuple(pair): i for i, pair in reversed([*enumerate(merges)])}
    normal = lambda text: unicodedata.normalize(normalize, text) if normalize else text
    cut = tokenizer.cut if tokenizer else lambda text: [normal(text)]

    def ids(word: str) -> Iterator[int]:
        parts = [c for c in (CHARACTERS[b] for b in word.encode()) if c in vocab]
        if ignore_merges and "".join(parts) in vocab:
            parts = ["".join(parts)]
        while found := [(order[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in order]:
            i = min(found)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return (vocab[part] for part in parts)

    def words(text: str) -> list[str]:
        pieces = [text]
        for pattern in stages:  # the matches, and what lies between them
            pieces = [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]
        return pieces

    def replay(text: str) -> list[int]:
        found: list[int] = []
        for piece in cut(text):
            found += [piece] if isinstance(piece, int) else [i for word in words(piece) for i in ids(word)]
        return found

    return replay


# ---------------------------------------------------------------- Hugging Face


def read_json(file: Path) -> dict:
    """A JSON object; {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file}: {error}: restore the file") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object: restore the file")
    return found


def from_folder(folder: Path, model: dict) -> Tokenizer | WordPiece:
    """The tokenizer of a Hugging Face folder whose config.json is `model`.

    It is read from tokenizer.json, or from vocab.json and merges.txt.  What is in them may have any shape:
    the caller turns a KeyError, TypeError and the like into a UserError.
    """
    file, about = folder / "tokenizer.json", read_json(folder / "tokenizer_config.json")
    document = read_json(file)
    if document.get("model", {}).get("type") == "WordPiece":
        return WordPiece(file)
    if document:
        vocab, merges = _plain_bpe(document["model"], file)
        tokens = document.get("added_tokens") or []
        stages, normalize = _stages(document.get("pre_tokenizer"), file), _normalizer(document, file)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        file, vocab = folder / "vocab.json", read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        family = {"gpt2": (GPT2_PATTERN, None), "qwen2": (QWEN2_PATTERN, "NFC")}.get(model.get("model_type"))
        if family is None:
            kind = model.get("model_type")
            raise UserError(f"{file}: how {kind} splits text is not known: give its tokenizer.json")
        stages, normalize = family[:1], family[1]
        tokens = _listed_tokens(folder, about)
    else:
        raise UserError(
            f"{folder}: no tokenizer.json, and no vocab.json with merges.txt: copy the tokenizer there"
        )
    _check_rows(file, [*vocab.values(), *(token["id"] for token in tokens)], model["vocab_size"])
    specials = {token["content"]: token["id"] for token in tokens}
    vocab = {token: i for token, i in vocab.items() if token not in specials}
    named = _named_tokens(folder, about, model, vocab | specials)
    for name in {*named.values()} & vocab.keys():  # GPT-2's vocab.json lists it among the words
        specials[name] = vocab.pop(name)
    added = {
        token["content"]: bool(token.get("normalized"))  # special whatever the file says: bos, eos and pad
        for token in tokens
        if not token.get("special", True) and token["content"] not in named.values()
    }
    flags = _flags(tokens, added)
    hf = _chat_template(folder, about)
    ends = _ids(model.get("eos_token_id"))
    ends += _ids(read_json(folder / "generation_config.json").get("eos_token_id"))
    if _opens(document.get("post_processor") or {}, named["bos_token"]):
        hf["add_bos_token"] = True
    hf |= _ends(ends, hf, vocab, specials, named)
    return build(
        file,
        vocab,
        merges,
        specials,
        stages,
        named,
        model["vocab_size"],
        normalize,
        hf,
        document.get("model", {}).get("ignore_merges", False),
        _package(file, document, named) if document else None,
        added,
        flags,
    )


def _plain_bpe(model: dict, file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of a tokenizer.json."""
    unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    odd = [key for key in unusual if model.get(key)]
    if model.get("unk_token") and not model["vocab"].keys() >= BYTE_OF.keys():
        odd.append("unk_token")
    if model.get("type") != "BPE" or odd:
        raise UserError(
            f"{file}: model {model.get('type')} {' '.join(odd)}: only plain byte-level BPE is read"
        )
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return model["vocab"], merges


def _listed_tokens(folder: Path, about: dict) -> list[dict[str, Any]]:
    """The added tokens of a folder without tokenizer.json, in tokenizer.json's form."""
    listed = [about | read_json(folder / "special_tokens_map.json")]
    special = {name for source in listed for name in _contents([*source.values()])}
    tokens = [
        {"content": name, "id": i, "special": name in special}
        for name, i in read_json(folder / "added_tokens.json").items()
    ]
    decoder = about.get("added_tokens_decoder", {})
    return tokens + [{**token, "id": int(i)} for i, token in decoder.items()]


def _contents(values: list) -> Iterator[str]:
    """The names in a special_tokens_map: texts, objects with a `content`, or lists of these."""
    for value in values:
        if isinstance(value, list):
            yield from _contents(value)
        elif isinstance(value, dict):
            yield from _contents([value.get("content")])
        elif isinstance(value, str):
            yield value


def _named_tokens(folder: Path, about: dict, model: dict, ids: dict[str, int]) -> dict[str, str | None]:
    """Which tokens are bos, eos and pad, by tokenizer_config.json or else by the ids in the model's
    config.json."""
    names = {i: token for token, i in ids.items()}
    found = read_json(folder / "special_tokens_map.json") | about
    named = {}
    for name in "bos_token", "eos_token", "pad_token":
        value = found[name] if name in found else model.get(f"{name}_id")
        value = value[0] if isinstance(value, list) else value  # several ends: the first
        if isinstance(value, int):
            value = names.get(value)
        named[name] = value["content"] if isinstance(value, dict) else value
    return named


def _flags(tokens: list[dict], added: dict[str, bool]) -> dict[str, list[str]]:
    """name -> its flags of support/added.py, for names that have some."""
    found = {}
    for token in tokens:
        name = token["content"]
        if its_flags := [
            flag for flag in FLAGS if token.get(flag) and (flag, name in added) != ("normalized", True)
        ]:
            found[name] = its_flags
    return found


def _chat_template(folder: Path, about: dict) -> dict[str, str]:
    """{"chat_template": the folder's} or {}."""
    template = about.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    file = folder / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder}: chat_template is not a string: correct tokenizer_config.json")
    return {"chat_template": template} if template else {}


def _ids(value: Any) -> list[int]:
    """The ids in a field that holds one, several or none."""
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _ends(
    ids: list[int], hf: dict, vocab: dict[str, int], specials: dict[str, int], named: dict[str, str | None]
) -> dict[str, list[int]]:
    """{"ends": ...}: the tokens that end a response beside eos, or {}.

    They are those that the model's generation stops at, as far as they are tokens, and the one with which its
    chat template ends the assistant's turn."""
    if "chat_template" in hf:
        marks = {name: i for name, i in specials.items() if name != named.get("bos_token")}
        turn = chat_template.end_of_turn(hf["chat_template"], marks, named)
        ids = [*ids, *_ids(turn)]
    known = {*vocab.values(), *specials.values()} - {specials.get(named.get("eos_token"))}
    found = [i for i in dict.fromkeys(ids) if i in known]
    return {"ends": found} if found else {}


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
    """The Unicode form that a tokenizer.json normalises to."""
    step = document.get("normalizer") or {}
    kinds = [part["type"] for part in step.get("normalizers", [step] if step else [])]
    if kinds not in ([], ["NFC"]):
        raise UserError(f"{file}: normalizer {kinds} is not read: only NFC is")
    return kinds[0] if kinds else None


def _opens(step: dict, bos: str | None) -> bool:
    """Whether this post-processor puts `bos` before a text."""
    if "processors" in step:
        return any(_opens(part, bos) for part in step["processors"])
    first = (step.get("single") or [{}])[0]
    return bos is not None and first.get("SpecialToken", {}).get("id") == bos


def _package(file: Path, document: dict, named: dict[str, str | None]) -> tuple[Encode, Decode | None] | None:
    """The `tokenizers` package's own encode and decode, where the package is installed and reads the file.

    No decode for a file whose decoder is not the byte-level one, which all files should have."""
    try:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Reader
    except ImportError:
        return None
    try:
        reader = Reader.from_file(str(file))
    except Exception:  # the package raises bare Exceptions for what it cannot read: then the merges decide
        return None
    reader.no_truncation()
    reader.no_padding()
    special = [name for name in dict.fromkeys(named.values()) if name is not None]
    reader.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    reader.encode_special_tokens = True
    encode = lambda text: reader.encode(text, add_special_tokens=False).ids
    if (document.get("decoder") or {}).get("type") != "ByteLevel":
        return encode, None
    return encode, lambda ids, skip: reader.decode(ids, skip_special_tokens=skip)


# ---------------------------------------------------------------- GGUF


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
    kinds = fields.get("token_type", [WORD] * len(tokens))
    of_kind = lambda *wanted: {
        token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in wanted
    }
    vocab, specials = of_kind(WORD), of_kind(UNKNOWN, CONTROL, USER_DEFINED)
    keys = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    named = {name: tokens[fields[key]] for name, key in keys.items() if key in fields}
    specials |= {token: vocab.pop(token) for token in named.values() if token in vocab}
    added = {token: False for token in of_kind(USER_DEFINED) if token not in named.values()}
    hf = {"chat_template": fields["tokenizer.chat_template"]} if "tokenizer.chat_template" in fields else {}
    if fields.get("add_bos_token"):
        hf["add_bos_token"] = True
    ends = [i for name in ("eos", "eot", "eom") for i in _ids(fields.get(f"{name}_token_id"))]
    hf |= _ends(ends, hf, vocab, specials, named)
    return build(
        file,
        vocab,
        [tuple(merge.split(" ")) for merge in fields["merges"]],
        specials,
        stages,
        named,
        vocab_size,
        "NFC" if fields["pre"] == "qwen2" else None,
        hf,
        ignore_merges=fields["pre"] == "llama-bpe",  # as llama.cpp and Llama 3's own library do
        added=added,
    )


# ---------------------------------------------------------------- out


def write(tokenizer: Tokenizer | WordPiece, folder: Path, context: int) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json for AutoTokenizer.

    Returns what the model's config.json says of the tokenizer: bos_token_id, eos_token_id, pad_token_id.
    """
    if isinstance(tokenizer, WordPiece):
        tokenizer.save(folder)
        about = {"tokenizer_class": "BertTokenizer", "model_max_length": context}
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
        return {"pad_token_id": tokenizer.pad}
    names = {i: name for name, i in tokenizer.specials.items()}
    hf = {"bos_token": names[tokenizer.bos], "pad_token": names[tokenizer.pad]} | tokenizer.hf
    opening = names[tokenizer.bos] if hf.get("add_bos_token") else None
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names[tokenizer.eot],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    } | {key: hf[key] for key in ("bos_token", "pad_token", "chat_template") if hf.get(key) is not None}
    for name, document in ("tokenizer.json", _document(tokenizer, opening)), ("tokenizer_config.json", about):
        text = json.dumps(document, ensure_ascii=False, indent=1)
        (folder / name).write_text(text, encoding="utf-8")
    named = {
        "bos_token_id": hf["bos_token"],
        "eos_token_id": names[tokenizer.eot],
        "pad_token_id": hf["pad_token"],
    }
    found = {key: tokenizer.specials[name] for key, name in named.items() if name is not None}
    if len(tokenizer.ends) > 1:  # transformers' generate() stops at any of these
        stops = found | {"eos_token_id": list(tokenizer.ends)}
        (folder / "generation_config.json").write_text(json.dumps(stops, indent=1), encoding="utf-8")
    return found


def _document(tokenizer: Tokenizer, opening: str | None) -> dict:
    """tokenizer.json; `opening`: the token that the tokenizer puts before every text, if any."""
    ranks, unreached = tokenizer.ranks, tokenizer.hf.get("unreached", ())
    word = lambda token: "".join(CHARACTERS[b] for b in token)
    in_order = sorted(ranks, key=ranks.get)
    # Every pair that makes a token, not only the pair that training joined: tiktoken joins any of them.
    pairs = ((token[:i], token[i:]) for token in in_order for i in range(1, len(token)))
    merges = [[word(left), word(right)] for left, right in pairs if left in ranks and right in ranks]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    digits = {"type": "Digits", "individual_digits": True}
    built_in = {GPT2_PATTERN: [], SMOLLM_PATTERN: [digits]}
    steps = [
        *built_in.get(tokenizer.pattern, [split]),
        byte_level | {"use_regex": tokenizer.pattern in built_in},
    ]
    has = lambda name, flag: flag in tokenizer.flags.get(name, ())
    added = [
        {
            "id": i,
            "content": name,
            **{flag: has(name, flag) for flag in ("single_word", "lstrip", "rstrip")},
            "normalized": tokenizer.added.get(name, has(name, "normalized")),
            "special": name not in tokenizer.added,
        }
        for name, i in tokenizer.specials.items()
        if name not in unreached
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": tokenizer.normalize} if tokenizer.normalize else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": _opened_by(opening, tokenizer.bos) if opening else None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is not merged, as in tiktoken
            "vocab": {word(token): ranks[token] for token in in_order} | _in_vocab(tokenizer),
            "merges": merges,
        },
    }


def _in_vocab(tokenizer: Tokenizer) -> dict[str, int]:
    """The special and added tokens that the model's vocabulary lists: all, unless one of them is a word.

    `ignore_merges` looks words up in the vocabulary.  It would find such a name even where it is plain text.
    So those at the end are left out, if their ids are those that the package gives to unlisted tokens."""
    specials, unreached = tokenizer.specials, tokenizer.hf.get("unreached", ())
    names = [name for name in specials if name not in unreached]
    is_word = lambda name: name.isascii() and regex.fullmatch(tokenizer.pattern, name)
    last = max([*tokenizer.ranks.values(), *(specials[name] for name in unreached)])
    listed = {name: i for name, i in specials.items() if i < last or name in unreached}
    left_out = sorted(i for name, i in specials.items() if name not in listed)
    n = len(tokenizer.ranks) + len(listed)
    as_given = left_out == [*range(n, n + len(left_out))]
    return listed if as_given and any(map(is_word, names)) else specials


def _opened_by(token: str, i: int) -> dict:
    """The post-processor that puts a token before a text, and before a pair of texts."""
    opening = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [opening, first],
        "pair": [opening, first, second],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }
