"""Train the embedded teacher from nothing: ``python -m recipes.moving_digits.train_teacher``.

Three stages, each resumable: the VAE on rendered clips; latents of many clips, cached; then a Wan transformer and its
UMT5 text encoder together, by rectified flow with classifier-free guidance. The result is a stock ``WanPipeline``
folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distillation.families.export import check_target, save_teacher_pipeline
from latent_rewards.training.checkpoint import MANIFEST, commit_directory
from latent_rewards.training.loop import Ema, LoopConfig, TrainingLoop, set_learning_rate, warmup_cosine
from latent_rewards.training.randomness import generator, sample_noise, sample_uniform
from latent_rewards.training.run_folder import RunFolder
from recipes.moving_digits.components import (
    LATENT_SHAPE,
    MAX_PROMPT_TOKENS,
    AutoencoderKLWan,
    T5Tokenizer,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from recipes.moving_digits.train_vae import VaeConfig, encode_clips, train_vae
from recipes.moving_digits.world import ClipSpec, draw_specs, write_prompt

EMBEDDED = Path(__file__).parent / "weights" / "teacher"


@dataclass
class TeacherConfig:
    """Settings of ``make teacher``.

    Attributes:
        vae: settings of the first stage.
        num_clips: clips whose latents are cached.
        num_steps: updates of the transformer and text encoder.
        batch_size: clips per update.
        learning_rate: peak of a warm-up and cosine schedule (AdamW).
        ema_decay: of the weights that are kept.
        prompt_dropout: share of blank prompts, which makes guidance possible.
        seed: root of all randomness.
        work_dir: settings, checkpoints and caches of one training.
        output_dir: the pipeline folder.
    """

    vae: VaeConfig = field(default_factory=VaeConfig)
    num_clips: int = 12288
    num_steps: int = 15000
    batch_size: int = 32
    learning_rate: float = 1.2e-3
    ema_decay: float = 0.998
    prompt_dropout: float = 0.1
    seed: int = 0
    work_dir: str = "runs/teacher"
    output_dir: str = str(EMBEDDED)


class TextConditionedFlow(nn.Module):
    """The transformer and its text encoder as one module, trained together."""

    def __init__(self, seed: int, tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = build_text_encoder(seed + 1, len(tokenizer))
        self.transformer = build_transformer(seed + 2)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Return ``[B, 16, 64]`` embeddings, zero behind each prompt's end as in the stock pipeline."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=MAX_PROMPT_TOKENS, truncation=True, return_tensors="pt"
        )
        hidden = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden * tokens.attention_mask[..., None]

    def forward(self, x_t: Tensor, sigma: Tensor, prompts: Sequence[str]) -> Tensor:
        """Predict the flow eps - x0 ``[B, C, F, H, W]`` at noise levels ``sigma`` ``[B]``."""
        return self.transformer(x_t, timestep=1000 * sigma, encoder_hidden_states=self.embed(prompts)).sample


def cached_vae(config: TeacherConfig) -> AutoencoderKLWan:
    """Return the trained VAE, training it if ``work_dir`` holds none."""
    folder = Path(config.work_dir) / "vae_final"
    if not (folder / MANIFEST).is_file():
        config.vae.output_dir = str(Path(config.work_dir) / "vae")
        vae = train_vae(config.vae)
        with commit_directory(folder) as temporary:
            vae.save_pretrained(temporary)
    return AutoencoderKLWan.from_pretrained(folder).eval()


def cached_latents(config: TeacherConfig, vae: AutoencoderKLWan) -> tuple[Tensor, list[ClipSpec]]:
    """Return normalised latents ``[N, 16, 5, 8, 8]`` in bfloat16 and what each clip shows, encoding them once."""
    folder = Path(config.work_dir) / "latents"
    specs = draw_specs(config.num_clips, seed=config.seed + 10)
    if not (folder / MANIFEST).is_file():
        raw = encode_clips(vae, specs, seed=config.seed + 11)
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        with commit_directory(folder) as temporary:
            save_file({"latents": ((raw - mean) / std).bfloat16().contiguous()}, temporary / "latents.safetensors")
    return load_file(folder / "latents.safetensors")["latents"], specs


def train_flow(config: TeacherConfig, latents: Tensor, specs: Sequence[ClipSpec]) -> TextConditionedFlow:
    """Train transformer and text encoder on cached latents and return their moving average."""
    model = TextConditionedFlow(config.seed, build_tokenizer())
    ema = Ema(model, config.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=1e-2, betas=(0.9, 0.98))
    loop = TrainingLoop(
        LoopConfig(config.num_steps, config.seed, f"{config.work_dir}/flow", checkpoint_every=500, device="cpu"),
        name="teacher",
        modules={"flow": model},
        optimizers={"flow": optimizer},
        stateful={"ema": ema},
    )

    def step(index: int) -> dict[str, float]:
        first = index * config.batch_size
        chosen = torch.randint(
            len(latents), (config.batch_size,), generator=generator(config.seed, "teacher-batch", index)
        )
        batch = range(first, first + config.batch_size)
        x0 = latents[chosen].float()
        noise = sample_noise(config.seed, "teacher-noise", 0, batch, LATENT_SHAPE)
        dropped = sample_uniform(config.seed, "teacher-dropout", 0, batch) < config.prompt_dropout
        prompts = [
            "" if drop else write_prompt(specs[clip], seed=config.seed, index=i)
            for i, clip, drop in zip(batch, chosen.tolist(), dropped.tolist(), strict=True)
        ]
        # Logit-normal times: most of what is hard to predict happens at middle noise levels.
        sigma = torch.sigmoid(0.2 + 1.2 * sample_noise(config.seed, "teacher-time", 0, batch, ()))
        x_t = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1, 1))
        set_learning_rate(
            optimizer, config.learning_rate * warmup_cosine(index, config.num_steps, warmup=200, floor=0.02)
        )
        loss = (model(x_t, sigma, prompts) - (noise - x0)).square().mean()
        norm = loop.update("flow", loss)
        ema.update()
        return {"loss": float(loss.detach()), "grad_norm": norm}

    loop.run(step)
    return ema.module


def train(config: TeacherConfig) -> Path:
    """Run (or resume) all stages and write the pipeline folder; returns its path.

    Raises:
        FolderInUseError: ``output_dir`` holds something else.
        SettingsError: ``work_dir`` was begun with other settings.
    """
    check_target(Path(config.output_dir))
    vae_settings = replace(config.vae, output_dir=None)
    settings = replace(config, vae=vae_settings, work_dir="", output_dir="")  # both folders may be moved
    RunFolder(Path(config.work_dir)).remember({"vae": vae_settings, "teacher": settings})
    vae = cached_vae(config)
    latents, specs = cached_latents(config, vae)
    flow = train_flow(config, latents, specs)
    save_teacher_pipeline(
        config.output_dir,
        transformer=flow.transformer,
        vae=vae,
        text_encoder=flow.text_encoder,
        tokenizer=flow.tokenizer,
        scheduler=build_scheduler(),
        latent_shape=LATENT_SHAPE,
    )
    if Path(config.output_dir).resolve() == EMBEDDED.resolve():
        record(config, EMBEDDED.parent / "training.json")
    return Path(config.output_dir)


def record(config: TeacherConfig, path: Path) -> None:
    """Write the settings of the embedded weights beside them; what else the file says of them is kept."""
    places = ("work_dir", "output_dir")
    facts = {name: value for name, value in asdict(config).items() if name not in places}
    facts["vae"] = {name: value for name, value in facts["vae"].items() if name not in places}
    noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**noted, **facts}, indent=1), encoding="utf-8")


def main() -> None:
    """Read the command line and train."""
    defaults = TeacherConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", default=defaults.work_dir, help="checkpoints and caches (default: %(default)s)")
    parser.add_argument("--output-dir", default=defaults.output_dir, help="the pipeline folder (default: %(default)s)")
    parser.add_argument(
        "--num-steps", type=int, default=defaults.num_steps, help="transformer updates (default: %(default)s)"
    )
    parser.add_argument(
        "--vae-steps", type=int, default=defaults.vae.num_steps, help="VAE updates (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="root of all randomness (default: %(default)s)")
    options = parser.parse_args()
    config = TeacherConfig(
        vae=VaeConfig(num_steps=options.vae_steps, seed=options.seed),
        num_steps=options.num_steps,
        seed=options.seed,
        work_dir=options.work_dir,
        output_dir=options.output_dir,
    )
    print(f"pipeline written to {train(config)}")


if __name__ == "__main__":
    main()
