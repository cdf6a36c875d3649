import json

import pytest
import torch
from conftest import FAMILIES
from torch import nn

from welore.compress import Coordinates, factorize, read_spectra, weight_digests
from welore.errors import Refused
from welore.lowrank import LowRankLinear
from welore.models import components, count_bytes, count_parameters, decoder_layers, flops_per_token
from welore.ranks import tally
from welore.svd import Plain

LLAMA = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
OPT = {f"self_attn.{name}": (32, 32) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
PHI = {name: shape for name, shape in LLAMA.items() if name[-6:] in ("q_proj", "k_proj", "v_proj")}
MLP = {"fc1": (48, 32), "fc2": (32, 48)}
# The shapes of one layer (k and v are narrower under grouped queries), and which of its weights have a bias.
EXPECTED = {
    "llama": (LLAMA, set()),
    "mistral": (LLAMA, set()),
    "qwen2": (LLAMA, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
    "qwen3": (LLAMA, set()),
    "gemma": (LLAMA, set()),
    "opt": (OPT | MLP, set(OPT | MLP)),
    "phi": (PHI | {"self_attn.dense": (32, 32)} | {f"mlp.{name}": shape for name, shape in MLP.items()}, "all"),
}
IDS_BL = torch.arange(24).view(2, 12) * 5 % 67
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_the_compressible_weights_are_the_linear_layers_inside_the_decoder_layers(family, name):
    shapes, biased = EXPECTED[name]
    biased = set(shapes) if biased == "all" else biased
    model = family(name)
    layers = "model.decoder.layers" if name == "opt" else "model.layers"
    found = components(model)
    assert {k: tuple(m.weight.shape) for k, m in found.items()} == {
        f"{layers}.{index}.{k}": shape for index in range(2) for k, shape in shapes.items()
    }
    assert {k.split(".", layers.count(".") + 2)[-1] for k, m in found.items() if m.bias is not None} == biased
    assert model.get_output_embeddings() not in found.values()
    assert list(decoder_layers(model)) == [f"{layers}.0", f"{layers}.1"]


@every_family
def test_factoring_at_full_rank_leaves_the_logits_equal(family, cache, name):
    model = family(name)
    logits = model(IDS_BL).logits
    biases = {k: m.bias for k, m in components(model).items() if m.bias is not None}
    head, tied = model.get_output_embeddings().weight, name in ("opt", "gemma")
    plain = Coordinates(Plain("plain", "none"), weight_digests(model), cache)
    spectra = read_spectra(model, plain)
    factorize(model, tally({k: len(s.sigma_K) for k, s in spectra.items()}, spectra), plain)

    found = components(model)
    assert found.keys() == spectra.keys() and all(isinstance(m, LowRankLinear) for m in found.values())
    torch.testing.assert_close(model(IDS_BL).logits, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    assert all(torch.equal(found[k].A.bias, bias) for k, bias in biases.items())
    assert model.get_output_embeddings().weight is head
    assert (model.get_input_embeddings().weight is head) == tied


def test_a_model_without_linear_layers_is_refused_by_the_name_of_what_it_has(family):
    with pytest.raises(Refused, match="GPT2LMHeadModel hold no nn.Linear.*Conv1D"):
        components(family("gpt2"))


def test_a_low_rank_component_hides_the_linear_layers_inside_it(compressed):
    found = components(compressed)
    assert len(found) == 14 and not any(name.endswith((".A", ".B")) for name in found)
    assert {type(module) for module in found.values()} == {LowRankLinear, nn.Linear}


def test_parameters_and_bytes_count_tied_weights_once(family):
    model = family("gemma").bfloat16()
    expected = 67 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32
    assert count_parameters(model) == expected and count_bytes(model) == 2 * expected


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_token_costs_two_flops_for_each_number_stored_in_a_matrix_and_in_the_output(family, compress, name):
    """A tied output matrix multiplies as an untied one does."""
    model = family(name)
    stored = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert flops_per_token(model) == 2 * (stored + 67 * 32)
    plan = compress(model, dense="break_even")
    assert flops_per_token(model) == 2 * (round(plan.keep * stored) + 67 * 32)


def test_the_same_seed_gives_the_same_random_model_whatever_was_drawn_before(configured, pristine, tmp_path):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, _ = configured().model.load(tmp_path)
    other, _ = configured("model.init_seed=1").model.load(tmp_path)
    assert weight_digests(again) == weight_digests(pristine[0]) != weight_digests(other)
    assert torch.equal(torch.get_rng_state(), state)
    assert not again.training


def test_the_byte_tokenizer_gives_back_every_text(tokenizer):
    text = "Grüße, 世界!\n\ttabs  and   blanks \U0001f600"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert len(tokenizer) == 259


def test_a_saved_model_is_loaded_from_its_folder(configured, pristine, tmp_path):
    folder = tmp_path / "saved"
    for part in pristine:
        part.save_pretrained(folder)
    config = configured(f"model={folder}", "model.dtype=float32")
    assert config.model.name == "saved"
    model, tokenizer = config.model.load(tmp_path)
    assert weight_digests(model) == weight_digests(pristine[0])
    assert tokenizer.get_vocab() == pristine[1].get_vocab()
    before = config.model.identity()
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 77}))
    assert config.model.identity() != before
