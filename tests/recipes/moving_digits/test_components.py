import torch

from recipes.moving_digits.components import (
    LATENT_SHAPE,
    MAX_PROMPT_TOKENS,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from recipes.moving_digits.world import all_specs, draw_specs, render, write_prompt


def test_every_word_is_one_token_and_no_prompt_is_cut():
    tokenizer = build_tokenizer()
    for index, spec in enumerate(all_specs(heldout=True)):
        prompt = write_prompt(spec, seed=0, index=index, heldout_phrasing=True)
        tokens = tokenizer(prompt).input_ids
        assert len(tokens) == len(prompt.split()) + 1 <= MAX_PROMPT_TOKENS
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens, skip_special_tokens=True) == prompt


def test_shapes_fit_together():
    clips = render(draw_specs(2, seed=0), seed=0)
    vae = build_vae(0)
    with torch.no_grad():
        latents = vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mode()
        assert tuple(latents.shape[1:]) == LATENT_SHAPE
        assert vae.decode(latents).sample.shape == (2, 3, 17, 32, 32)
        tokenizer = build_tokenizer()
        tokens = tokenizer(["a red digit 3"] * 2, return_tensors="pt")
        text = build_text_encoder(0, len(tokenizer))(**tokens).last_hidden_state
        flow = build_transformer(0)(latents, torch.tensor([500.0, 20.0]), text).sample
    assert flow.shape == latents.shape


def test_weights_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = build_transformer(5)
    state = torch.random.get_rng_state()
    second = build_transformer(5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.proj_out.weight, build_transformer(6).proj_out.weight)
