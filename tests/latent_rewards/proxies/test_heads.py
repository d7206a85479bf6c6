"""The head is bilinear in features and prompt before its hidden layer."""

import torch

from latent_rewards.proxies.heads import BilinearHead, NetworkMember, SeparateMember, TokenAttention
from latent_rewards.proxies.text import PromptFeatures


def test_a_prompt_can_change_the_sign_of_a_feature():
    torch.manual_seed(0)
    head = BilinearHead(4, 3, 8, 2)
    features, prompt = torch.randn(5, 6, 4), torch.randn(5, 3)
    assert head(features, prompt).shape == (5, 2)
    hidden = []
    head.hidden.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    head(features, prompt)
    plain = head.features(features)
    expected = torch.nn.functional.gelu(torch.cat([plain, plain * head.prompt(prompt)[:, None]], dim=2))
    torch.testing.assert_close(hidden[0], expected)


def test_a_member_without_prompts_ignores_them():
    member = NetworkMember((2, 2, 4, 4), PromptFeatures("none", 0), 1, width=8, depth=1)
    latents = torch.randn(3, 2, 2, 4, 4)
    assert member(latents, None).shape == (3, 1)
    assert member.embedding is None and member.head.prompt is None


def test_frames_are_judged_one_by_one_and_averaged():
    torch.manual_seed(0)
    head = BilinearHead(4, 3, 8, 2)
    features, prompt = torch.randn(5, 6, 4), torch.randn(5, 3)
    alone = torch.stack([head(features[:, i : i + 1], prompt) for i in range(6)])
    torch.testing.assert_close(head(features, prompt), alone.mean(dim=0))


def test_attention_ignores_padding_and_order_and_can_pick_one_token():
    torch.manual_seed(0)
    attention = TokenAttention(3, 8)
    tokens = torch.randn(2, 5, 3)
    expected = attention(tokens)
    padded = torch.cat([tokens.flip(1), torch.zeros(2, 4, 3)], dim=1)
    torch.testing.assert_close(attention(padded), expected)
    assert torch.equal(attention(torch.zeros(2, 5, 3)), torch.zeros(2, 8))
    with torch.no_grad():
        attention.scores.weight.copy_(torch.tensor([[100.0, 0.0, 0.0]]).expand(4, 3))
    chosen = tokens[torch.arange(2), tokens[..., 0].argmax(dim=1)]
    torch.testing.assert_close(attention(tokens), attention.values(chosen), atol=1e-4, rtol=0)


def test_networks_of_their_own_share_no_weight_and_give_all_means_before_all_variances():
    torch.manual_seed(0)
    networks = [NetworkMember((2, 2, 4, 4), PromptFeatures("none", 0), 2, width=8, depth=1) for _ in range(3)]
    member, latents = SeparateMember(networks), torch.randn(5, 2, 2, 4, 4)
    outputs, features = member.judge(latents, None)
    own = [network.judge(latents, None) for network in networks]
    for number, (mean_and_variance, _) in enumerate(own):
        torch.testing.assert_close(outputs[:, number::3], mean_and_variance)
    torch.testing.assert_close(features, torch.cat([seen for _, seen in own], dim=2))
    assert features.shape[2] == member.num_features and torch.equal(member(latents, None), outputs)
    member(latents, None)[:, 1].sum().backward()
    taught = [any((p.grad != 0).any() for p in network.parameters()) for network in networks]
    assert taught == [False, True, False]
