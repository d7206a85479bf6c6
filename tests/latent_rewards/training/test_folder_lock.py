import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from latent_rewards.training.folder_lock import FolderLockedError, exclusive
from latent_rewards.training.ranks import ALONE, Ranks

HOLD = """
import sys, time
from latent_rewards.training.folder_lock import exclusive
from latent_rewards.training.ranks import ALONE
with exclusive(sys.argv[1], ALONE, "training in"):
    print("held", flush=True)
    time.sleep(600)
"""


def is_free(folder):
    try:
        with exclusive(folder, ALONE, "training in"):
            return True
    except FolderLockedError:
        return False


def test_the_lock_goes_with_the_block_and_with_an_error(tmp_path):
    with exclusive(tmp_path / "new", ALONE, "training in"):
        assert not is_free(tmp_path / "new") and is_free(tmp_path)
        with exclusive(tmp_path / "new", Ranks(1, 2), "training in"):  # the first process holds it for all
            pass
        with pytest.raises(LookupError, match="another run is collecting into .*new; wait"):
            with exclusive(tmp_path / "new", ALONE, "collecting into", LookupError):
                pass
    with pytest.raises(KeyboardInterrupt), exclusive(tmp_path / "new", ALONE, "training in"):
        raise KeyboardInterrupt
    assert is_free(tmp_path / "new")


def test_the_lock_goes_with_a_killed_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert not is_free(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert is_free(tmp_path)


def test_the_lock_does_not_stay_with_a_forked_child(tmp_path):
    with exclusive(tmp_path, ALONE, "training in"):
        if (pid := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
    assert is_free(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available"):
        assert is_free(tmp_path)
