import subprocess
import sys

import pytest

MEND = "from latent_rewards.training.torchvision_guard import mend_torchvision as mend\n"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_torchvision_imports_and_what_leans_on_it_too():
    code = MEND + "mend(); import torchvision; from diffusers.training_utils import EMAModel; print('fine', mend())"
    assert run(code).endswith("fine False")  # imported already


@pytest.mark.parametrize("module", ["latent_rewards.cli", "latent_rewards.lro.trainers", "distillation.trainer"])
def test_what_does_not_need_torchvision_does_not_import_it(module):
    assert run(f"import sys, {module}; print('torchvision' in sys.modules)") == "False"


def test_a_healthy_torchvision_is_left_alone(tmp_path):
    (tmp_path / "torchvision.py").write_text("mark = 'healthy'")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + MEND
    assert run(code + "print(mend(), sys.modules['torchvision'].mark)").endswith("False healthy")


def test_another_failure_is_not_hidden(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('something else')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + MEND
    code += "try: mend()\nexcept RuntimeError as error: print('raised', error)\n"
    assert run(code).endswith("raised something else")
