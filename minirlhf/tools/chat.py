"""Talk to any checkpoint, or to several at once, and ask why they wrote what they wrote.

    python -m minirlhf.chat runs/demo/sft runs/demo/ppo         # each continues the line that you type
    python -m minirlhf.chat runs/smollm2/base                   # with a chat template: in that template
    python -m minirlhf.chat runs/mine/ppo --layout dialogue     # trained on messages as transcripts
    python -m minirlhf.chat runs/demo/ppo --explain --reference runs/demo/sft --reward-model runs/demo/rm

--explain prints a line for each token: its probability, by how many nats it is likelier than under the
reference, what it added to the reward model's score of the text so far, and the likeliest other tokens.  An
empty line starts a new conversation, Ctrl-D ends the command.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minirlhf import UserError, checkpoint
from minirlhf.interop import chat_template
from minirlhf.model import GPT
from minirlhf.rewards import RewardReader
from minirlhf.rollout import Sampling, Texts, forbid, generate, read_before, response_logprobs
from minirlhf.support import cli, hardware
from minirlhf.support.conversation import ROLES, conversation, transcript
from minirlhf.support.layout import TEMPLATE
from minirlhf.support.text import visible
from minirlhf.tokenizer import Tokenizer

LAYOUTS = ("auto", "text", "dialogue", "template")


def prompt_ids(tokenizer: Tokenizer, layout: str, messages: list[dict[str, str]]) -> list[int]:
    """What the model reads before it answers the last message."""
    if layout == "template":
        try:
            ids = chat_template.encode(tokenizer, messages, answer=True)
        except UserError as error:
            raise UserError(f"{error}: use --layout text or dialogue") from None
        # A reward model with another tokenizer reads the conversation, not this template's text.
        tokenizer.layout.prompts[tuple(ids)] = conversation(messages, "line", {}, answer=True)
        return ids
    text = messages[-1]["content"] if layout == "text" else transcript(messages, answer=True)
    return [tokenizer.bos, *tokenizer.encode(text)]


class Speaker:
    """A checkpoint and the conversation with it."""

    def __init__(
        self,
        path: Path,
        layout: str = "auto",
        system: str | None = None,
        response_tokens: int = 64,
        temperature: float = 1.0,
        device: torch.device | None = None,
    ):
        folder, config, self.tokenizer = checkpoint.writer(path)
        has_template = "chat_template" in self.tokenizer.hf
        if layout == "template" and not has_template:
            raise UserError(f"{path}: its tokenizer has no chat template: use --layout text or dialogue")
        if layout == "auto":  # as the checkpoint was trained; an import of old does not say so
            as_trained = self.tokenizer.layout.name == TEMPLATE or config.get("stage") == "import"
            layout = "template" if has_template and as_trained else "text"
        if system and layout == "text":
            raise UserError(f"{path}: --system needs --layout dialogue or template: a text has no turns")
        self.name, self.layout = str(path), layout
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)
        training = config.get("training")
        stop = training.get("stop", True) if isinstance(training, dict) else True
        eos, pad = self.tokenizer.ends, self.tokenizer.pad
        self.sampling = Sampling(response_tokens, temperature, eos, pad, forbidden=None if stop else eos)
        self.model = checkpoint.load_gpt(folder).to(device).eval()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise UserError(f"{path}: some of its weights are nan or infinite: take another checkpoint")

    def answer(self, line: str) -> tuple[Texts, str]:
        """The answer to a line: a row of what was read and written, without padding, and the answer as text.

        The oldest turns are forgotten where not all fit the context. Raises UserError where the line alone
        does not fit.
        """
        self.messages.append({"role": "user", "content": line})
        try:
            prompt = torch.tensor([self._fitting_prompt()])
        except UserError:
            self.messages.pop()
            raise
        texts = generate(self.model, prompt, torch.ones_like(prompt, dtype=torch.bool), self.sampling)
        written = int(texts.response_mask.sum())
        texts = Texts(
            texts.prompts, texts.prompt_mask, texts.responses[:, :written], texts.response_mask[:, :written]
        )
        answer = self.tokenizer.decode(texts.responses[0].tolist())
        if self.layout == "dialogue":  # a model that has not learnt to stop goes on as its user
            answer = answer.partition(ROLES["user"].rstrip())[0]
        self.messages.append({"role": "assistant", "content": answer.strip()})
        return texts, answer

    def _fitting_prompt(self) -> list[int]:
        context, first = self.model.config.context, len(self.opening)
        while True:
            ids = prompt_ids(self.tokenizer, self.layout, self.messages)
            if len(ids) + self.sampling.max_new <= context:
                return ids
            if self.layout == "text" or len(self.messages) < first + 3:
                raise UserError(
                    f"{self.name}: {len(ids)} tokens and an answer of {self.sampling.max_new} do not fit the "
                    f"context of {context}: write less, or lower --response-tokens"
                )
            del self.messages[first : first + 2]  # the oldest question and its answer

    def forget(self) -> None:
        """Start a new conversation."""
        self.messages = list(self.opening)


@torch.no_grad()
def explain(
    speaker: Speaker, texts: Texts, reference: GPT | None, reader: RewardReader | None
) -> tuple[dict[str, Tensor], Tensor]:
    """What is known of each token of one answer: by column a number per token [R], and all probabilities [R,
    V].

    `texts` is what Speaker.answer returns.  The reader must have the speaker's tokenizer."""
    sampling = speaker.sampling
    logits = speaker.model.logits(read_before(speaker.model, texts)[0])
    probabilities = (forbid(logits.float(), sampling.forbidden) / sampling.temperature).softmax(-1)
    columns = {"probability": probabilities.gather(1, texts.responses[0, :, None])[:, 0]}
    if reference is not None:
        ours, theirs = (
            response_logprobs(model, texts, sampling)[0][0] for model in (speaker.model, reference)
        )
        columns["nats"] = ours - theirs
    if reader is not None:
        columns["score"] = reader.by_token(texts)[0]
    return columns, probabilities


def explanation(
    tokenizer: Tokenizer, written: list[int], columns: dict[str, Tensor], probabilities: Tensor
) -> str:
    """A table with a line for each token that was written."""
    name = lambda token: repr(tokenizer.token_str(token))
    row = lambda token, cells, others: f"{token:>18s}{''.join(f'{c:>13s}' for c in cells)}   {others}"
    likeliest = probabilities.topk(min(4, probabilities.shape[1]))
    lines = [row("token", columns, "likeliest others")]
    for t, token in enumerate(written):
        cells = [
            f"{values[t].item():.1%}" if column == "probability" else f"{values[t].item():+.2f}"
            for column, values in columns.items()
        ]
        others = zip(likeliest.indices[t].tolist(), likeliest.values[t].tolist(), strict=True)
        shown = [f"{name(other)} {p:.0%}" for other, p in others if other != token][:3]
        lines.append(row(name(token), cells, ", ".join(shown)))
    return "\n".join(lines)


def score_note(reader: RewardReader, texts: Texts, tokenizer: Tokenizer) -> str:
    """The reward model's score of an answer, as it stands before the answer."""
    with torch.no_grad():
        score, disagreement, cut = (x.item() for x in reader.scores(texts, tokenizer))
    spread = f" +- {disagreement:.2f}" if len(reader.members) > 1 else ""
    of = f" of its first {reader.context} tokens" if cut else ""
    return f"[score {score:+.2f}{spread}{of}] "


def parse() -> argparse.Namespace:
    parser = cli.Parser("python -m minirlhf.chat", description=__doc__.split("\n")[0])
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="checkpoint",
        help="The language models to talk to; each of them answers every line.",
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="auto",
        help="How a line becomes a prompt: text continues it, dialogue is a transcript as in HH-RLHF, and "
        "template is the model's own. The default is the template where the checkpoint was trained in it, or "
        "came with it, and else text.",
    )
    parser.add_argument("--system", help="The system message that opens every conversation.")
    parser.add_argument(
        "--temperature",
        type=cli.number(cli.AtLeast0),
        default=1.0,
        help="Sampling temperature, 0 or larger; 0 always takes the likeliest token.",
    )
    parser.add_argument(
        "--response-tokens",
        type=cli.number(cli.Count),
        default=64,
        help="Longest answer, in tokens.",
    )
    parser.add_argument(
        "--reward-model", type=Path, help="A reward model, whose score is printed before each answer."
    )
    parser.add_argument(
        "--reference",
        type=Path,
        help="The model that --explain compares the probabilities with: usually the SFT model.",
    )
    parser.add_argument("--explain", action="store_true", help="Print a line for each token of the answer.")
    parser.add_argument(
        "--seed",
        type=cli.number(cli.Seed),
        default=1,
        help="Random seed, 0 or larger: the same seed, the same answers.",
    )
    args = parser.parse_args()
    if args.explain and not args.temperature:
        raise UserError("--explain needs probabilities, and --temperature 0 has none: use --temperature 1")
    if 0 < args.temperature < 1e-6:
        raise UserError("--temperature must be 0, or at least 1e-06")
    if args.reference and not args.explain:
        raise UserError("--reference is only used by --explain: add it, or drop --reference")
    return args


def load_reference(path: Path, speakers: list[Speaker], device: torch.device) -> GPT:
    """The reference model, which must have the speakers' tokens."""
    folder, _, tokenizer = checkpoint.writer(path)
    if any(speaker.tokenizer.hash != tokenizer.hash for speaker in speakers):
        raise UserError(f"{path}: its tokenizer is not the speaker's: nats compare models of one tokenizer")
    return checkpoint.load_gpt(folder).to(device).eval()


def lines() -> Iterator[str]:
    """The lines that are typed, or that come from a file or a pipe and are then printed."""
    sys.stdin.reconfigure(errors="replace")
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
    while True:
        try:
            line = input("\n> " if typed else "").strip()
        except EOFError:
            return
        if not typed:
            print(f"\n> {visible(line)}")
        yield line


def main() -> None:
    args = parse()
    device = hardware.setup_machine().device
    hardware.seed_everything(args.seed)
    speakers = [
        Speaker(path, args.layout, args.system, args.response_tokens, args.temperature, device)
        for path in args.checkpoints
    ]
    reference = load_reference(args.reference, speakers, device) if args.reference else None
    reader = RewardReader.load(args.reward_model, "name a checkpoint of train_rm.py")
    if reader:
        reader.model.to(device)
    for speaker in speakers:
        parameters = sum(p.numel() for p in speaker.model.parameters())
        print(f"{speaker.name}: {speaker.layout}, {parameters:,} parameters")

    for line in lines():
        for speaker in speakers:
            if not line:
                speaker.forget()
                continue
            name = f"[{speaker.name}] " if len(speakers) > 1 else ""
            try:
                texts, answer = speaker.answer(line)
                score = score_note(reader, texts, speaker.tokenizer) if reader else ""
            except UserError as error:  # a line too long for one of the models: the next may fit
                print(name + visible(str(error)))
                continue
            print(name + score + visible((line if speaker.layout == "text" else "") + answer))
            if args.explain:
                judge = reader if reader and reader.reads_prefixes(speaker.tokenizer) else None
                columns, probabilities = explain(speaker, texts, reference, judge)
                print(explanation(speaker.tokenizer, texts.responses[0].tolist(), columns, probabilities))


if __name__ == "__main__":
    cli.run_script(main)
