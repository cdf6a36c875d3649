import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from welore import evaluate
from welore.evaluate import autocast, causal_loss, first_not_finite, frozen_weights_in, perplexity
from welore.optim import AdamW


@pytest.fixture
def windows_BL():
    return torch.randint(0, 259, (7, 32))


def independent(model, windows_BL):
    """exp of the mean of the losses that the model itself computes, a window at a time (all are equally long)."""
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in windows_BL]
    return math.exp(sum(losses) / len(losses))


def test_a_loss_sees_every_step_of_an_output_matrix_that_trains(model, windows_BL):
    """Under autocast, where a frozen one is cast once for all."""
    loss = causal_loss(model)
    optimizer = AdamW([model.lm_head.weight], lr=0.1)
    losses = []
    for _ in range(3):
        with torch.no_grad(), autocast(windows_BL.device, "bfloat16"):
            losses.append(float(loss(windows_BL, windows_BL)[0]))
            fresh = float(causal_loss(model)(windows_BL, windows_BL)[0])
        assert losses[-1] == pytest.approx(fresh, rel=1e-6)
        total, scored = loss(windows_BL, windows_BL)
        (total / scored).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("together", [1, 64, 2048])
def test_perplexity_is_what_the_models_own_loss_gives(model, windows_BL, monkeypatch, together):
    monkeypatch.setattr(evaluate, "FORWARD_TOKENS", together)
    model.lm_head.weight.data.mul_(20)  # far from uniform
    score = perplexity(model, windows_BL)
    assert score.perplexity == pytest.approx(independent(model, windows_BL), rel=1e-5)
    assert abs(score.perplexity / 259 - 1) > 0.1
    assert (score.tokens, score.breaks_at) == (7 * 31, None)


def test_perplexity_of_a_compressed_model_is_what_its_own_loss_gives(compressed, windows_BL):
    assert perplexity(compressed, windows_BL).perplexity == pytest.approx(independent(compressed, windows_BL), 1e-5)


def test_constant_logits_have_the_perplexity_of_the_vocabulary_size(model, windows_BL):
    model.lm_head.weight.data.zero_()
    assert perplexity(model, windows_BL).perplexity == pytest.approx(259, rel=1e-6)


def test_a_model_that_knows_the_next_token_has_perplexity_1(model):
    """Every window is one token again and again, and the output is made to say that token."""
    windows_BL = torch.full((2, 16), 7)
    with torch.no_grad():
        hidden = model.model(windows_BL).last_hidden_state[0, 0]
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 50 * hidden / hidden.norm() ** 2
    assert perplexity(model, windows_BL).perplexity == pytest.approx(1, abs=1e-6)


def test_a_model_that_caps_its_logits_is_scored_with_the_cap(windows_BL):
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    expected = independent(model, windows_BL)
    model.config.final_logit_softcapping = None
    assert independent(model, windows_BL) > 2 * expected
    model.config.final_logit_softcapping = 2.0
    assert perplexity(model, windows_BL).perplexity == pytest.approx(expected, rel=1e-5)


def test_autocast_computes_in_bfloat16_close_to_float32(model, windows_BL):
    exact, rounded = perplexity(model, windows_BL), perplexity(model, windows_BL, "bfloat16")
    assert rounded.perplexity != exact.perplexity
    assert rounded.perplexity == pytest.approx(exact.perplexity, rel=1e-2)


def test_a_loss_that_is_not_finite_is_reported_with_the_layer_where_it_starts(model, windows_BL):
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    score = perplexity(model, windows_BL)
    assert math.isnan(score.perplexity) and score.breaks_at == "model.layers.1"


def test_where_every_layer_is_finite_the_output_is_named(model, windows_BL):
    model.lm_head.weight.data[3, 3] = float("nan")
    assert perplexity(model, windows_BL).breaks_at == "lm_head"


def test_looking_for_the_broken_layer_leaves_no_hook_behind(model, windows_BL):
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = float("inf")
    assert first_not_finite(model, windows_BL) == "model.layers.0"
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_weights_cast_once_give_the_same_gradients_to_the_bit(model):
    model.requires_grad_(False)
    trained = [p for n, p in model.named_parameters() if "q_proj" in n]
    for parameter in trained:
        parameter.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids_BL = torch.arange(48).view(2, 24)

    def gradients() -> list[torch.Tensor]:
        with autocast(torch.device("cpu"), "bfloat16"):
            total, _ = causal_loss(model)(ids_BL, ids_BL)
        return list(torch.autograd.grad(total, trained))

    plain = gradients()
    with frozen_weights_in(model, "bfloat16"):
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
        assert model.model.embed_tokens.weight.dtype == torch.float32
        cast = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
