"""The direction of imports, sizes, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "latent_rewards": ("distillation", "recipes", "benchmarks"),
    "distillation": ("recipes", "benchmarks"),
}
SOURCES = [
    p for package in ("latent_rewards", "distillation", "recipes", "benchmarks") for p in (ROOT / package).rglob("*.py")
]
BANNED_WORDS = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "process"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{path}: relative import")


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_point_down(package):
    for path in (ROOT / package).rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in FORBIDDEN[package], f"{path.name} imports {name}"
            if package == "distillation" and name.split(".")[0] == "latent_rewards":
                assert name.startswith("latent_rewards.training"), f"{path.name} imports {name}"


def test_sizes_and_names():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert len(path.read_text().splitlines()) <= 400, f"{path} is too long"
        assert not BANNED_WORDS & set(path.stem.split("_")), path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert not BANNED_WORDS & set(node.name.lower().split("_")), f"{path}: {node.name}"
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None
                start = node.body[0].end_lineno if documented else node.lineno
                assert node.end_lineno - start <= 60, f"{path}: {node.name} is too long"


def test_no_pickle_and_no_eval():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec", "pickle.load", "joblib.load"), path
                assert not any(k.arg == "trust_remote_code" for k in node.keywords), path


@pytest.mark.parametrize("module", ["latent_rewards", "distillation", "latent_rewards.cli", "distillation.cli"])
def test_importing_a_package_or_its_commands_is_light(module):
    code = f"import sys, {module}; sys.exit(int('torch' in sys.modules or 'diffusers' in sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("package", ["latent_rewards", "distillation"])
def test_public_names_exist(package):
    code = f"import {package} as p; [getattr(p, name) for name in p.__all__]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def modules(package, under):
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files]
    return [name for name in names if name.startswith(under)]


@pytest.mark.parametrize(
    ("kept", "imported_names"),
    [
        (["latent_rewards"], modules("latent_rewards", "latent_rewards")),
        (["distillation", "latent_rewards/training"], modules("distillation", "distillation")),
    ],
)
def test_each_package_imports_with_the_other_removed(tmp_path, kept, imported_names):
    for folder in kept:
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    code = (
        "import sys, importlib\n"
        f"sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
        # An editable install finds the packages by a hook of its own.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"for name in {imported_names!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
