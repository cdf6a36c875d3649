"""Print the memory of one training step, or of inference, predicted from shapes, and the largest batch that fits.

usage: python scripts/memory.py model=llama2_7b err=0.5 mode=welore [--batch 1] [--length 1024] [--gib 24 48 80]
           [--recompute] [--plan even|paper | --ranks RUN/ranks.json] [overrides]
       python scripts/memory.py err=0.3 mode=welore --batch 4 --length 256 --measure [--out FILE.json]
                                                                                  beside two real steps
       python scripts/memory.py model=llama2_7b err=0.5 --inference [--batch 1] [--lengths 512 1024 2048 4096]
                                                                                  dense beside compressed

Without --measure nothing is loaded: the model is built without storage. Its ranks are those of --ranks (or of
ranks=given ranks.path=FILE); without it a stand-in of the right err, which has the parameters of the paper's Table 7
for LLaMA-2-7B. With --plan even, the default, every LRC of it keeps the same share of its ranks; with --plan paper,
known at err 0.5 alone, LRCs and N-LRCs have as many parameters as the paper says.
"""

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel

from welore.bench import at_least, compressed, exit_status, measured, memory, write
from welore.cache import Cache
from welore.config import Config, compose, to_config
from welore.errors import Refused
from welore.measure import GIB
from welore.memory import Footprint, Step, largest_batch, predict, predict_prefill, refuse_unforeseen
from welore.models import components, count_parameters
from welore.modes import select
from welore.prune import mask_bytes
from welore.ranks import Given, read_ranks
from welore.shapes import EVEN, PLANS, PLANS_HELP, factor, on_meta, sizes_of, stand_in


def table(footprint: Footprint) -> str:
    """Every line in GiB; the largest moment is marked."""
    lines = [f"{name:32}{size / GIB:9.3f}" for name, size in footprint.held.items()]
    lines += [f"  saved: {name:23}{size / GIB:9.3f}" for name, size in sorted(footprint.saved.items())]
    top = max(footprint.moments, key=footprint.moments.get)
    for name, size in footprint.moments.items():
        lines.append(f"{name:32}{size / GIB:9.3f}{' <- largest, above what is held' if name == top else ''}")
    return "\n".join([*lines, f"{'peak, GiB':32}{footprint.peak / GIB:9.3f}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=at_least(1), default=1, help="sequences of a pass")
    parser.add_argument("--length", type=at_least(2), default=1024, help="tokens of a sequence")
    parser.add_argument("--gib", type=memory, nargs="*", default=[24, 48, 80], help="memories to fill with sequences")
    parser.add_argument("--recompute", action="store_true", help="run every layer again for its gradient")
    parser.add_argument("--ranks", type=Path, help="ranks.json of a run with this model")
    parser.add_argument("--plan", choices=PLANS, help=f"a stand-in for ranks: {PLANS_HELP}")
    parser.add_argument("--inference", action="store_true", help="of reading prompts and writing after them")
    parser.add_argument(
        "--lengths", type=at_least(1), nargs="+", default=[512, 1024, 2048, 4096], help="of the prompts of --inference"
    )
    parser.add_argument("--measure", action="store_true", help="load the model and measure two steps as well")
    parser.add_argument("--out", type=Path, help="where what --measure finds goes as JSON")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py: model=, err=, mode=")
    arguments = parser.parse_intermixed_args()
    return exit_status(lambda: (show_inference if arguments.inference else show)(arguments))


def measure(config: Config, step: Step) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model, _ = compressed(config, config.trainer.place(), Cache(Path(folder)))
    footprint, found = measured(model, config, step)
    print(table(footprint))
    ratio = found["predicted GiB"] / found["measured GiB"]
    print(
        f"measured {found['measured GiB']:.3f} GiB, predicted / measured {ratio:.3f}, "
        f"{found['tokens_per_second']:.0f} tokens/s"
    )
    return found


def show(arguments: argparse.Namespace) -> None:
    config = to_config(compose(arguments.overrides))
    if arguments.out and not arguments.measure:
        raise Refused(f"--out {arguments.out} is for what is measured. Write --measure too, or leave it out.")
    if arguments.plan and arguments.measure:
        raise Refused(f"--plan {arguments.plan} is a stand-in, and --measure loads the model. Write one of them.")
    if config.prune.prunes and arguments.measure:
        raise Refused(f"prune={config.prune.name} is not measured here. Leave out --measure to count it, or prune=.")
    refuse_unforeseen(config.mode)
    step = Step(arguments.batch, arguments.length, config.model.autocast, arguments.recompute)
    if arguments.measure:
        found = measure(config, step)
        if arguments.out:
            shape = {"model": config.model.name, "mode": config.mode.name, "asked": config.asked, **asdict(step)}
            write(arguments.out, found | {"shape": shape}, config.trainer.place())
        return
    model, origin = shaped(config, arguments.ranks, arguments.plan)
    count = count_parameters(model)
    masks = mask_bytes(config.prune, components(model))
    parameters = select(model, config.mode)
    if config.task.training.unfreeze(model):
        raise Refused(
            f"task/training={config.task.training.name} trains the embeddings too, which is not counted here. Write "
            f"task.training.embeddings=false, or measure a run of a few steps: its fit/peak_gib."
        )
    trained = sum(p.numel() for p in parameters)
    print(f"{config.model.name}, ranks: {origin}; {count / 1e6:,.1f}M parameters, mode={config.mode.name}")
    print(f"trains {trained / 1e6:,.1f}M; {step.batch} x {step.length} tokens, recompute={step.recompute}\n")
    print(table(predict(model, config.mode, parameters, step, masks)))
    for gib in arguments.gib:
        plain, again = (
            largest_batch(model, config.mode, parameters, replace(step, recompute=on), gib, masks)
            for on in (False, True)
        )
        print(f"largest batch in {gib:g} GiB: {plain}, with recompute {again}")


def shaped(config: Config, file: Path | None, plan: str | None = None) -> tuple[PreTrainedModel, str]:
    """The compressed model without storage, and where its ranks are from; `plan` is of a stand-in (None: even)."""
    if file is None and isinstance(config.ranks, Given):
        file = Path(config.ranks.path)
    if file and plan:
        raise Refused(f"--plan {plan} is a stand-in for ranks, and {file} holds ranks. Write one of them.")
    if file is None and config.err is None:
        raise Refused(f"{config.asked} needs spectra, and nothing is loaded here. Write err=0.5 or --ranks FILE.")
    model = on_meta(sizes_of(config.model), config.model.dtype)
    factor(model, read_ranks(file) if file else stand_in(model, config.err, plan=plan or EVEN))
    return model, str(file or f"a stand-in for err={config.err:g}, plan {plan or EVEN}")


def show_inference(arguments: argparse.Namespace) -> None:
    config = to_config(compose(arguments.overrides))
    if arguments.measure:
        raise Refused("scripts/bench_inference.py --rounds 0 measures inference. Write --inference alone.")
    small, origin = shaped(config, arguments.ranks, arguments.plan)
    models = {"dense": on_meta(sizes_of(config.model), config.model.dtype), "compressed": small}
    counts = ", ".join(f"{name} {count_parameters(model) / 1e6:,.1f}M" for name, model in models.items())
    print(f"{config.model.name} in {config.model.dtype}, ranks: {origin}; parameters: {counts}")
    print(f"GiB at the peak of reading {arguments.batch} prompts: weights + KV cache + one layer\n")
    for length in arguments.lengths:
        found = {name: predict_prefill(model, arguments.batch, length) for name, model in models.items()}
        parts = [
            f"{name}{p.weights / GIB:9.3f} + {p.cache / GIB:.3f} + {p.layer / GIB:.3f} ={p.peak / GIB:8.3f}"
            for name, p in found.items()
        ]
        ratio = found["compressed"].peak / found["dense"].peak
        print(f"{length:6} tokens   {'   '.join(parts)}   ratio {ratio:.3f}")


if __name__ == "__main__":
    raise SystemExit(main())
