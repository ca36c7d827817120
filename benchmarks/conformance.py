"""Public libraries' functions, asked by minirlhf.conformance. They are called, not copied.

    python benchmarks/conformance.py trl         # writes benchmarks/results/conformance_trl.txt
    python benchmarks/conformance.py verl
    python benchmarks/conformance.py openrlhf

trl==1.16.0 comes with the extra [models]. The other two need `pip install --no-deps verl==0.9.1
openrlhf==0.11.2` beside it; packages that they import and that these functions do not use, such as ray and
deepspeed, are stood in for where they are missing. A line "beside it" says what the library's own words or
defaults say about a difference; some are choices. Each adapter below gives one function our names.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import inspect
import io
import re
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minirlhf import UserError  # noqa: E402
from minirlhf.support import cli  # noqa: E402
from minirlhf.tools.conformance.__main__ import ask  # noqa: E402
from minirlhf.tools.conformance.kinds import KINDS  # noqa: E402
from minirlhf.tools.conformance.subject import Subject  # noqa: E402


@dataclass(frozen=True)
class Asked:
    """One function of a library."""

    name: str
    kind: str
    function: Callable[..., Any]
    beside: str = ""  # what is a choice, in the library's own terms
    options: dict[str, Any] = field(default_factory=dict)  # of Subject


# ------------------------------------------------------------------------------ TRL


def trl_trainer(new_logprobs: Tensor, **settings: Any) -> SimpleNamespace:
    """What TRL's _compute_loss reads of a trainer; its model gives `new_logprobs`."""
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    for name in ("delta", "use_bias_correction_kl"):
        setattr(args, name, settings.pop(name, getattr(args, name)))
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    found = SimpleNamespace(
        args=args,
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        loss_type="dapo",
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=16,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            new_logprobs,
            torch.zeros_like(new_logprobs),
            None,
        ),
    )
    for name, value in settings.items():
        setattr(found, name, value)
    return found


def trl_grpo_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    denominator: Tensor | float | None = None,
    ref_logprobs: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """GRPOTrainer._compute_loss on these tensors. Advantages may be [B] or [B, R]; settings are the trainer's."""
    from trl import GRPOTrainer

    mask = response_mask.to(new_logprobs.dtype)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    items = mask.sum() if denominator is None else torch.as_tensor(denominator, dtype=mask.dtype)
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": ids[:, :0],
        "completion_ids": ids,
        "completion_mask": mask,
    }
    inputs |= {"advantages": advantages, "old_per_token_logps": logprobs, "num_items_in_batch": items}
    inputs |= {} if ref_logprobs is None else {"ref_per_token_logps": ref_logprobs}
    return GRPOTrainer._compute_loss(trl_trainer(new_logprobs, **settings), None, inputs)


def trl_rloo_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, response_mask: Tensor, **settings: Any
) -> Tensor:
    """RLOOTrainer._compute_loss. Advantages are [B]."""
    from trl import RLOOTrainer

    mask = response_mask.to(new_logprobs.dtype)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": ids[:, :0],
        "completion_ids": ids,
        "completion_mask": mask,
    }
    inputs |= {"advantages": advantages, "old_logps": (logprobs * mask).sum(1)}
    return RLOOTrainer._compute_loss(trl_trainer(new_logprobs, **settings), None, inputs)


def trl_policy_loss(**settings: Any) -> Callable[..., Tensor]:
    """The loss of a trainer with these settings, by our names."""

    def loss(new_logprobs, logprobs, advantages, response_mask, clip_range, denominator=None):
        low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
        if settings.get("loss_type") == "cispo":
            high += 1  # in TRL, epsilon_high is the cap itself; in ours, the cap is 1 + high
        given = (new_logprobs, logprobs, advantages, response_mask, denominator)
        return trl_grpo_loss(*given, epsilon_low=low, epsilon_high=high, **settings)

    def mean(new_logprobs, logprobs, advantages, response_mask, clip_range):
        return loss(new_logprobs, logprobs, advantages, response_mask, clip_range)

    def summed(new_logprobs, logprobs, advantages, response_mask, clip_range):
        """dr_grpo divides the sum over tokens by a constant, max_completion_length per response."""
        found = loss(new_logprobs, logprobs, advantages, response_mask, clip_range)
        return found * len(new_logprobs) * trl_trainer(new_logprobs).max_completion_length

    if settings.get("loss_type") == "dr_grpo":
        return summed
    of_tokens = settings.get("loss_type") in (
        "dapo",
        "cispo",
    )  # the others take no count of the step's tokens
    return loss if of_tokens else mean


def trl_kl_loss(
    new_logprobs, logprobs, ref_logprobs, response_mask, denominator=None, use_bias_correction_kl=False
):
    """The term of beta, alone: the advantages are 0."""
    zeros = torch.zeros_like(new_logprobs)
    settings = {"beta": 1.0, "use_bias_correction_kl": use_bias_correction_kl}
    return trl_grpo_loss(new_logprobs, logprobs, zeros, response_mask, denominator, ref_logprobs, **settings)


def trl_corrected_kl_loss(new_logprobs, logprobs, ref_logprobs, response_mask, denominator=None):
    return trl_kl_loss(new_logprobs, logprobs, ref_logprobs, response_mask, denominator, True)


@functools.cache
def trl_statements(trainer: str, first: str) -> Any:
    """The statements of a trainer's _generate_and_score_completions that make advantages of rewards, compiled.

    They stand inside a method of hundreds of lines, from the one that begins with `first` to the one that
    replaces NaN advantages by 0.
    """
    import trl

    source = textwrap.dedent(inspect.getsource(getattr(trl, trainer)._generate_and_score_completions))
    body = ast.parse(source).body[0].body
    texts = [ast.unparse(statement) for statement in body]
    start = next(i for i, text in enumerate(texts) if text.startswith(first))
    end = next(i for i, text in enumerate(texts) if text.startswith("advantages = torch.nan_to_num"))
    return compile(ast.Module(body[start : end + 1], []), trainer, "exec")


def trl_grpo_advantages(rewards: Tensor, group: int, scale_rewards: str = "group") -> Tensor:
    from trl.trainer.utils import nanstd

    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1),
        scale_rewards=scale_rewards,
    )
    space = {
        "self": trainer,
        "rewards_per_func": rewards[:, None],
        "num_generations": group,
        "nanstd": nanstd,
    }
    space |= {"torch": torch, "device": rewards.device, "unscorable_mask": rewards.isnan()}
    exec(trl_statements("GRPOTrainer", "if self.multi_objective_aggregation"), space)
    return space["advantages"]


def trl_rloo_advantages(rewards: Tensor, group: int, beta: float = 0.0, **kl: Tensor) -> Tensor:
    """kl: old_per_token_logps, ref_per_token_logps and completion_mask, for a beta that is not 0."""
    from trl.trainer.utils import nanstd

    space = {
        "self": SimpleNamespace(normalize_advantages=False, beta=beta),
        "rewards": rewards,
        "num_generations": group,
    }
    space |= kl | {"torch": torch, "nanstd": nanstd, "gather": lambda x: x}
    exec(trl_statements("RLOOTrainer", "if self.beta != 0.0"), space)
    return space["advantages"]


def of_trl() -> list[Asked]:
    loss, partial = trl_policy_loss, functools.partial
    by_response = "loss_type='grpo' averages within a response, as GRPO's paper does; TRL's default is 'dapo'"
    own = "TRL computes these log-probabilities itself, and does not expect exp to overflow"
    constant = "dr_grpo divides by the constant max_completion_length per response; that is undone here"
    k3 = "k3, as in GRPO's paper; TRL's default is beta 0, and use_bias_correction_kl is the other estimator"
    batch = "the batch's standard deviation is an option of TRL's; group is the default"
    sequence = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    return [
        Asked("GRPOTrainer, loss_type dapo", "policy_loss", loss(loss_type="dapo"), own),
        Asked("GRPOTrainer, loss_type grpo", "policy_loss", loss(loss_type="grpo"), by_response),
        Asked(
            "GRPOTrainer, loss_type dr_grpo",
            "policy_loss",
            loss(loss_type="dr_grpo"),
            constant,
            {"output": ("sum",)},
        ),
        Asked("GRPOTrainer, loss_type cispo", "cispo_loss", loss(loss_type="cispo")),
        Asked("GRPOTrainer, importance_sampling_level sequence", "gspo_loss", loss(**sequence), by_response),
        Asked("GRPOTrainer, beta", "kl_loss", trl_kl_loss, k3),
        Asked("GRPOTrainer, beta, use_bias_correction_kl", "kl_loss", trl_corrected_kl_loss, own),
        Asked("GRPOTrainer, advantages", "advantages", trl_grpo_advantages),
        Asked(
            "GRPOTrainer, scale_rewards none",
            "advantages",
            partial(trl_grpo_advantages, scale_rewards="none"),
        ),
        Asked(
            "GRPOTrainer, scale_rewards batch",
            "advantages",
            partial(trl_grpo_advantages, scale_rewards="batch"),
            batch,
        ),
        Asked("RLOOTrainer, advantages", "advantages", trl_rloo_advantages),
    ]


# ------------------------------------------------------------------------------ verl


def of_verl() -> list[Asked]:
    import numpy as np

    core = importlib.import_module("verl.trainer.ppo.core_algos")
    functional = importlib.import_module("verl.utils.torch_functional")
    config_of = importlib.import_module("verl.workers.config").ActorConfig

    def config(clip_range: Any, denominator: Any, cispo: bool) -> Any:
        low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
        low = 1.0 if cispo else low
        made = object.__new__(config_of)  # without the checks of a whole run's settings
        settings = {"clip_ratio": low, "clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": 3.0}
        settings["global_batch_info"] = {} if denominator is None else {"batch_num_tokens": denominator}
        for name, value in settings.items():
            object.__setattr__(made, name, value)
        return made

    def policy(name: str) -> Callable:
        of_name = core.get_policy_loss_fn(name)

        def loss(
            new_logprobs, logprobs, advantages, response_mask, clip_range, denominator=None, weights=None
        ):
            given = (logprobs, new_logprobs, advantages, response_mask, "token-mean")
            return of_name(*given, config(clip_range, denominator, name == "cispo"), weights)

        return loss

    def kl(logprobs, ref_logprobs):
        return tuple(core.kl_penalty(logprobs, ref_logprobs, kind) for kind in ("k1", "k2", "k3"))

    def kl_loss(kind: str) -> Callable:
        def loss(new_logprobs, ref_logprobs, response_mask, denominator=None):
            losses = core.kl_penalty(new_logprobs, ref_logprobs, kind)
            return core.agg_loss(losses, response_mask, "token-mean", batch_num_tokens=denominator)

        return loss

    def value(new_values, values, returns, response_mask, clip_range_value=0.2, denominator=None):
        return core.compute_value_loss(
            new_values, returns, values, response_mask, clip_range_value, batch_num_tokens=denominator
        )

    def advantages(function: Callable) -> Callable:
        def of_groups(rewards, group):
            index = np.arange(len(rewards)) // group
            ones = torch.ones(len(rewards), 1, dtype=rewards.dtype)
            return function(rewards[:, None].clone(), ones, index)[0][:, 0]

        return of_groups

    def gae(rewards, values, mask, gamma, lam):
        twice = (torch.cat([x, x]) for x in (rewards, values, mask))  # it refuses to whiten a single token
        _, returns = core.compute_gae_advantage_return(*twice, gamma, lam)
        returns = returns[: len(rewards)]
        return returns - values, returns

    def average(mode: str) -> Callable:
        return lambda x, mask: core.agg_loss(x, mask, mode)

    def controller(kl_coef, kl, target, n, horizon):
        found = core.AdaptiveKLController(kl_coef, target, horizon)
        found.update(kl, n)
        return float(found.value)

    floats = {"mask": "float"}
    whitened = "it whitens its advantages; these are its returns, which it takes before, less the values"
    raw = "a group of one keeps its raw reward: a branch of the code says so"
    modes = "loss_agg_mode is a setting; token-mean is the default"
    return [
        Asked("kl_penalty k1, k2, k3", "kl", kl, "the log-ratio is clamped to 20, and k3 to 10"),
        Asked("kl_penalty low_var_kl as a loss", "kl_loss", kl_loss("low_var_kl"), "k3, the default kl_loss_type; k3+ is the other", floats),
        Asked("kl_penalty k3+ as a loss", "kl_loss", kl_loss("k3+"), "", floats),
        Asked("compute_policy_loss_vanilla", "policy_loss", policy("vanilla"), "dual-clip PPO at a ratio of 3 (clip_ratio_c)", floats),
        Asked("compute_policy_loss_cispo", "cispo_loss", policy("cispo"), "with clip_ratio_low 1, as in the paper; its default .2 bounds weights from below as well", floats),
        Asked("compute_policy_loss_gspo, token-mean", "gspo_loss", policy("gspo"), "the ratio is one number, but its gradient is each token's own", floats),
        Asked("compute_value_loss", "value_loss", value, "", floats),
        Asked("compute_grpo_outcome_advantage", "advantages", advantages(core.compute_grpo_outcome_advantage), raw),
        Asked("compute_rloo_outcome_advantage", "advantages", advantages(core.compute_rloo_outcome_advantage), raw),
        Asked("compute_gae_advantage_return", "gae", gae, whitened, floats),
        Asked("masked_whiten", "whiten", functional.masked_whiten, "the unbiased variance", floats | {"rename": {"values": "x"}}),
        Asked("agg_loss token-mean", "masked_mean", average("token-mean"), "", floats),
        Asked("agg_loss seq-mean-token-mean", "masked_mean", average("seq-mean-token-mean"), modes, floats),
        Asked("AdaptiveKLController", "kl_controller", controller),
    ]  # fmt: skip


# ------------------------------------------------------------------------------ OpenRLHF


def of_openrlhf() -> list[Asked]:
    losses = importlib.import_module("openrlhf.models.loss")
    utils = importlib.import_module("openrlhf.models.utils")

    def policy(kind: str) -> Callable:
        def loss(new_logprobs, logprobs, advantages, response_mask, clip_range, denominator=None):
            low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
            of_kind = losses.PolicyLoss(low, high, policy_loss_type=kind)
            if kind == "gspo" and denominator is not None:
                raise UserError("gspo takes the number of responses")
            return of_kind(new_logprobs, logprobs, advantages, response_mask, batch_num_tokens=denominator)

        return loss

    def gspo(new_logprobs, logprobs, advantages, response_mask, clip_range):
        return policy("gspo")(new_logprobs, logprobs, advantages, response_mask, clip_range)

    def value(new_values, values, returns, response_mask, clip_range_value=0.2, denominator=None):
        loss = losses.ValueLoss(clip_range_value)
        return loss(new_values, values, returns, response_mask, batch_num_tokens=denominator)

    def kl(logprobs, ref_logprobs):
        return tuple(
            utils.compute_approx_kl(logprobs, ref_logprobs, kl_estimator=k) for k in ("k1", "k2", "k3")
        )

    def kl_loss(unbiased: bool) -> Callable:
        def loss(new_logprobs, logprobs, ref_logprobs, response_mask, denominator=None):
            of_token = utils.compute_approx_kl(new_logprobs, ref_logprobs, logprobs, "k3", unbiased)
            return losses.aggregate_loss(of_token, response_mask, batch_num_tokens=denominator)

        return loss

    def shape(scores, logprobs, ref_logprobs, response_mask, kl_coef):
        kl = utils.compute_approx_kl(logprobs, ref_logprobs, kl_estimator="k1")
        return utils.compute_reward(scores, kl_coef, kl, response_mask)

    def pairs(ipo: bool) -> Callable:
        def loss(chosen, rejected, beta):
            zeros = torch.zeros_like(chosen)
            return losses.DPOLoss(beta, ipo=ipo)(chosen, rejected, zeros, zeros)

        return loss

    floats = {"mask": "float"}
    masked = "its actor gives log-probabilities of 0 in padding, and its caller works without gradients"
    return [
        Asked("compute_approx_kl k1, k2, k3", "kl", kl, "float32, clamped to 10"),
        Asked("compute_approx_kl k3 as a loss", "kl_loss", kl_loss(False), "the estimator's own gradient", floats),
        Asked("compute_approx_kl k3 with unbiased_gradient", "kl_loss", kl_loss(True), "", floats),
        Asked("PolicyLoss ppo", "policy_loss", policy("ppo"), "", floats),
        Asked("PolicyLoss gspo", "gspo_loss", gspo, "", floats),
        Asked("ValueLoss", "value_loss", value, "", floats),
        Asked("compute_reward with k1", "shape_rewards", shape, masked),
        Asked("masked_mean", "masked_mean", lambda x, mask: utils.masked_mean(x, mask), "", floats),
        Asked("PairWiseLoss", "pairwise_loss", lambda scores_a, scores_b: losses.PairWiseLoss()(scores_a, scores_b)),
        Asked("LogExpLoss", "pairwise_loss", lambda scores_a, scores_b: losses.LogExpLoss()(scores_a, scores_b)),
        Asked("DPOLoss", "dpo_loss", pairs(False)),
        Asked("DPOLoss ipo", "ipo_loss", pairs(True), "the caller decides whether log-probabilities are sums or means"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------ running


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules without content in place of packages that are missing."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:  # asked last, so only for what is not installed
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module

    def exec_module(self, module: Any) -> None:
        pass


UNUSED = (
    "ray", "tensordict", "omegaconf", "codetiming", "hydra", "torchdata", "peft", "orjson", "pylatexenc",
    "deepspeed", "flash_attn", "optree", "cachetools", "dill", "vllm", "aiohttp",
)  # fmt: skip
LIBRARIES = {"trl": of_trl, "verl": of_verl, "openrlhf": of_openrlhf}


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="+", choices=LIBRARIES, help="Libraries to ask.")
    parser.add_argument("--seed", type=cli.number(cli.Seed), default=1, help="Seed of the random examples.")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for library in args.library:
        if library != "trl":
            sys.meta_path.append(StandIns(UNUSED))
        try:
            rows = LIBRARIES[library]()
        except ImportError as error:
            raise UserError(f"{library} is not installed: {error}") from None
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            version = importlib.metadata.version(library)
            print(f"$ python benchmarks/conformance.py {library}")
            print(f"{library} {version}, torch {re.sub('[+].*', '', torch.__version__)}")
            for row in rows:
                print()
                subject = Subject(row.function, KINDS[row.kind], seed=args.seed, name=row.name, **row.options)
                ask(subject, row.kind)
                if row.beside:
                    print(f"beside it: {row.beside}")
        text = "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
        (ROOT / f"benchmarks/results/conformance_{library}.txt").write_text(text)
        print(text, end="")


if __name__ == "__main__":
    cli.run_script(main)
