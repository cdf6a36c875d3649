"""Steps of several modes in turn on one model, as the benchmarks take them."""

import pytest
import torch
from torch import nn

from welore.bench import Steps
from welore.lowrank import LowRankLinear
from welore.models import components, flops_per_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_take_turns_on_one_model_and_leave_no_gradient_behind(compressed, configured, dtype):
    model = compressed.to(dtype)
    steps = {name: Steps(model, configured(f"mode={name}").mode, None, 2, 16) for name in ("welore", "full")}
    n_lrc = next(module.weight for module in components(model).values() if isinstance(module, nn.Linear))
    for name in ("welore", "full", "welore"):
        before, dense = [parameter.clone() for parameter in steps[name].parameters], n_lrc.clone()
        assert len(steps[name].turn(1)) == 1
        assert any(not torch.equal(*pair) for pair in zip(before, steps[name].parameters, strict=True))
        assert torch.equal(dense, n_lrc) == (name == "welore")
        masters = [master for _, master in steps[name].optimizer.pairs]
        assert all(parameter.grad is None for parameter in (*model.parameters(), *masters))


def test_the_flops_of_a_token_are_those_of_what_it_meets(compressed, configured):
    length = 16
    found = {n: Steps(compressed, configured(f"mode={n}").mode, None, 2, length).flops() for n in ("welore", "full")}
    # The last token of a sequence is not scored; the loss forms the gradient of the head's inputs as it goes.
    head = 2 * compressed.get_output_embeddings().weight.numel()
    forward = flops_per_token(compressed) - head + 2 * head * (length - 1) / length
    assert found["welore"]["forward"] == found["full"]["forward"] == forward
    dense = sum(m.weight.numel() for m in components(compressed).values() if not isinstance(m, LowRankLinear))
    assert found["full"]["backward"] - found["welore"]["backward"] == 2 * dense
    assert all(parameter.grad is None for parameter in compressed.parameters())
