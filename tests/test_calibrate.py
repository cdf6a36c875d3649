import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from welore.batches import calibration_windows
from welore.cache import Cache
from welore.calibrate import Statistics, Stream, calibrate, gather
from welore.compress import weight_digests
from welore.errors import Refused
from welore.evaluate import causal_loss
from welore.measure import GIB, peak_memory
from welore.models import components
from welore.moments import Needs

WINDOWS_BL = (torch.arange(144).view(6, 24) * 7 + 3) % 67
LEVELS = pytest.mark.parametrize("needs", [Needs.INPUTS, Needs.GRADIENTS, Needs.WEIGHT_GRADIENTS])


def reference(model, windows_BL):
    """Inputs and output gradients of every weight from ordinary autograd through the whole model, window by window."""
    seen = {name: ([], []) for name in components(model)}

    def hook(name):
        def hook(module, args, output):
            seen[name][0].append(args[0].detach().double().flatten(0, -2))
            output.register_hook(lambda g: seen[name][1].append(g.double().flatten(0, -2)))

        return hook

    handles = [module.register_forward_hook(hook(name)) for name, module in components(model).items()]
    for ids_BL in windows_BL.split(1):
        total = model(input_ids=ids_BL, labels=ids_BL).loss * (ids_BL.shape[1] - 1)
        total.backward()
    for handle in handles:
        handle.remove()
    return seen


def statistics(model, needs, folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    calibrate(model, WINDOWS_BL, needs, folder, **options)
    return Statistics(folder, needs, "test", 0.0, 0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_moments_are_those_of_autograd_through_the_whole_model(family, tmp_path, name):
    model = family(name)
    found = statistics(model, Needs.WEIGHT_GRADIENTS, tmp_path)
    for weight, (inputs, gradients) in reference(model, WINDOWS_BL).items():
        x_TN, g_TM = torch.cat(inputs), torch.cat(gradients)
        moments = found.of(weight)
        assert moments.tokens == len(x_TN) == WINDOWS_BL.numel()
        close(moments.inputs_NN, x_TN.T @ x_TN / len(x_TN))
        close(moments.absolute_N, x_TN.abs().mean(0))
        close(moments.gradients_MM, g_TM.T @ g_TM / len(g_TM))
        close(moments.gradient_MN, g_TM.T @ x_TN / len(x_TN))
        squares = [(g.T @ x).square().mean(0) for g, x in zip(gradients, inputs, strict=True)]
        close(moments.fisher_N, torch.stack(squares).mean(0))


def close(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * scale)


@LEVELS
def test_every_level_holds_those_below_it_and_nothing_above(model, tmp_path, needs):
    moments = statistics(model, needs, tmp_path).of("model.layers.1.mlp.down_proj")
    assert moments.inputs_NN is not None and moments.absolute_N is not None
    assert (moments.gradients_MM is not None) == (needs >= Needs.GRADIENTS)
    assert (moments.fisher_N is not None) == (moments.gradient_MN is not None) == (needs >= Needs.WEIGHT_GRADIENTS)


def test_weights_that_share_an_input_share_its_statistics_on_disk(model, tmp_path):
    index = statistics(model, Needs.INPUTS, tmp_path).index
    owner = {name: entry["tensors"]["inputs_NN"] for name, entry in index.items()}
    layer = "model.layers.0"
    assert len({owner[f"{layer}.self_attn.{w}_proj"] for w in "qkv"}) == 1
    assert owner[f"{layer}.mlp.gate_proj"] == owner[f"{layer}.mlp.up_proj"]
    assert len({owner[name] for name in owner if name.startswith(layer)}) == 4


def test_calibration_leaves_the_model_as_it_was(model, tmp_path):
    before, trains = weight_digests(model), {n: p.requires_grad for n, p in model.named_parameters()}
    logits = model(WINDOWS_BL).logits
    statistics(model, Needs.GRADIENTS, tmp_path)
    assert weight_digests(model) == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
    assert torch.equal(model(WINDOWS_BL).logits, logits)


def test_a_stream_through_all_layers_ends_in_the_loss_of_the_model(model):
    stream = Stream(model, WINDOWS_BL, None)
    hidden = stream.first()
    for number in range(len(stream.layers)):
        hidden = [stream.through(number, hidden_BLD) for hidden_BLD in hidden]
    total = sum(stream.loss(ids_BL, h)[0] for ids_BL, h in zip(stream.batches, hidden, strict=True))
    torch.testing.assert_close(total, causal_loss(model)(WINDOWS_BL, WINDOWS_BL)[0])


def test_sampled_labels_follow_the_model_and_are_seeded(model, tmp_path):
    one, two = (statistics(model, Needs.GRADIENTS, tmp_path / f"{s}", labels="sampled", seed=s) for s in (0, 1))
    again = statistics(model, Needs.GRADIENTS, tmp_path / "c", labels="sampled", seed=0)
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(one.of(name).gradients_MM, again.of(name).gradients_MM)
    assert not torch.equal(one.of(name).gradients_MM, two.of(name).gradients_MM)


@pytest.fixture
def calibration(configured, text_file):
    return configured(
        "svd=kfac", f"calibration.path={text_file}", "calibration.tokens=512", "calibration.window=32"
    ).calibration


def test_statistics_are_gathered_once_for_all_levels_below(model, tokenizer, calibration, tmp_path, monkeypatch):
    cache, weights = Cache(tmp_path), weight_digests(model)
    windows_BL = calibration_windows(calibration, tokenizer, cache)
    assert windows_BL.shape == (16, 32)
    gather(model, weights, windows_BL, Needs.GRADIENTS, calibration, None, cache)
    monkeypatch.setattr("welore.calibrate.calibrate", lambda *_: pytest.fail("gathered again"))
    lower = gather(model, weights, windows_BL, Needs.INPUTS, calibration, None, cache)
    assert lower.of("model.layers.0.self_attn.q_proj").gradients_MM is None
    with pytest.raises(pytest.fail.Exception):
        gather(model, weights, windows_BL[:8], Needs.INPUTS, calibration, None, cache)
    assert not list(Path(tmp_path).rglob("*.part"))


def test_statistics_that_two_need_at_once_are_gathered_once(model, tokenizer, calibration, tmp_path, monkeypatch):
    cache, weights, begun, times = Cache(tmp_path), weight_digests(model), threading.Event(), []
    windows_BL = calibration_windows(calibration, tokenizer, cache)

    def slowly(*args):
        times.append(1)
        begun.set()
        time.sleep(0.3)
        calibrate(*args)

    def gathered():
        return gather(model, weights, windows_BL, Needs.INPUTS, calibration, None, cache).folder

    monkeypatch.setattr("welore.calibrate.calibrate", slowly)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(gathered)
        assert begun.wait(10)
        assert gathered() == first.result() and len(times) == 1


def test_another_seed_calibrates_on_other_documents(tokenizer, calibration, cache):
    first = calibration_windows(calibration, tokenizer, cache)
    calibration.seed = 1
    assert not torch.equal(calibration_windows(calibration, tokenizer, cache), first)


def test_too_little_calibration_text_is_refused_with_what_there_is(tokenizer, calibration, cache):
    calibration.tokens = 10**6
    with pytest.raises(Refused, match=r"calibration\.tokens=\d+ or less"):
        calibration_windows(calibration, tokenizer, cache)


def test_statistics_that_are_not_finite_are_refused_by_name(model, tmp_path):
    model.model.layers[1].input_layernorm.weight.data.fill_(float("nan"))
    found = statistics(model, Needs.INPUTS, tmp_path)
    found.of("model.layers.0.self_attn.q_proj")
    with pytest.raises(Refused, match=r"layers\.1\.self_attn\.q_proj \(inputs\)"):
        found.of("model.layers.1.self_attn.q_proj")


def test_statistics_under_autocast_are_summed_in_float32(model, tmp_path):
    """The sums of a pass in bfloat16 are those of its inputs, to the rounding of float32 and not of bfloat16."""
    seen: dict[str, list] = {name: [] for name in components(model)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach().double()))
        for name, module in components(model).items()
    ]
    found = statistics(model, Needs.INPUTS, tmp_path, dtype="bfloat16")
    for handle in handles:
        handle.remove()
    for name, inputs in seen.items():
        x_TN = inputs[-1].flatten(0, -2)  # of the one batch; the passes before it check and record the calls
        expected = x_TN.T @ x_TN / len(x_TN)
        moment = found.of(name).inputs_NN
        assert (moment.double() - expected).norm() < 1e-5 * expected.norm()
        assert torch.linalg.eigvalsh(moment.double()).min() > -1e-6 * float(moment.diagonal().mean())


@pytest.mark.slow
def test_calibration_holds_the_statistics_of_one_layer_at_a_time(tmp_path):
    """Beside the model: hidden states, the sums of one layer and their copy; never those of all layers."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=512, num_key_value_heads=8, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    windows_BL = torch.randint(0, 512, (8, 128))
    one_layer = 4 * (3 * 512**2 + 2048**2 + 4 * 512**2 + 2 * 2048**2 + 2 * 512**2)
    with peak_memory(torch.device("cpu")) as before:
        held = before.gib
    with peak_memory(torch.device("cpu")) as peak:
        calibrate(model, windows_BL, Needs.GRADIENTS, tmp_path)
        extra = (peak.gib - held) * GIB
    on_disk = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert on_disk == pytest.approx(12 * one_layer, rel=0.01)
    assert extra < 3 * one_layer + 100 * 2**20 < on_disk / 2  # sums, their copy, one product; what a layer runs in
