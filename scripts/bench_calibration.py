"""Measure what statistics and decompositions of a large model take in time and memory, beside the bound on memory.

usage: python scripts/bench_calibration.py [--shapes 1b] [--tokens 2048] [--layers 1] [--out FILE.json]

The weights are random, in bfloat16, with the shapes of a LLaMA of 1B or 7B. All layers are calibrated, forward and
backward. The weights of the first `--layers` layers are decomposed in the coordinates of K-FAC; the seconds of all of
them are those of these, multiplied, which the output calls an estimate.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from welore.bench import at_least, exit_status
from welore.cache import Cache
from welore.calibrate import gather
from welore.compress import Coordinates, weight_digests
from welore.config import Config, compose, to_config
from welore.measure import GIB, peak_memory
from welore.models import components, count_bytes, decoder_layers
from welore.moments import Needs
from welore.provenance import environment

FLOAT32, FLOAT64 = 4, 8
SHAPES = {  # hidden size, MLP, layers, heads, heads of keys and values
    "tiny": (64, 96, 2, 4, 2),
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 11008, 32, 32, 32),
}


def configured(shapes: str, tokens: int) -> Config:
    hidden, mlp, layers, heads, key_value_heads = SHAPES[shapes]
    sizes = {
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }
    options = ["model=tiny", f"model.name=llama_{shapes}_shapes", "model.dtype=bfloat16", "model.autocast=null"]
    options += [f"model.config.{key}={value}" for key, value in sizes.items()]
    return to_config(compose([*options, "svd=kfac", f"calibration.tokens={tokens}", "mode=none"]))


def layer_statistics(model: torch.nn.Module) -> int:
    """Bytes of the float32 sums of the largest layer: E[xx^T] once for a shared input, E[gg^T] of every output."""
    prefix, _ = next(iter(decoder_layers(model).items()))
    weights = [module for name, module in components(model).items() if name.startswith(f"{prefix}.")]
    inputs = 3 * model.config.hidden_size**2 + model.config.intermediate_size**2
    outputs = sum(module.out_features**2 for module in weights) + model.config.hidden_size**2
    return FLOAT32 * (inputs + outputs)


def bound(model: torch.nn.Module, tokens: int, window: int) -> dict[str, float]:
    """What may lie beside the model at once, in GiB, by arithmetic."""
    hidden, layers = model.config.hidden_size, len(decoder_layers(model))
    element = next(model.parameters()).element_size()
    M, N = max((m.out_features, m.in_features) for m in components(model).values())
    return {
        "hidden states between the layers": tokens * hidden * (layers + 2) * element / GIB,
        "statistics of one layer, and their copy while they are written": 2 * layer_statistics(model) / GIB,
        "one weight in float64, its metrics, their roots and its Gram matrix": FLOAT64
        * (4 * M * N + 2 * max(M, N) ** 2 + 6 * min(M, N) ** 2)
        / GIB,
        "one layer forward and backward on 2,048 tokens": 2048
        * (8 * model.config.intermediate_size + 16 * hidden + 2 * model.config.num_attention_heads * window)
        * FLOAT32
        / GIB,
        "logits of one batch and the loss": 2048 * hidden * FLOAT32 * 4 / GIB + 0.4,
    }


def measure(config: Config, device: torch.device, layers: int) -> dict:
    model, _ = config.model.load(Path())
    model.to(device)
    length = config.calibration.window
    windows_BL = torch.randint(0, model.config.vocab_size, (config.calibration.tokens // length, length))
    weights = weight_digests(model)
    chosen = [
        name
        for prefix in list(decoder_layers(model))[:layers]
        for name in components(model)
        if name.startswith(f"{prefix}.")
    ]
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder))
        with peak_memory(device) as before:
            held = before.gib
        with peak_memory(device) as peak:
            started = time.perf_counter()
            statistics = gather(model, weights, windows_BL, Needs.GRADIENTS, config.calibration, None, cache)
            calibrated = time.perf_counter() - started
            calibration_gib = peak.gib - held
        coordinates = Coordinates(config.svd, weights, cache, statistics)
        with peak_memory(device) as peak:
            started = time.perf_counter()
            for name in chosen:
                coordinates.spectrum(name, components(model)[name])
            decomposed = time.perf_counter() - started
            decomposition_gib = peak.gib - held
    parts = bound(model, config.calibration.tokens, length)
    return {
        "tokens": config.calibration.tokens,
        "model GiB": count_bytes(model) / GIB,
        "calibration seconds": calibrated,
        "decomposition seconds": decomposed,
        "weights decomposed": len(chosen),
        "decomposition seconds of all weights, estimated": decomposed * len(components(model)) / len(chosen),
        "peak GiB beside the model, calibration": calibration_gib,
        "peak GiB beside the model, decomposition": decomposition_gib,
        "bound GiB": sum(parts.values()),
        "of which GiB": parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="1b")
    parser.add_argument("--tokens", type=at_least(1), default=2048, help="of calibration")
    parser.add_argument("--layers", type=at_least(1), default=1, help="decoder layers whose weights are decomposed")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/bench_calibration.json"), help="where the figures go"
    )
    arguments = parser.parse_args()
    config = configured(arguments.shapes, arguments.tokens)
    device = config.trainer.place()
    found = measure(config, device, arguments.layers)
    print(json.dumps(found, indent=2))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"shapes": arguments.shapes, **found} | environment(device), indent=2))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
