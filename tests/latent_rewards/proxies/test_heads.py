"""The head is bilinear in features and prompt before its hidden layer."""

import torch

from latent_rewards.proxies.heads import BilinearHead, ConvMember


def test_a_prompt_can_change_the_sign_of_a_feature():
    torch.manual_seed(0)
    head = BilinearHead(4, 3, 8, 2)
    features, prompt = torch.randn(5, 4), torch.randn(5, 3)
    assert head(features, prompt).shape == (5, 2)
    hidden = []
    head.hidden.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    head(features, prompt)
    plain = head.features(features)
    expected = torch.nn.functional.gelu(torch.cat([plain, plain * head.prompt(prompt)], dim=1))
    torch.testing.assert_close(hidden[0], expected)


def test_a_member_without_prompts_ignores_them():
    member = ConvMember((2, 2, 4, 4), 0, 1, width=8, depth=1)
    latents = torch.randn(3, 2, 2, 4, 4)
    assert member(latents, None).shape == (3, 1)
    assert member.embedding is None and member.head.prompt is None
