"""Count the FLOPs of a token in a training step of every mode, on one compressed model.

usage: python scripts/step_flops.py [--model smollm2_135m] [--modes welore full lora] [--length 1024] [--out FILE.json]
           [overrides of run.py, such as err=0.3]

torch counts the products of matrices as they run, so that adapters, products of factors and gradients that a mode does
not need are in it or not as they are in a run. What an optimizer computes beside (projections, orthogonalization) is
not, nor is attention; the gradient of the inputs of the head counts as forward, where the loss forms it. A mode that
multiplies weights together does so once a pass, so that its FLOPs of a token depend on how many tokens a pass has.
A run counts its own first pass the same way, into fit/flops_per_token of its record. Nothing is timed: a busy machine
does no harm. The seconds of a step are those of scripts/bench_steps.py.
"""

import argparse
from copy import deepcopy
from pathlib import Path

from torch import nn

from welore.bench import Steps, at_least, exit_status, subject, write
from welore.config import CONF, Config, compose, to_config

EIGHT_BIT = {"welore_8bit", "nlrc_8bit", "full_8bit", "lora_8bit"}
ELSEWHERE = {"none", "chosen", *EIGHT_BIT}  # train nothing, or count as another mode does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m", help="an option of conf/model")
    parser.add_argument("--modes", nargs="+", default=every_mode(), help="options of conf/mode")
    parser.add_argument("--length", type=at_least(2), default=1024, help="tokens of the one sequence")
    parser.add_argument("--out", type=Path, default=Path("outputs/step_flops.json"), help="where the figures go")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py, such as err=0.3")
    arguments = parser.parse_intermixed_args()
    config = to_config(compose([f"model={arguments.model}", *arguments.overrides]))
    model = subject(config, config.trainer.place(), random=False, multiple=1).train()
    rows = {name: counted(model, name, config, arguments.length) for name in arguments.modes}
    print(f"{'mode':12}{'forward':>10}{'backward':>10}{'step':>10}   MFLOPs a token, {arguments.length} tokens")
    for name, row in rows.items():
        print(f"{name:12}" + "".join(f"{row[phase] / 1e6:10.1f}" for phase in ("forward", "backward", "step")))
    how = {"model": config.model.name, "asked": config.asked, "length": arguments.length}
    write(arguments.out, {"flops a token": rows} | how, config.trainer.place())
    print(f"written to {arguments.out}")


def every_mode() -> list[str]:
    return sorted({file.stem for file in (CONF / "mode").glob("*.yaml")} - ELSEWHERE)


def counted(model: nn.Module, name: str, config: Config, length: int) -> dict[str, float]:
    mode = to_config(compose([f"mode={name}"])).mode
    # Adapters change the model that they are put on.
    flops = Steps(deepcopy(model), mode, config.model.autocast, 1, length).flops()
    return flops | {"step": sum(flops.values())}


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
