import subprocess
import sys


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_torchvision_imports_and_what_leans_on_it_too():
    code = "import latent_rewards.training, torchvision; from diffusers.training_utils import EMAModel; print('fine')"
    assert run(code).endswith("fine")


def test_a_healthy_or_absent_torchvision_is_left_alone(tmp_path):
    guard = "from latent_rewards.training.torchvision_guard import mend_torchvision as mend\n"
    package = "import latent_rewards.training, sys\n" + guard + "print(mend())"
    assert run(package).endswith("False")  # imported already
    healthy = (
        "import sys, types\n"
        "import latent_rewards.training\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'torchvision']: del sys.modules[name]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n" + guard + "print(mend(), sys.modules['torchvision'].mark)"
    )
    (tmp_path / "torchvision.py").write_text("mark = 'healthy'")
    assert run(healthy).endswith("False healthy")


def test_another_failure_is_not_hidden(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('something else')")
    code = (
        "import sys, latent_rewards.training\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'torchvision']: del sys.modules[name]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from latent_rewards.training.torchvision_guard import mend_torchvision\n"
        "try: mend_torchvision()\n"
        "except RuntimeError as error: print('raised', error)\n"
    )
    assert run(code).endswith("raised something else")
