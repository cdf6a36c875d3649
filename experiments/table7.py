"""Table 7: memory of inference with compressed models, by effective rank reduction and length of the context.

Cost: laptop 3 runs, about 2 minutes each on 2 CPU cores; paper 3 runs, never measured. Two are cells of Table 1.

Ours is what must be there, in 16 bits: the parameters that a run has left, and keys and values of one sequence by
formula. At laptop scale LLaMA-2-7B stands below, exact to its shapes, with the ranks of a stand-in. The paper's is
what GPUtil says of the whole device: also the CUDA context, logits of all positions, the attention of its
implementation and what the allocator holds. Both are in MiB. The time and memory of a real pass are measured by
scripts/bench_inference.py, on a GPU of the same stand-in too (docs/speed.md).
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from experiments.cells import Cell, Row
from experiments.compare import budget, dense, measured
from experiments.page import Claim, Outcomes, Page, cited
from experiments.scales import MODELS, setting
from welore import metrics
from welore.budget import tally
from welore.inference import cache_bytes
from welore.models import components, count_parameters
from welore.shapes import SHAPES, on_meta, stand_in
from welore.svd import Spectrum

NEEDS = ()
ERRS = [0.3, 0.5, 0.7]
LENGTHS = [512, 1024, 2048, 4096]
BYTES, MIB = 2, 2**20  # of a number in 16 bits
DENSE = 0.0
PAPER = "llama2_7b"
# By err: millions of parameters, MB of the model alone, and at each length.
PUBLISHED = {
    DENSE: (6738.42, 13579, [14467, 15145, 17193, 24519]),
    0.3: (5794.25, 11993, [12565, 12923, 14549, 20853]),
    0.5: (4543.67, 9501, [10125, 10433, 12049, 18377]),
    0.7: (3072.84, 6657, [7285, 7625, 9233, 15549]),
}
CONSUMER = 24 * 1024  # MiB of the GeForce RTX 4090 that the paper names

Needed = dict[tuple[float, int], float]  # MiB by err and length, without those that are missing


def cells(scale: str) -> list[Cell]:
    model = {"model": MODELS[scale][0], "svd": "plain", "ranks": "welore", "mode": "none"}
    return [model | {"err": err} | setting(scale) for err in ERRS]


def render(rows: Sequence[Row]) -> Page:
    name = rows[0].cell["model"]
    model = on_meta(SHAPES[name], "bfloat16")
    parameters = {DENSE: count_parameters(model)}
    parameters |= {row.cell["err"]: int(row.number(metrics.PARAMETERS)) for row in rows if row.record}
    needed = _needed(parameters, model)
    header = ["model", "err asked", "err", "keep", "parameters", "paper", "weights, MiB", "paper"]
    header += [title for length in LENGTHS for title in (f"{length} tokens", "paper")]
    first = [name, "dense", "0.000", "1.000", f"{parameters[DENSE] / 1e6:,.1f}M"]
    body = [_line(first, DENSE, parameters, needed)]
    for row in rows:
        start = [name, f"{row.cell['err']:g}", *(_budget(row) if row.record else ["—", "—", "missing"])]
        body.append(_line(start, row.cell["err"], parameters, needed))
    notes = [
        "ours: parameters, and keys and values of one sequence, in 16 bits; no activations, no CUDA context",
        f"the paper's numbers are those of {PAPER}, measured with GPUtil",
        f"dense perplexity {dense(rows)}",
        *measured(rows),
    ]
    if name != PAPER:
        body += stand_ins()
        notes.append(
            f"{PAPER}, stand-in: its shapes, with ranks such that its parameters are the paper's within 0.1 %"
        )
    return Page(header, body, notes, claims(name, needed))


def _needed(parameters: dict[float, int], model: PreTrainedModel) -> Needed:
    return {
        (err, length): (count * BYTES + cache_bytes(model.config, 1, length, BYTES)) / MIB
        for err, count in parameters.items()
        for length in LENGTHS
    }


def stand_ins() -> list[list[str]]:
    """The paper's model, of which no run is needed: its shapes, and ranks of every err that nobody has read."""
    model = on_meta(SHAPES[PAPER], "bfloat16")
    shapes = {name: tuple(linear.weight.shape) for name, linear in components(model).items()}
    whole = {name: Spectrum(shape, torch.empty(min(shape), device="meta")) for name, shape in shapes.items()}
    plans = {err: tally(stand_in(model, err), whole) for err in ERRS}
    compressible = sum(spectrum.shape[0] * spectrum.shape[1] for spectrum in whole.values())
    dense = count_parameters(model)
    parameters = {DENSE: dense} | {err: dense - round((1 - plan.keep) * compressible) for err, plan in plans.items()}
    needed = _needed(parameters, model)
    reached = {DENSE: ("dense", "0.000", "1.000")}
    reached |= {err: (f"{err:g}", f"{plan.err:.3f}", f"{plan.keep:.3f}") for err, plan in plans.items()}
    return [
        _line([f"{PAPER}, stand-in", *reached[err], f"{count / 1e6:,.1f}M"], err, parameters, needed)
        for err, count in parameters.items()
    ]


def _budget(row: Row) -> list[str]:
    err, keep, parameters = budget(row)
    return [err, keep, cited(parameters, [row])]


def _line(start: list[str], err: float, parameters: dict[float, int], needed: Needed) -> list[str]:
    million, alone, at = PUBLISHED[err]
    weights = f"{parameters[err] * BYTES / MIB:,.0f}" if err in parameters else "missing"
    line = [*start, f"{million:,.1f}M", weights, f"{alone:,}"]
    for length, theirs in zip(LENGTHS, at, strict=True):
        ours = needed.get((err, length))
        line += ["missing" if ours is None else f"{ours:,.0f}", f"{theirs:,}"]
    return line


def claims(name: str, ours: Needed) -> list[Claim]:
    paper = {(err, length): float(at[i]) for err, (_, _, at) in PUBLISHED.items() for i, length in enumerate(LENGTHS)}
    first, last = LENGTHS[0], LENGTHS[-1]

    def claim(text: str, check) -> Claim:
        return Claim(text, check(paper), check(ours))

    found = [
        claim("every step of err takes less memory, at every length (Appendix E)", falls),
        claim(f"the share saved is smaller at {last} tokens than at {first}: the cache is not compressed", shrinks),
    ]
    fits = f"at {last} tokens every compressed model fits 24 GiB and the dense one does not (Appendix E)"
    # At laptop scale even the dense model fits: the claim is about models of 7B.
    return [*found, claim(fits, consumer)] if name == PAPER else found


def falls(needed: Needed) -> Outcomes:
    steps = zip([DENSE, *ERRS], ERRS, strict=False)
    return {
        f"{high:g} at {length}": _less(needed.get((high, length)), needed.get((low, length)))
        for low, high in steps
        for length in LENGTHS
    }


def shrinks(needed: Needed) -> Outcomes:
    def left(err: float, length: int) -> float | None:
        mib = needed.get((err, length))
        return None if mib is None else mib / needed[DENSE, length]

    return {f"{err:g}": _less(left(err, LENGTHS[0]), left(err, LENGTHS[-1])) for err in ERRS}


def consumer(needed: Needed) -> Outcomes:
    last = LENGTHS[-1]
    small = {f"{err:g} fits": _less(needed.get((err, last)), CONSUMER) for err in ERRS}
    return {"dense does not fit": needed[DENSE, last] > CONSUMER} | small


def _less(value: float | None, than: float | None) -> bool | None:
    return None if value is None or than is None else value < than
