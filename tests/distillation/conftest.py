"""Tiny linear networks whose every quantity is known in closed form."""

from __future__ import annotations

import dataclasses
import itertools
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from distillation.denoiser import Denoiser, Prediction
from distillation.schedule import coefficients, expand


class AffineDenoiser(Denoiser):
    """x0 = (gain + slope t) x_t + shift, native x0; at t = 1 a one-step generator a z + b."""

    def __init__(self, schedule, gain=0.5, shift=0.0, slope=0.0):
        super().__init__()
        self.schedule = schedule
        self.gain = nn.Parameter(torch.tensor(float(gain), dtype=torch.float64))
        self.slope = nn.Parameter(torch.tensor(float(slope), dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(float(shift), dtype=torch.float64))
        self.times = []

    def forward(self, x_t, t, condition=None):
        self.times.append(float(t) if t.ndim == 0 else t)
        x0 = (self.gain + self.slope * expand(t, x_t)) * x_t + self.shift
        return Prediction(x_t, t, self.schedule, x0=x0)


class LearnableGaussian(Denoiser):
    """The exact denoiser of N(mean, std^2), with both learnable; a condition [B] moves the mean."""

    def __init__(self, schedule, mean=0.0, std=1.0, reach=0.0):
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.tensor(float(mean), dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(float(std), dtype=torch.float64).log())
        self.reach = reach

    def forward(self, x_t, t, condition=None):
        alpha, sigma = coefficients(self.schedule, t, x_t)
        mean = self.mean
        if condition is not None:
            mean = mean + self.reach * condition.values.to(x_t.dtype).view(-1, 1, 1, 1, 1)
        variance = (2 * self.log_std).exp()
        whitened = (x_t - alpha * mean) / (alpha**2 * variance + sigma**2)
        p, q = self.schedule.velocity_coefficients(alpha, sigma)
        return Prediction(x_t, t, self.schedule, v=p * mean + (p * alpha * variance + q * sigma) * whitened)


class IdealMap(Denoiser):
    """x0 such that the consistency function is m + (s / sqrt v_t)(x_t - alpha m), with m and s learnable.

    As a student every call of its every chain puts out N(m, s^2).
    """

    def __init__(self, schedule, mean=0.0, std=1.0):
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(torch.tensor(float(mean), dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(float(std), dtype=torch.float64))

    def forward(self, x_t, t, condition=None):
        alpha, sigma = coefficients(self.schedule, t, x_t)
        scale = self.std / torch.sqrt(alpha**2 * self.std**2 + sigma**2)
        ideal = self.mean + scale * (x_t - alpha * self.mean)
        c_skip, c_out = (expand(c, x_t) for c in self.schedule.boundary(t))
        return Prediction(x_t, t, self.schedule, x0=(ideal - c_skip * x_t) / c_out.clamp(min=1e-30))


class ExactStep(Denoiser):
    """The velocity whose single step from t to s(t) lands on the exact probability-flow map of N(mean, std^2)."""

    def __init__(self, schedule, mean, std, s):
        super().__init__()
        self.schedule, self.mean, self.std, self.s = schedule, mean, std, s

    def forward(self, x_t, t, condition=None):
        (alpha, sigma), (alpha_s, sigma_s) = (coefficients(self.schedule, time, x_t) for time in (t, self.s(t)))
        spread_t, spread_s = ((a**2 * self.std**2 + b**2).sqrt() for a, b in ((alpha, sigma), (alpha_s, sigma_s)))
        x_s = alpha_s * self.mean + spread_s / spread_t * (x_t - alpha * self.mean)
        x0 = (sigma * x_s - sigma_s * x_t) / (alpha_s * sigma - alpha * sigma_s)
        return Prediction(x_t, t, self.schedule, x0=x0)


class Table(Denoiser):
    """f(x, t_k) = gain_k x + shift_k on the grid k / n; free at every level but data."""

    def __init__(self, schedule, n):
        super().__init__()
        self.schedule, self.n = schedule, n
        self.gains = nn.Parameter(torch.full((n + 1,), 0.1, dtype=torch.float64))
        self.shifts = nn.Parameter(torch.zeros(n + 1, dtype=torch.float64))

    def forward(self, x_t, t, condition=None):
        k = (t * self.n).round().long()
        x0 = expand(self.gains[k], x_t) * x_t + expand(self.shifts[k], x_t)
        return Prediction(x_t, t, self.schedule, x0=x0)


@dataclasses.dataclass
class Numbers:
    """A condition of one number per sample."""

    values: torch.Tensor

    def __len__(self):
        return len(self.values)

    def index_select(self, index):
        return Numbers(self.values[index])

    def to(self, device):
        return Numbers(self.values.to(device))


@pytest.fixture(scope="session")
def wan_pipeline(tmp_path_factory):
    """The folder of the tiny Wan pipeline that the families' tests build: 5 frames of 16 x 16."""
    from distillation.families import import_diffusers

    components = runpy.run_path(str(Path(__file__).parent / "families" / "conftest.py"))["build_components"]()
    folder = tmp_path_factory.mktemp("tiny_wan") / "pipeline"
    import_diffusers().WanPipeline(**components).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(wan_pipeline):
    """The tiny pipeline as a teacher."""
    from distillation.families import load_teacher

    return load_teacher(wan_pipeline, num_frames=5, height=16, width=16)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory, tiny_teacher):
    """The folder of an untrained student of the tiny teacher."""
    from distillation.student import FewStepStudent

    teacher, folder = tiny_teacher, tmp_path_factory.mktemp("student") / "student"
    parts = {"encode": teacher.encode, "latent_shape": teacher.latent_shape, "exporter": teacher.exporter}
    FewStepStudent(teacher.denoiser, **parts).save_pretrained(folder)
    return folder


@pytest.fixture
def affine():
    return AffineDenoiser


@pytest.fixture
def learnable_gaussian():
    return LearnableGaussian


@pytest.fixture
def ideal_map():
    return IdealMap


@pytest.fixture
def exact_step():
    return ExactStep


@pytest.fixture
def table():
    return Table


@pytest.fixture
def numbers():
    return Numbers


@pytest.fixture
def signs():
    """All four signs of (z, eps), each [4, 1, 1, 1, 1]: exact for expectations of degree two in the normals."""
    table = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    return table[:, 0].view(4, 1, 1, 1, 1), table[:, 1].view(4, 1, 1, 1, 1)


@pytest.fixture
def randn():
    """Seeded float64 normals of a shape."""

    def draw(*shape, seed=0):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return draw


@pytest.fixture
def tiny_wan():
    """Builds a float64 Wan denoiser on latents [4, F, 4, 4] with 24 channels a token, always with the same weights."""
    from distillation.families import import_diffusers
    from distillation.families.wan import WanDenoiser
    from distillation.schedule import RectifiedFlow

    def build(num_layers=2):
        torch.manual_seed(0)
        transformer = import_diffusers().WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=16,
            num_layers=num_layers,
            rope_max_seq_len=16,
        )
        return WanDenoiser(transformer.double(), RectifiedFlow()).eval()

    return build
