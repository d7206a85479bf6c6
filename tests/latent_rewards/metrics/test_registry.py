"""Names, close names, options, duplicates, dotted paths and plugins."""

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, packages_distributions
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latent_rewards.contracts import ConfigError, DataError, DuplicateMetricError, MetricError, UnknownMetricError
from latent_rewards.metrics import create_metric, list_metrics, plugins, register_metric, registry
from latent_rewards.metrics.metric import EXTRAS
from latent_rewards.metrics.registry import metric_info
from latent_rewards.metrics.weights import VARIABLE, WeightsFile


def zeros(videos: Tensor) -> Tensor:
    return torch.zeros(len(videos))


def test_a_function_is_registered_and_returned_unchanged(videos: Tensor) -> None:
    @register_metric("test.brightness", version="3", value_range=(0, 1), needs_prompt=True)
    def brightness(videos: Tensor, *, prompts: list[str], scale: float = 1.0) -> Tensor:
        """Mean of everything.

        More.
        """
        return videos.flatten(1).mean(dim=1) * scale

    metric = create_metric("test.brightness", scale=0.5)
    torch.testing.assert_close(metric(videos, ["a"] * 4), brightness(videos, prompts=[], scale=0.5))
    assert (metric.version, metric.value_range, metric.options) == ("3", (0.0, 1.0), {"scale": 0.5})
    assert metric.description == "Mean of everything."
    assert metric.fingerprint != create_metric("test.brightness").fingerprint
    assert create_metric("test.brightness").fingerprint == create_metric("test.brightness", scale=1.0).fingerprint


def test_a_class_and_a_factory_take_options(videos: Tensor) -> None:
    @register_metric("test.constant", version="1")
    class Constant:
        def __init__(self, value: float) -> None:
            self.value = value

        def __call__(self, videos: Tensor) -> Tensor:
            return torch.full((len(videos),), self.value)

    register_metric("test.factory", version="1")(lambda value=2.0: Constant(value))
    assert create_metric("test.constant", value=0.25)(videos).tolist() == [0.25] * 4
    assert create_metric("test.factory")(videos).tolist() == [2.0] * 4
    with pytest.raises(ConfigError, match="requires the option.*value"):
        create_metric("test.constant")


def test_an_unknown_name_lists_close_ones_and_case_matters() -> None:
    with pytest.raises(UnknownMetricError, match="unknown metric 'motion.dynamic_degre'.*'motion.dynamic_degree'"):
        create_metric("motion.dynamic_degre")
    with pytest.raises(UnknownMetricError, match="Motion"):
        create_metric("Motion.dynamic_degree")
    register_metric("Test.Upper", version="1")(zeros)
    assert create_metric("Test.Upper").name == "Test.Upper"
    with pytest.raises(UnknownMetricError, match="'Test.Upper'"):
        create_metric("test.upper")
    assert list_metrics("Test.*") == ["Test.Upper"]
    assert list_metrics("test.*") == []


def test_a_duplicate_is_an_error_unless_it_overrides(videos: Tensor) -> None:
    register_metric("test.twice", version="1")(zeros)
    with pytest.raises(DuplicateMetricError, match="'test.twice' is registered already, by .*:zeros"):
        register_metric("test.twice", version="2")(zeros)
    register_metric("test.twice", version="2", override=True)(zeros)
    assert create_metric("test.twice").version == "2"


@pytest.mark.parametrize("name", ["", "a b", "pkg:attr", ".a", "a..b", 3])
def test_a_malformed_name_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="name is letters"):
        register_metric(name, version="1")


def test_unknown_options_are_refused_with_the_nearest(videos: Tensor) -> None:
    with pytest.raises(ConfigError, match="'compression.jpeg_size'.*'qualty'.*'quality'"):
        create_metric("compression.jpeg_size", qualty=3)
    with pytest.raises(ConfigError, match="It takes none"):
        create_metric("quality.sharpness", sigma=1)
    with pytest.raises(ConfigError, match="1 to 100; got 0"):
        create_metric("compression.jpeg_size", quality=0)
    made = create_metric(zeros)
    assert create_metric(made) is made
    with pytest.raises(ConfigError, match="made already"):
        create_metric(made, size=1)


def test_a_signature_that_cannot_keep_its_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs_prompt"):
        register_metric("test.deaf", version="1", needs_prompt=True)(zeros)
    with pytest.raises(ConfigError, match="needs_prompt=True"):
        register_metric("test.greedy", version="1")(lambda videos, *, prompts: zeros(videos))
    with pytest.raises(ConfigError, match="fps"):
        register_metric("test.timeless", version="1", needs_fps=True)(zeros)


def test_a_constructor_that_raises_names_the_metric() -> None:
    @register_metric("test.fragile", version="1")
    class Fragile:
        def __init__(self) -> None:
            raise FileNotFoundError("weights.safetensors")

        def __call__(self, videos: Tensor) -> Tensor: ...

    with pytest.raises(MetricError, match="'test.fragile' could not be made: FileNotFoundError: weights"):
        create_metric("test.fragile")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "metrics_of_a_user.py").write_text(
        "import torch\n"
        "from latent_rewards.metrics import register_metric\n"
        "def plain(videos, *, prompts, scale=1.0):\n"
        "    return videos.flatten(1).mean(dim=1) * scale\n"
        "@register_metric('user.named', version='7', value_range=(0, 1))\n"
        "def named(videos):\n"
        "    return videos.flatten(1).mean(dim=1)\n"
        "size = 3\n"
    )
    (tmp_path / "metrics_that_fail.py").write_text("raise OSError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "metrics_of_a_user", raising=False)
    return "metrics_of_a_user"


def test_a_dotted_path_reaches_what_nobody_registered(module: str, videos: Tensor) -> None:
    metric = create_metric(f"{module}:plain", scale=0.5)
    assert metric.name == f"{module}:plain"
    assert metric.needs_prompt
    torch.testing.assert_close(metric(videos, ["a"] * 4), videos.flatten(1).mean(dim=1) / 2)
    named = create_metric(f"{module}:named")
    assert (named.name, named.version) == ("user.named", "7")


def test_a_dotted_path_that_leads_nowhere_says_where_it_ends(module: str) -> None:
    with pytest.raises(UnknownMetricError, match="'plaid'.*'plain'"):
        create_metric(f"{module}:plaid")
    with pytest.raises(UnknownMetricError, match="no module 'no_such_module_here'"):
        create_metric("no_such_module_here:score")
    with pytest.raises(UnknownMetricError, match="is a int"):
        create_metric(f"{module}:size")
    with pytest.raises(MetricError, match="'metrics_that_fail' failed: no licence"):
        create_metric("metrics_that_fail:score")


def test_the_fingerprint_of_a_plain_function_follows_its_source() -> None:
    def one(videos: Tensor) -> Tensor:
        return torch.ones(len(videos))

    first = create_metric(one)

    def one(videos: Tensor) -> Tensor:
        return torch.ones(len(videos)) * 2

    assert first.name == create_metric(one).name
    assert first.fingerprint != create_metric(one).fingerprint


def test_plugins_are_listed_and_loaded_when_asked_for(
    module: str, monkeypatch: pytest.MonkeyPatch, videos: Tensor
) -> None:
    group = plugins.ENTRY_POINT_GROUP
    points = (
        EntryPoint("plugin.plain", f"{module}:plain", group),
        EntryPoint("anything", module, group),
        EntryPoint("plugin.broken", "metrics_that_fail:score", group),
        EntryPoint("whole_module_broken", "metrics_that_fail", group),
    )
    monkeypatch.setattr(plugins, "plugins", lambda: points)
    plugins.load_plugin_modules.cache_clear()
    assert create_metric("plugin.plain").name == "plugin.plain"
    with pytest.warns(UserWarning, match="whole_module_broken.*no licence"):
        assert set(list_metrics("*")) >= {"plugin.plain", "plugin.broken", "user.named"}
    assert create_metric("user.named").version == "7"
    with pytest.raises(MetricError, match="'plugin.broken'.*no licence"):
        create_metric("plugin.broken")
    with pytest.warns(UserWarning, match="'plugin.broken' is left out.*no licence"):
        assert list_metrics("plugin.*", available=True) == ["plugin.plain"]
    assert "| `plugin.broken` | – | – | – | – | – | metric 'plugin.broken'" in registry.metric_table("plugin.*")
    plugins.load_plugin_modules.cache_clear()


def test_listing_the_built_in_metrics_imports_no_heavy_library() -> None:
    code = (
        "import sys, latent_rewards.metrics as m; names = m.list_metrics(); "
        "assert {'motion.dynamic_degree', 'quality.sharpness', 'compression.jpeg_size'} <= set(names), names; "
        "assert not {'cv2', 'av'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_the_readme_shows_the_registry():
    readme = Path(__file__).parents[3] / "README.md"
    for pattern in ("clip.*", "compression.*", "motion.*", "preference.*", "quality.*", "vbench.*"):
        for row in registry.metric_table(pattern).splitlines():
            assert row in readme.read_text(encoding="utf-8")


HEAD = WeightsFile("head.safetensors", "its authors' page", 3)


def test_what_is_available_has_its_modules_and_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_metric("test.here", version="1", requires=("torch", "json"))(zeros)
    register_metric("test.module_missing", version="1", requires=("torch", "no_such_module_here"))(lambda v: zeros(v))
    register_metric("test.weighted", version="1", weights=(HEAD,))(lambda v: zeros(v))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert list_metrics("test.*") == ["test.here", "test.module_missing", "test.weighted"]
    assert list_metrics("test.*", available=True) == ["test.here"]
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (tmp_path / HEAD.name).write_bytes(b"")
    assert list_metrics("test.*", available=True) == ["test.here", "test.weighted"]
    monkeypatch.setitem(sys.modules, "json", None)
    assert list_metrics("test.*", available=True) == ["test.weighted"]


def test_a_missing_module_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        MetricError, match=r"'motion.smoothness' requires cv2, .*: pip install 'latent-rewards\[metrics\]'"
    ):
        create_metric("motion.smoothness")
    register_metric("test.foreign", version="1", requires=("no_such_module_here",), install="pip install foreign")(
        zeros
    )
    with pytest.raises(MetricError, match="requires no_such_module_here, not installed here: pip install foreign"):
        create_metric("test.foreign")


def test_the_install_command_names_an_extra_that_brings_the_module() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for module, extra in EXTRAS.items():
        brought = {entry.partition(">")[0] for entry in project["optional-dependencies"][extra]}
        assert set(packages_distributions()[module]) & brought, module
    info = metric_info("compression.h264_size")
    assert (info.requires, info.install) == (("av",), "pip install 'latent-rewards[metrics]'")
    assert metric_info("quality.sharpness").install == ""


def test_a_metric_describes_itself_without_its_weights_and_is_in_the_table() -> None:
    @register_metric(
        "test.heavy", version="2", value_range=(0, 9), needs_prompt=True, weights=(HEAD,), cheats=("grey",)
    )
    class Heavy:
        """Beauty of a clip."""

        def __init__(self, weights: str | None = None) -> None:
            HEAD.read(weights)

        def __call__(self, videos: Tensor, *, prompts: list[str]) -> Tensor: ...

    info = metric_info("test.heavy")
    assert (info.weights, info.cheats, info.version) == (("head.safetensors",), ("grey",), "2")
    row = "| `test.heavy` | 0 to 9 | higher | yes | `head.safetensors` | grey | Beauty of a clip |\n"
    assert registry.metric_table("test.*").endswith(row)
    with pytest.raises(DataError, match="head.safetensors does not exist"):
        create_metric("test.heavy", weights="/nowhere/head.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cheats": ("stil",)}, "'stil'.*Did you mean 'still'"),
        ({"cheats": "still"}, "cheats must be a tuple"),
        ({"requires": "cv2"}, "requires must be a tuple"),
        ({"requires": (3,)}, "requires must be a tuple"),
    ],
)
def test_malformed_metadata_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_metric("test.malformed", version="1", **fields)
