"""What proxies of the digits world are judged on: samples of a student with true scores, and what no student made.

Everything is made once from seeds and kept below a folder of ``runs/``: pools of training samples, samples of prompts
whose combinations of attributes nothing was trained on, clips of another world, and samples of a hacked policy.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import distillation as ds
import latent_rewards as lr
from distillation.families.export import load_student
from latent_rewards.contracts import ConfigError, DataError
from latent_rewards.dataset import check_same_fingerprint
from latent_rewards.training.checkpoint import MANIFEST, commit_directory
from latent_rewards.training.randomness import generator, sample_noise
from recipes.moving_digits import metrics as _register  # noqa: F401 - registers digits.*
from recipes.moving_digits.benchmark import training_prompts
from recipes.moving_digits.world import NUM_FRAMES, SIZE, all_specs, write_prompt

REWARDS = ("digits.legibility", "digits.direction", "motion.dynamic_degree")
HACKED = REWARDS[0]
"""The reward whose frozen proxy a policy climbs."""

NUM_STEPS = 4
_HELDOUT_SEED, _FOREIGN_SEED = 90210, 90211
_SKIMAGE = "astronaut brick camera chelsea coffee coins grass gravel moon rocket".split()
_SKLEARN = ("china.jpg", "flower.jpg")


@dataclass(frozen=True)
class Amounts:
    """How much of everything there is.

    Attributes:
        pool: training samples of each seed.
        heldout: samples that judge, the same for all methods and seeds.
        heldout_prompts: their prompts.
        foreign: noise latents, and clips of another world.
        hacked: samples of a hacked policy.
        hack_updates: updates it is hacked in.
        hack_rate: learning rate of those.
    """

    pool: int = 2048
    heldout: int = 2000
    heldout_prompts: int = 200
    foreign: int = 1000
    hacked: int = 500
    hack_updates: int = 120
    hack_rate: float = 1e-4

    def __post_init__(self) -> None:
        """Check that there is something of everything.

        Raises:
            ConfigError: a number is not positive, or there are more prompts than samples of them.
        """
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name} must be positive; got {value}")
        if self.heldout_prompts > self.heldout:
            raise ConfigError(f"{self.heldout_prompts} held-out prompts need as many samples; got {self.heldout}")


class ProxyWorld:
    """A student, its codec, the teacher it came from, and the true metrics; samples are kept in ``folder``.

    Args:
        student: folder that ``FewStepStudent.save_pretrained`` wrote.
        teacher: folder of the teacher pipeline, whose text encoder and transformer are used.
        folder: where samples are kept; one folder for one student.
        amounts: how much of everything.
        device: torch device of all networks.

    Raises:
        FingerprintMismatchError: student and teacher have different VAEs.
    """

    def __init__(
        self, student: str | Path, teacher: str | Path, folder: str | Path, amounts: Amounts, device: str = "cpu"
    ) -> None:
        self.student = load_student(student, device=device)
        self.teacher = ds.load_teacher(teacher, device=device)
        self.codec = self.student.exporter.codec
        check_same_fingerprint(
            "latent space of student and teacher", self.codec.fingerprint, self.teacher.codec.fingerprint
        )
        self.folder, self.amounts, self.device = Path(folder), amounts, device
        self.oracle = lr.MetricOracle(self.codec, list(REWARDS))
        self.prompts = heldout_prompts(amounts.heldout_prompts)

    @cached_property
    def student_digest(self) -> str:
        """What tells this student from another one."""
        return full_digest(self.student)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return what the teacher reads of prompts, ``[N, L, D]``, zeros for padding."""
        return self.teacher.encode(texts).embeddings

    def pool(self, seed: int) -> lr.RewardDataset:
        """Return the training samples of a seed, of training prompts and with noise of its own."""
        prompts = training_prompts(self.amounts.pool, seed=seed)
        return self._collect(self.student, prompts, self.amounts.pool, seed, self.folder / f"pool-seed{seed}")

    def heldout(self) -> lr.RewardDataset:
        """Return the samples that judge: those of :func:`heldout_prompts`, one after the other and again."""
        return self._collect(self.student, self.prompts, self.amounts.heldout, _HELDOUT_SEED, self.folder / "heldout")

    def noise(self) -> Tensor:
        """Return N(0, 1) latents ``[foreign, C, F, H, W]``."""
        return sample_noise(_FOREIGN_SEED, "noise", 0, range(self.amounts.foreign), self.student.latent_shape())

    @torch.no_grad()
    def textures(self, batch_size: int = 40) -> Tensor:
        """Return the latents ``[foreign, C, F, H, W]`` of :func:`moving_pictures`, encoded once."""
        count = self.amounts.foreign
        folder = self.folder / f"textures-{count}"
        if not (folder / MANIFEST).is_file():
            starts = range(0, count, batch_size)
            parts = [
                self.codec.encode(moving_pictures(range(i, min(i + batch_size, count)), seed=_FOREIGN_SEED)).cpu()
                for i in starts
            ]
            with commit_directory(folder) as temporary:
                save_file({"latents": torch.cat(parts).contiguous()}, temporary / "latents.safetensors")
        return load_file(folder / "latents.safetensors")["latents"]

    def hacked(self, proxy: lr.RewardProxy, seed: int) -> lr.RewardDataset:
        """Return samples, of the held-out prompts, of a policy that climbed ``proxy`` with nothing to hold it.

        There is no oracle, so the proxy stays frozen, no KL, no anchor and no holdout. The run belongs to the proxy's
        weights: another proxy is hacked anew.
        """
        amounts = self.amounts
        folder = self.folder / f"hacked-seed{seed}-{full_digest(proxy)}-{amounts.hack_updates}-{amounts.hack_rate:g}"
        if not (folder / "student" / MANIFEST).is_file():
            policy = copy.deepcopy(self.student)
            config = lr.LROConfig(
                num_updates=amounts.hack_updates,
                learning_rate=amounts.hack_rate,
                step_counts=[NUM_STEPS],
                beta=0.0,
                pessimism=0.0,
                seed=seed,
                output_dir=str(folder / "lro"),
                checkpoint_every=20,
                device=self.device,
            )
            prompts = training_prompts(amounts.pool, seed=seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="no oracle|one reward and no holdout")  # it is the point
                lr.DifferentiableRewardTrainer(
                    policy, copy.deepcopy(proxy), prompts, config=config, reward=lambda scores: scores[HACKED]
                ).train()
            policy.save_pretrained(folder / "student")
        policy = load_student(folder / "student", device=self.device)
        return self._collect(policy, self.prompts, amounts.hacked, seed, folder / f"samples-{amounts.hacked}")

    def _collect(
        self, policy: ds.FewStepStudent, prompts: list[str], count: int, seed: int, folder: Path
    ) -> lr.RewardDataset:
        return lr.collect_rewards(
            policy, prompts, self.oracle, num_samples=count, output_dir=folder, seed=seed, num_steps=NUM_STEPS
        )


def full_digest(module: nn.Module) -> str:
    """Return 16 hex digits that depend on every weight and buffer of a module, by which results name their student.

    :func:`latent_rewards.digests.weights_digest` reads a part of them, which is quicker.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def heldout_prompts(count: int) -> list[str]:
    """Return ``count`` distinct prompts of held-out combinations, which are used equally often.

    Held-out phrasings are among those drawn.

    Raises:
        DataError: more are asked for than can be drawn with ease, 50 for each combination.
    """
    specs = all_specs(heldout=True)
    if not 1 <= count <= 50 * len(specs):
        raise DataError(f"count must lie between 1 and {50 * len(specs)}; got {count}")
    texts: dict[str, None] = {}
    draws = 0
    while len(texts) < count:
        spec = specs[len(texts) % len(specs)]
        texts.setdefault(write_prompt(spec, seed=_HELDOUT_SEED, index=draws, heldout_phrasing=True))
        draws += 1
    return list(texts)


def pictures() -> list[Tensor]:
    """Return the photographs that scikit-image and scikit-learn bring along, each ``[3, H, W]`` in [0, 1].

    They are read from where the packages are installed; nothing is fetched.

    Raises:
        DataError: an installed package lacks one.
    """
    import skimage
    from sklearn.datasets import load_sample_image

    folder = Path(skimage.__file__).parent / "data"
    arrays = []
    for name in _SKIMAGE:
        found = sorted(path for path in folder.glob(f"{name}.*") if path.suffix in (".png", ".jpg"))
        if not found:
            raise DataError(f"{folder} has no picture {name!r}; install scikit-image from a wheel, which brings it")
        with Image.open(found[0]) as image:
            arrays.append(np.asarray(image.convert("RGB")))
    arrays += [load_sample_image(name) for name in _SKLEARN]
    return [torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255 for array in arrays]


def moving_pictures(indices: Sequence[int], *, seed: int) -> Tensor:
    """Return clips ``[N, 17, 3, 32, 32]`` in [0, 1]: a window that wanders in a straight line over a photograph.

    Picture, window (64 to 192 pixels wide) and path of clip i depend on ``(seed, i)`` only.
    """
    photographs = pictures()
    clips = []
    for index in indices:
        source = generator(seed, "moving pictures", 0, index)
        photograph = photographs[int(torch.randint(len(photographs), (), generator=source))]
        window = int(torch.randint(64, 193, (), generator=source))
        room = torch.tensor(photograph.shape[1:]) - window
        first, last = (torch.rand(2, 2, generator=source) * room).unbind()
        # At most half a window on the way, as far as a fast digit goes.
        last = first + (last - first).clamp(-window / 2, window / 2)
        corners = [(first + (last - first) * k / (NUM_FRAMES - 1)).round().int().tolist() for k in range(NUM_FRAMES)]
        crops = torch.stack([photograph[:, top : top + window, left : left + window] for top, left in corners])
        clips.append(functional.interpolate(crops, (SIZE, SIZE), mode="bilinear", antialias=True).clamp(0, 1))
    return torch.stack(clips)
