"""Measure prefill and decoding of a compressed model against the dense one, beside what FLOPs and bytes allow.

usage: python scripts/bench_inference.py [--model smollm2_135m] [--err 0.3 0.5] [--batch 1 4] [--prompt 512]
           [--decode 32] [--dtype float32] [--multiple 1] [--rounds 3] [--random [--plan even|paper]] [--compile]
           [--parts] [--out FILE.json] [overrides]
       python scripts/bench_inference.py --rounds 0 --batch 1 --prompt 512 1024 2048 4096      memory alone
       python scripts/bench_inference.py --model llama2_7b --random --err 0.3 0.5 0.7          on a GPU

Dense and compressed take turns on the same prompt, each as it is and fused (welore/fuse.py). A compressed model is
slower than it need be where a ratio of speeds is below both the ratio of FLOPs and that of bytes. On a GPU both are
also measured as the replay of a captured graph. Peak memory is that of each model and length, as it is, at the largest
batch, on a CPU in a process for each. With --random nothing is loaded or decomposed: random weights in the model's
shapes, and a stand-in for ranks of each err. With --compile the dense, the compressed and the fused compressed models
are measured behind torch.compile too, after the turns of the others, with the seconds of compiling beside the speed.
With --parts a profile says how much of a prefill is products with weights, how much attention and how much the rest.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from welore.bench import (
    apart,
    at_least,
    compressed,
    exit_status,
    refuse_calibration,
    refuse_stand_in,
    stand_in_model,
    stand_in_ranks,
    write,
)
from welore.cache import Cache
from welore.checkpoint import describe
from welore.config import Config, compose, to_config
from welore.errors import Refused
from welore.fuse import fuse
from welore.inference import (
    Speed,
    cache_bytes,
    compiled,
    decode_bytes,
    decode_flops,
    generate,
    prefill_flops,
    prefill_parts,
    product_flops,
    race,
)
from welore.measure import GIB, give_back, peak_memory
from welore.models import DTYPES, count_bytes
from welore.ranks import Given
from welore.shapes import EVEN, PLANS, PLANS_HELP

DENSE, SMALL = "dense", "compressed"


def load(config: Config, device: torch.device, arguments: argparse.Namespace, err: float | None) -> PreTrainedModel:
    """The model of a config in the dtype asked for, compressed where there is an err."""
    if arguments.random:
        config = deepcopy(config)
        config.err, config.model.dtype = err or 0.0, arguments.dtype
        model = stand_in_model(config, device, plan=arguments.plan)
    elif err is None:
        model, _ = config.model.load(Path(config.outputs) / ".cache")
    else:
        # The cache of all runs: nothing here measures the decomposition.
        model, _ = compressed(config, device, Cache(Path(config.outputs) / ".cache"))
    return model.to(device, DTYPES[arguments.dtype]).eval().requires_grad_(False)


def prompt(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    return torch.randint(0, weight.shape[0], (batch, length), device=weight.device)


def with_fused(name: str, model: PreTrainedModel, multiples: list[int]) -> dict[str, PreTrainedModel]:
    """A model as it is, and a fused copy for each multiple that its ranks are padded to."""
    models = {name: model}
    for multiple in multiples:
        models[f"{name} fused" + (f" x{multiple}" if multiple > 1 else "")] = copy = deepcopy(model)
        fuse(copy, multiple)
    return models


def speeds(arguments: argparse.Namespace, configs: dict[str, Config], device: torch.device) -> Iterator[dict]:
    """A row for every err, batch and prompt, as soon as it is there."""
    dense = load(configs[DENSE], device, arguments, None)
    base = with_fused(DENSE, dense, [1])
    for name, config in configs.items():
        if name == DENSE:
            continue
        models = small = None  # those of the err before make room
        give_back(device)
        small = load(config, device, arguments, config.err)
        models = base | with_fused(SMALL, small, arguments.multiple)
        for batch in arguments.batch:
            for length in arguments.prompt:
                yield {"err": config.err} | compare(models, batch, length, arguments)


def compare(models: dict[str, PreTrainedModel], batch: int, length: int, arguments: argparse.Namespace) -> dict:
    """The speed of each beside that of the dense model, and the ratios that FLOPs and, for decoding, bytes allow."""
    dense, small = models[DENSE], models[SMALL]
    found = race(models, prompt(dense, batch, length), arguments.decode, arguments.rounds)
    context = length + arguments.decode // 2
    row = {
        "batch": batch,
        "prompt": length,
        "tokens_per_second": {name: asdict(speed) for name, speed in found.items()},
        "prefill ratio": {name: speed.prefill / found[DENSE].prefill for name, speed in found.items()},
        "prefill FLOPs ratio": prefill_flops(dense, length) / prefill_flops(small, length),
        "decode ratio": {name: speed.decode / found[DENSE].decode for name, speed in found.items()},
        "decode FLOPs ratio": decode_flops(dense, context) / decode_flops(small, context),
        "replayed ratio": {n: speed.replayed / found[DENSE].replayed for n, speed in found.items() if speed.replayed},
        "read replayed ratio": {
            name: speed.read_replayed / found[DENSE].read_replayed for name, speed in found.items() if speed.replayed
        },
        "decode bytes ratio": decode_bytes(dense, batch, context) / decode_bytes(small, batch, context),
    }
    if arguments.parts:
        parts = {name: prefill_parts(model, prompt(dense, batch, length)) for name, model in models.items()}
        ratio = product_flops(dense, length) / product_flops(small, length)
        row |= {"prefill parts": parts, "prefill ratio if the rest stays": if_the_rest_stays(parts[DENSE], ratio)}
    if arguments.compile:
        row |= behind_compile(models, batch, length, arguments, found[DENSE])
    return row


def if_the_rest_stays(dense: dict[str, float], ratio: float) -> float:
    """How much faster a prefill gets whose products alone get cheaper, by the ratio of their FLOPs."""
    return sum(dense.values()) / (sum(dense.values()) - dense["products"] * (1 - 1 / ratio))


def behind_compile(
    models: dict[str, PreTrainedModel], batch: int, length: int, arguments: argparse.Namespace, dense: Speed
) -> dict:
    """All but the fused dense model behind torch.compile, and ratios to the dense one that is not.

    On a GPU steps are replayed from a graph, compiled or not.
    """
    ids_BL = prompt(models[DENSE], batch, length)
    found = {
        name: compiled(model, ids_BL, arguments.decode, arguments.rounds)
        for name, model in models.items()
        if name == DENSE or name.startswith(SMALL)
    }
    return {
        "compiled": {name: asdict(speed) for name, speed in found.items()},
        "compiled prefill ratio": {name: speed.prefill / dense.prefill for name, speed in found.items()},
        "compiled decode ratio": {
            name: speed.decode / (dense.replayed or dense.decode) for name, speed in found.items()
        },
    }


def line(row: dict) -> str:
    lines = [
        f"err {row['err']:g}  batch {row['batch']}  prompt {row['prompt']}   allowed: prefill"
        f" {row['prefill FLOPs ratio']:.3f} by FLOPs, decode {row['decode FLOPs ratio']:.3f} by FLOPs,"
        f" {row['decode bytes ratio']:.3f} by bytes"
    ]
    for name, speed in row["tokens_per_second"].items():
        lines.append(
            f"  {name:22} prefill {speed['prefill']:8.1f} tokens/s, ratio {row['prefill ratio'][name]:.3f}"
            f"   decode {speed['decode']:7.1f} tokens/s, ratio {row['decode ratio'][name]:.3f}"
        )
        if speed["replayed"]:
            lines[-1] += f"   replayed {speed['replayed']:7.1f} tokens/s, ratio {row['replayed ratio'][name]:.3f}"
            lines[-1] += f", reading {speed['read_replayed']:8.1f}, ratio {row['read replayed ratio'][name]:.3f}"
    for name, parts in row.get("prefill parts", {}).items():
        known = "   ".join(f"{part} {1000 * taken:7.1f} ms" for part, taken in parts.items())
        lines.append(f"  {name:22} prefill on the device: {known}")
    if "prefill ratio if the rest stays" in row:
        lines.append(f"  {'':22} ratio if products alone got cheaper: {row['prefill ratio if the rest stays']:.3f}")
    for name, speed in row.get("compiled", {}).items():
        lines.append(
            f"  {name + ', compiled':30} prefill {speed['prefill']:8.1f} tokens/s, ratio"
            f" {row['compiled prefill ratio'][name]:.3f}   decode {speed['decode']:7.1f} tokens/s, ratio"
            f" {row['compiled decode ratio'][name]:.3f}   compiling {speed['prefill_seconds']:.0f} +"
            f" {speed['decode_seconds']:.0f} s, the first {speed['same']} tokens the same"
        )
    return "\n".join(lines)


def memory(arguments: argparse.Namespace, device: torch.device) -> dict[str, float | None]:
    """`footprint` of the model in a folder at one length; what the process held before the model was there is said.

    The model is one that was saved, as users have it: a process on a CPU that has compressed one keeps what that took,
    and one that has read another prompt the kernels for it.
    """
    with peak_memory(device) as before:
        held = before.gib
    folder, length = arguments.only
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[arguments.dtype]).to(device).eval()
    return footprint(model, max(arguments.batch), int(length)) | {"before the model GiB": held}


def footprint(model: PreTrainedModel, batch: int, length: int) -> dict[str, float | None]:
    """Peak of one prefill and a few decoding steps after a prompt of one length, and what must be there of it."""
    ids_BL = prompt(model, batch, length)
    with peak_memory(ids_BL.device) as peak:
        generate(model, ids_BL, 4)
        return {
            "batch": batch,
            "prompt": length,
            "peak GiB": peak.gib,
            "reserved GiB": peak.reserved_gib,
            "weights GiB": count_bytes(model) / GIB,
            "KV cache GiB": cache_bytes(model.config, batch, length + 3, model.dtype.itemsize) / GIB,
        }


def by_length(arguments: argparse.Namespace, config: Config, device: torch.device, err: float | None) -> list[dict]:
    """`footprint` of one model by length. A GPU counts what is allocated; on a CPU each is a process of its own."""
    model = load(config, device, arguments, err)
    if device.type == "cuda":
        found = []
        for length in sorted(arguments.prompt):
            give_back(device)
            found.append(footprint(model, max(arguments.batch), length))
        return found
    with tempfile.TemporaryDirectory() as folder:
        describe(model, Path(folder))
        model.save_pretrained(folder)
        del model
        alone = ["--only", folder]
        return [apart([__file__, *alone, str(length), *sys.argv[1:]]) for length in sorted(arguments.prompt)]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m", help="an option of conf/model")
    parser.add_argument("--err", type=float, nargs="+", default=[0.3, 0.5], help="shares of ranks removed")
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=[1, 4], help="sequences at once")
    parser.add_argument("--prompt", type=at_least(1), nargs="+", default=[512], help="tokens of the prompt")
    parser.add_argument(
        "--decode", type=at_least(4), default=32, help="tokens written after it, of which three warm up"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and products; by default that of the model")
    parser.add_argument(
        "--multiple", type=at_least(1), nargs="+", default=[1], help="what ranks of fused models are padded to"
    )
    parser.add_argument(
        "--rounds", type=at_least(0), default=3, help="of each model on each shape, in turns; 0: no speed"
    )
    parser.add_argument("--random", action="store_true", help="random weights in the model's shapes")
    parser.add_argument("--plan", choices=PLANS, default=EVEN, help=f"of the ranks, with --random: {PLANS_HELP}")
    parser.add_argument("--compile", action="store_true", help="measure behind torch.compile too")
    parser.add_argument("--parts", action="store_true", help="say what a prefill spends its time on")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_inference.json"), help="where the figures go")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="overrides of run.py, such as svd=plain (after a --)")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    composed = to_config(compose([f"model={arguments.model}", *arguments.overrides]))
    refuse_calibration(composed)
    if isinstance(composed.ranks, Given):
        raise Refused("ranks=given takes ranks from a file, and --err asks for shares of them. Write ranks=welore.")
    if not arguments.random:
        refuse_stand_in(1, arguments.plan)
    arguments.dtype = arguments.dtype or composed.model.dtype
    configs = {DENSE: composed}
    for err in arguments.err:
        configs[f"err {err:g}"] = config = replace(composed, err=err, keep=None, bytes=None, flops=None)
        if arguments.random:
            stand_in_ranks(config, plan=arguments.plan)
    device = composed.trainer.place()
    if arguments.only:
        print(json.dumps(memory(arguments, device)))
        return
    # A folder of this process, or what an earlier one has compiled would make compiling seem quick.
    kernels = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = kernels.name
    how = {"model": composed.model.name, "random": arguments.random}
    how |= {key: getattr(arguments, key) for key in ("dtype", "decode", "multiple", "plan")}
    found: dict = {"speed": [], "memory": {}} | how
    for row in speeds(arguments, configs, device) if arguments.rounds else ():
        found["speed"].append(row)
        write(arguments.out, found, device)
        print(line(row), flush=True)
    for name, config in configs.items():
        found["memory"][name] = by_length(arguments, config, device, None if name == DENSE else config.err)
        write(arguments.out, found, device)
        for figures in found["memory"][name]:
            known = {key: value for key, value in figures.items() if value is not None}
            print(f"{name:10}" + "   ".join(f"{key} {value:.4g}" for key, value in known.items()), flush=True)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
