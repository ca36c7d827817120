"""Our DPO and IPO against TRL's own trainer: the same loss and the same gradients from the same log-probabilities.

trl==1.16.0 comes with the extra [models]; without it this file is skipped.

    pytest -m models tests/models/test_dpo_beside_trl.py
"""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.models
torch = pytest.importorskip("torch")
trainer = pytest.importorskip("trl.trainer.dpo_trainer")

from minirlhf import preference  # noqa: E402

B, P, R = 5, 3, 7  # pairs, prompt tokens, longest response
LENGTHS = torch.tensor([7, 4, 1, 6, 2, 3, 7, 5, 1, 2])  # of the 2 B responses, the chosen ones first
LOSSES = {"sigmoid": ("dpo", preference.dpo_loss), "ipo": ("ipo", preference.ipo_loss)}


class Model(torch.nn.Module):
    """Stands for a language model whose log-probabilities are given: what TRL's loss asks of its fused head."""

    def __init__(self, logprobs):
        super().__init__()
        self.logprobs = logprobs

    def forward(self, input_ids, attention_mask, labels, use_cache, fused_lm_head):
        real = (labels[:, 1:] != -100).float()
        nothing = torch.zeros_like(self.logprobs)
        return SimpleNamespace(
            log_probs=self.logprobs * real, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )


def theirs(logprobs, ref_logps, loss: str, beta: float):
    """(loss, metrics) of DPOTrainer on log-probabilities [2 B, P + R - 1] and reference sums [2 B]."""
    gather = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x.reshape(-1)
    )
    metrics = {mode: trainer.defaultdict(list) for mode in ("train", "eval")}
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=gather, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss], loss_weights=[1.0], beta=beta,
        use_weighting=False, label_smoothing=0.0, _metrics=metrics, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    completion = torch.cat([torch.zeros(2 * B, P), torch.arange(R) < LENGTHS[:, None]], 1).long()
    chosen, rejected = ref_logps.chunk(2)
    inputs = {
        "input_ids": torch.full((2 * B, P + R), 5),
        "attention_mask": completion | (torch.arange(P + R) < P),
        "completion_mask": completion,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    found = trainer.DPOTrainer._compute_loss(stub, Model(logprobs), inputs, False)
    return found, {name: values[0] for name, values in metrics["train"].items()}


def ours(logprobs, ref_logps, loss: str, beta: float):
    name, function = LOSSES[loss]
    mask = torch.arange(R) < LENGTHS[:, None]
    logps = (logprobs[:, P - 1 :] * mask).sum(1)
    chosen, rejected = preference.sequence_log_ratios(logps, ref_logps, LENGTHS, name).chunk(2)
    return function(chosen, rejected, beta), (chosen, rejected, logps)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_D25_loss_and_gradient_are_trls(loss, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(2 * B, P + R - 1, generator=generator)
    ref_logps = (logprobs[:, P - 1 :] * (torch.arange(R) < LENGTHS[:, None])).sum(1)
    ref_logps = ref_logps + torch.randn(2 * B, generator=generator)
    a, b = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    their_loss, metrics = theirs(a, ref_logps, loss, beta)
    our_loss, (chosen, rejected, logps) = ours(b, ref_logps, loss, beta)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-6, atol=1e-6)
    their_loss.backward()
    our_loss.backward()
    assert b.grad.abs().max() > 1e-4
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-6)
    assert metrics["logps/chosen"] == pytest.approx(logps[:B].mean().item(), rel=1e-5)
    assert metrics["logps/rejected"] == pytest.approx(logps[B:].mean().item(), rel=1e-5)
    if loss == "sigmoid":  # of ipo TRL logs sums, where its loss compares means
        assert metrics["rewards/chosen"] == pytest.approx(beta * chosen.mean().item(), rel=1e-4, abs=1e-6)
        assert metrics["rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())


def test_at_the_reference_trl_counts_every_pair_as_wrong():
    """Where we count a half: a margin of 0 says nothing."""
    logprobs = -torch.ones(2 * B, P + R - 1)
    _, metrics = theirs(logprobs, -LENGTHS.float(), "sigmoid", 0.1)
    assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0
