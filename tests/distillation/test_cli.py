"""`latent-distill`: its commands explain themselves."""

from __future__ import annotations

import pytest

from distillation.cli import main


@pytest.mark.parametrize("command", ["run", "encode", "sample", "info"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"latent-distill {command}" in (shown := capsys.readouterr().out) and len(shown) > 500
