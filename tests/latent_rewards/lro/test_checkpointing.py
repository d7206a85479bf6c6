import copy

import pytest
import torch
from torch import nn

from latent_rewards.contracts import ConfigError
from latent_rewards.lro import DifferentiableRewardTrainer, LROConfig, ReinforceTrainer

PROMPTS = ["one", "two"]


class Tokens(nn.Module):
    """A policy of a tiny Wan: mean = x - t v, std = t of the next call."""

    def __init__(self, rows):
        super().__init__()
        from diffusers import WanTransformer3DModel

        torch.manual_seed(0)
        self.rows = rows
        sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 3}
        wan = WanTransformer3DModel(
            in_channels=4, out_channels=4, text_dim=8, freq_dim=16, rope_max_seq_len=16, **sizes
        )
        self.transformer = wan.double()

    def encode(self, prompts):
        generator = torch.Generator().manual_seed(0)
        return self.rows(torch.randn(len(prompts), 3 * 8, generator=generator, dtype=torch.float64))

    def latent_shape(self, condition):
        return (4, 2, 4, 4)

    def timesteps(self, num_steps):
        return [1 - k / num_steps for k in range(num_steps)]

    def transition(self, latents, step, num_steps, condition):
        t = self.timesteps(num_steps)[step]
        time = torch.full((len(latents),), 1000 * t, dtype=latents.dtype)
        v = self.transformer(latents, time, condition.table.view(-1, 3, 8), return_dict=False)[0]
        return latents - t * v, torch.tensor(max(0.0, t - 1 / num_steps), dtype=torch.float64)


def config(**changes):
    base = {"num_updates": 2, "prompts_per_update": 2, "num_generations": 2, "step_counts": [2], "learning_rate": 1e-3}
    return LROConfig(**{**base, "max_grad_norm": 0.0, "progress": False, "device": "cpu", **changes})


@pytest.mark.parametrize("trainer", [ReinforceTrainer, DifferentiableRewardTrainer])
@pytest.mark.parametrize("changes", [{}, {"adapter_rank": 2}, {"kl": "return"}])
def test_checkpointing_keeps_less_and_changes_no_weight(rows, exact_proxy, trainer, changes):
    start, found = Tokens(rows), []
    for checkpointing in (False, True):
        policy, kept = copy.deepcopy(start), []
        made = trainer(policy, exact_proxy(), PROMPTS, config(gradient_checkpointing=checkpointing, **changes))
        assert policy.transformer.is_gradient_checkpointing is checkpointing

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made.train()
        assert not policy.transformer.is_gradient_checkpointing
        found.append((sum(kept), policy.state_dict()))
    (plain, weights), (saved, others) = found
    assert saved < plain / 3
    assert any(not torch.equal(value, start.state_dict()[name]) for name, value in weights.items())
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-9, atol=1e-12)


def test_what_was_on_stays_on_and_what_cannot_is_refused(rows, exact_proxy, linear_policy):
    policy = Tokens(rows)
    policy.transformer.enable_gradient_checkpointing()
    DifferentiableRewardTrainer(policy, exact_proxy(), PROMPTS, config(gradient_checkpointing=True)).train()
    assert policy.transformer.is_gradient_checkpointing
    with pytest.raises(ConfigError, match="gradient_checkpointing: LinearPolicy has no diffusers network that can"):
        DifferentiableRewardTrainer(linear_policy(), exact_proxy(), PROMPTS, config(gradient_checkpointing=True))


def test_the_reference_that_is_the_policy_without_new_adapters_cannot_be_gone_through(rows, exact_proxy):
    settings = config(adapter_rank=2, kl="return", gradient_checkpointing=True)
    with pytest.raises(ConfigError, match=r"kl='return'.*gradient.checkpointing"):
        DifferentiableRewardTrainer(Tokens(rows), exact_proxy(), PROMPTS, settings)
