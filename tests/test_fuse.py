"""Joined products give what each weight gives alone, in no more memory."""

from copy import deepcopy

import pytest
import torch
from conftest import FAMILIES

from welore.errors import Refused
from welore.fuse import fuse, unfuse
from welore.lowrank import LowRankLinear
from welore.models import components, count_parameters
from welore.modes import select
from welore.ranks import Budget

IDS_BL = torch.arange(24).view(2, 12) * 11 % 67


def joints(model):
    """Every joint product once."""
    forwards = [vars(m)["forward"] for m in components(model).values() if "forward" in vars(m)]
    return list({id(f.func.__self__): f.func.__self__ for f in forwards}.values())


def stored(model):
    """Bytes behind all tensors that its layers multiply with, each storage once."""
    tensors = [*model.parameters(), *(joint.W_SN for joint in joints(model))]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def products(model, run):
    """How many matrix products a pass takes."""
    from torch.profiler import profile

    with profile() as profiler, torch.no_grad():
        run()
    return sum(event.count for event in profiler.key_averages() if event.key in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fused_model_gives_the_same_logits(family, compress, name, multiple):
    """Grouped queries, biases, groups that are partly dense, and every family's own way to call its weights."""
    model = family(name)
    plan = compress(model, Budget(err=0.3))
    assert 0 < len(plan.factored) < len(plan.ranks)
    with torch.no_grad():
        expected = model(input_ids=IDS_BL).logits
        fuse(model, multiple)
        torch.testing.assert_close(model(input_ids=IDS_BL).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(input_ids=IDS_BL[:, :5]).logits, expected[:, :5], rtol=1e-4, atol=1e-4)


def test_a_fused_model_writes_the_same_tokens(compressed):
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=258)
    mask = torch.ones_like(IDS_BL)
    expected = compressed.generate(IDS_BL, attention_mask=mask, **options)
    fuse(compressed)
    assert torch.equal(compressed.generate(IDS_BL, attention_mask=mask, **options), expected)


def test_queries_keys_and_values_take_one_product_and_gate_and_up_another(compressed, pristine):
    dense = deepcopy(pristine[0])
    with_each = products(dense, lambda: dense(input_ids=IDS_BL))
    fuse(dense)
    assert products(dense, lambda: dense(input_ids=IDS_BL)) == with_each - 2 * 3  # two layers, 7 products to 4
    lrc = [module for module in components(compressed).values() if isinstance(module, LowRankLinear)]
    fuse(compressed)
    found = products(compressed, lambda: compressed(input_ids=IDS_BL))
    assert found == with_each - 2 * 3 + len(lrc)


def test_nothing_is_stored_twice(compressed):
    numbers, before = count_parameters(compressed), {n: p.clone() for n, p in compressed.named_parameters()}
    fuse(compressed)
    assert stored(compressed) == 4 * numbers == 4 * count_parameters(compressed)
    assert all(torch.equal(p, before[n]) for n, p in compressed.named_parameters())
    fuse(compressed)
    assert stored(compressed) == 4 * numbers


def test_the_input_is_let_go_after_its_last_reader(compressed):
    fuse(compressed)
    compressed(input_ids=IDS_BL)
    assert joints(compressed) and all(joint._held is None for joint in joints(compressed))


def test_a_layer_that_is_called_with_another_input_multiplies_for_itself(compressed):
    fuse(compressed)
    attention = next(m for m in compressed.modules() if hasattr(m, "q_proj"))
    x, y = torch.randn(2, 1, 3, attention.q_proj.in_features)
    attention.q_proj(x)
    found = attention.k_proj(y)
    unfuse(compressed)
    torch.testing.assert_close(found, attention.k_proj(y))


def test_what_is_no_plain_product_keeps_its_own(model, compress, configured):
    compress(model)
    select(model, configured("mode=lora").mode)
    expected = model(input_ids=IDS_BL).logits
    fuse(model)
    torch.testing.assert_close(model(input_ids=IDS_BL).logits, expected)
    assert not any("forward" in vars(m) for m in components(model).values() if isinstance(m, LowRankLinear))


def test_a_multiple_of_nothing_is_refused(compressed):
    with pytest.raises(Refused, match="multiple=0 pads nothing"):
        fuse(compressed, 0)
