import copy

import torch
from torch import nn

from latent_rewards.proxies.held import Held


def test_what_is_held_is_neither_state_nor_copied():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = Held(nn.Linear(2, 2))
            self.own = nn.Parameter(torch.zeros(1))

    holder = Holder()
    assert list(holder.state_dict()) == ["own"]
    copied = copy.deepcopy(holder)
    assert copied.held.value is holder.held.value
    assert copied.own is not holder.own
