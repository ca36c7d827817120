"""Talk to any checkpoint, or to several at once, and ask why they wrote what they wrote.

    python -m minirlhf.chat runs/demo/sft runs/demo/ppo                # a line is the beginning of a text
    python -m minirlhf.chat runs/smollm2/base                          # an instruct model, by its own chat template
    python -m minirlhf.chat runs/mine/ppo --layout dialogue            # trained on messages: transcripts as HH-RLHF's
    python -m minirlhf.chat runs/demo/ppo --explain --reference runs/demo/sft --reward-model runs/demo/rm

--explain shows each token with its probability, the nats by which it is likelier than under the reference, what it added to the
reward model's score of the text so far, and the likeliest others.  An empty line starts again; Ctrl-D leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from minirlhf import UserError, checkpoint, data
from minirlhf.feedback.rate import visible
from minirlhf.model import GPT, RewardEnsemble
from minirlhf.rollout import forbid, generate, read, read_before, response_logprobs
from minirlhf.support import cli, hardware
from minirlhf.tokenizer import Tokenizer

LAYOUTS = ("auto", "text", "dialogue", "template")
MARK = "\ue000{}\ue001"  # of the private use area: stands for a message while its template is filled in


def from_template(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """The model's own chat template with an answer to be written.  Special tokens come from the template alone: a message that
    looks like one is plain characters."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template is code of whoever made the model

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    by_id = {i: name for name, i in tokenizer.specials.items()}
    known = {
        "bos_token": by_id.get(tokenizer.bos, ""),
        "eos_token": by_id.get(tokenizer.eot, ""),
        "raise_exception": refuse,
    }
    marked = [message | {"content": MARK.format(i)} for i, message in enumerate(messages)]
    try:
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            tokenizer.hf["chat_template"]
        )
        text = template.render(messages=marked, add_generation_prompt=True, **known)
    except TemplateError as error:
        raise UserError(f"the model's chat template: {error}: use --layout text or dialogue") from None
    pieces = re.split(MARK.format(r"(\d+)"), text)  # by turns the template's text and the number of a message
    ids = [tokenizer.encode(messages[int(piece)]["content"]) if i % 2 else
           tokenizer.encoding.encode(piece, allowed_special="all") for i, piece in enumerate(pieces)]  # fmt: skip
    return [token for piece in ids for token in piece]


def prompt_ids(tokenizer: Tokenizer, layout: str, messages: list[dict]) -> list[int]:
    """What the model reads before it answers the last message."""
    if layout == "template":
        return from_template(tokenizer, messages)
    text = messages[-1]["content"] if layout == "text" else data.transcript(messages, answer=True)
    return [tokenizer.bos, *tokenizer.encode(text)]


class Speaker:
    """A checkpoint and what has been said with it."""

    def __init__(self, path: Path, layout: str, system: str | None, device: torch.device):
        self.name, (folder, about, self.tokenizer) = str(path), checkpoint.writer(path)
        template = "chat_template" in self.tokenizer.hf
        if layout == "template" and not template:
            raise UserError(f"{path}: its tokenizer has no chat template: use --layout text or dialogue")
        # Our own stages have taught an imported model other layouts than the one it came with.
        self.layout = (
            layout if layout != "auto" else "template" if template and about["stage"] == "import" else "text"
        )
        if system and self.layout == "text":
            raise UserError(f"{path}: --system needs --layout dialogue or template: a text has no turns")
        self.forbidden = None if about["training"].get("stop", True) else self.tokenizer.eot
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages, self.model = list(self.opening), checkpoint.load_gpt(folder).to(device).eval()

    def answer(self, line: str, new_tokens: int, temperature: float) -> tuple[Tensor, int, str]:
        """(tokens [1, T] of everything read and written, how many were read, the answer).  The oldest turns are forgotten
        where all do not fit the context; UserError where the line alone does not."""
        self.messages.append({"role": "user", "content": line})
        room, keep = self.model.config.context - new_tokens, len(self.opening)
        while len(ids := prompt_ids(self.tokenizer, self.layout, self.messages)) > room:
            if self.layout == "text" or len(self.messages) < keep + 3:
                self.messages.pop()
                raise UserError(f"{self.name}: {len(ids)} tokens and an answer of {new_tokens} do not fit the context of "
                                f"{self.model.config.context}: write less, or lower --response-tokens")  # fmt: skip
            del self.messages[keep : keep + 2]  # a question and its answer
        queries = torch.tensor([ids], device=self.model.wte.weight.device)
        written, mask = generate(self.model, queries, torch.ones_like(queries, dtype=torch.bool), new_tokens, temperature,
                                 self.tokenizer.eot, self.tokenizer.pad, forbidden=self.forbidden)  # fmt: skip
        text = self.tokenizer.decode(written[mask].tolist())
        if self.layout == "dialogue":  # a model that has not learnt to stop goes on as its user
            text = text.partition(data.ROLES["user"].rstrip())[0]
        self.messages.append({"role": "assistant", "content": text.strip()})
        return torch.cat([queries, written[mask][None]], 1), len(ids), text


@torch.no_grad()
def explain(
    speaker: Speaker,
    tokens: Tensor,
    begun: int,
    temperature: float,
    reference: GPT | None,
    reward_model: RewardEnsemble | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """({what is known: a number for each token written, [R]}, the whole distribution at each, [R, V]).  tokens [1, T] of which
    the first `begun` were read; `reward_model` reads the speaker's tokens."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    logits = speaker.model.logits(read_before(speaker.model, tokens, mask, begun)[0, begun - 1 :])
    chances = (forbid(logits.float(), speaker.forbidden) / temperature).softmax(-1)
    columns = {"probability": chances.gather(1, tokens[0, begun:, None])[:, 0]}
    if reference is not None:
        how = (tokens, mask, begun, temperature, speaker.forbidden)
        ours, theirs = (response_logprobs(model, *how)[0][0] for model in (speaker.model, reference))
        columns["nats"] = ours - theirs
    if reward_model is not None:
        values = torch.stack([member.values(tokens, mask)[0] for member in reward_model.members]).mean(0)
        columns["score"] = values[begun:] - values[begun - 1 : -1]
    return columns, chances


def explanation(tokenizer: Tokenizer, written: list[int], columns: dict[str, Tensor], chances: Tensor) -> str:
    """A line for each token that was written."""
    name = lambda token: repr(tokenizer.token_str(token))
    likeliest = chances.topk(min(4, chances.shape[1]))
    line = lambda token, cells, others: (
        f"{token:>18s}" + "".join(f"{cell:>13s}" for cell in cells) + "   " + others
    )
    lines = [line("token", columns, "likeliest others")]
    for t, token in enumerate(written):
        cells = [
            f"{values[t].item():{'.1%' if head == 'probability' else '+.2f'}}"
            for head, values in columns.items()
        ]
        others = zip(likeliest.indices[t].tolist(), likeliest.values[t].tolist(), strict=True)
        shown = [f"{name(other)} {chance:.0%}" for other, chance in others if other != token][:3]
        lines.append(line(name(token), cells, ", ".join(shown)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m minirlhf.chat", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="language models: each answers every line")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="auto", help="auto: an imported model's chat template, else text"
    )
    parser.add_argument("--system", help="the first message of a dialogue")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--response-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--reward-model", type=Path, help="says what it thinks of each answer")
    parser.add_argument("--reference", type=Path, help="the model that --explain measures nats from")
    parser.add_argument("--explain", action="store_true", help="a line for each token of the answer")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.response_tokens < 1 or not args.temperature >= 0:
        raise UserError("--response-tokens must be above 0, and --temperature not below it")
    if args.explain and not args.temperature:
        raise UserError(
            "--explain tells of a distribution, and --temperature 0 leaves none: use --temperature 1"
        )
    if args.reference and not args.explain:
        raise UserError("--reference is read by --explain: add it, or drop --reference")
    device = hardware.setup_machine(args.seed).device
    speakers = [Speaker(path, args.layout, args.system, device) for path in args.checkpoints]
    reference = reward_model = reader = None
    if args.reference:
        _, _, theirs = checkpoint.writer(args.reference)
        if any(s.tokenizer.hash != theirs.hash for s in speakers):
            raise UserError(
                f"{args.reference}: other tokens than the speaker's: nats compare models of the same tokenizer"
            )
        reference = checkpoint.load_gpt(args.reference).to(device).eval()
    if args.reward_model:
        reward_model, reader = checkpoint.load_reward(args.reward_model)
        reward_model.to(device).eval()
    by_token = lambda s: (
        reader and reader.hash == s.tokenizer.hash and reward_model.members[0].backbone.config.reads_prefixes
    )
    sys.stdin.reconfigure(errors="replace")
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits and remembers lines)
    for speaker in speakers:
        print(
            f"{speaker.name}: {speaker.layout}, {sum(p.numel() for p in speaker.model.parameters()):,} parameters"
        )
    while True:
        try:
            line = input("\n> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not typed:
            print(f"\n> {visible(line)}")
        if not line:
            for speaker in speakers:
                speaker.messages = list(speaker.opening)
            continue
        for speaker in speakers:
            note = f"[{speaker.name}] " if len(speakers) > 1 else ""
            try:
                tokens, begun, text = speaker.answer(line, args.response_tokens, args.temperature)
                if reward_model:
                    with torch.no_grad():
                        score, apart = read(
                            reward_model, reader, tokens, torch.ones_like(tokens) > 0, speaker.tokenizer
                        )
                    note += (
                        f"[score {score.item():+.2f}"
                        + f" +- {apart.item():.2f}" * (len(reward_model.members) > 1)
                        + "] "
                    )
                print(note + visible((line if speaker.layout == "text" else "") + text))
                if args.explain:
                    judge = reward_model if by_token(speaker) else None
                    found = explain(speaker, tokens, begun, args.temperature, reference, judge)
                    print(explanation(speaker.tokenizer, tokens[0, begun:].tolist(), *found))
            except UserError as error:  # a text too long for one of the models: the next may fit
                print(note + str(error))


if __name__ == "__main__":
    cli.run_script(main)
