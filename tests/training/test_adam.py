"""Adam against torch's own."""

import torch

from tunesmith.training.adam import Adam


def test_the_weights_are_those_of_torchs_adamw_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(1000, generator=generator)
    theirs = torch.nn.Parameter(ours.clone())
    adam, adamw = Adam(ours), torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0, fused=True)
    for step in range(5):
        gradient = theirs.grad = torch.randn(1000, generator=generator)
        rate = adamw.param_groups[0]["lr"] = 0.01 / (step + 1)
        adamw.step()
        adam.step(gradient, rate)
        assert torch.equal(ours, theirs)
    assert {name: value.tolist() for name, value in adam.state.items()} == {
        name: value.tolist() for name, value in adamw.state[theirs].items()
    }
