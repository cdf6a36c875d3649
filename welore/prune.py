"""Zeros in the weights that stayed dense, or in all of them. The config object is the strategy.

A pruned weight is a dense tensor with zeros in it. It takes as many bytes and as much time as before, unless a kernel
knows how to skip the zeros: what is counted here is zeros, never parameters or bytes saved.

The statistics are those that the model was compressed with. The authors of Wanda and
SparseGPT go on layer by layer, on what the pruned layers before give.

Shape suffixes: M = out_features, N = in_features, R = rank.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from welore.errors import Refused
from welore.lowrank import LowRankLinear
from welore.moments import Moments, Needs
from welore.sparse import mask_magnitude, mask_wanda, sparsegpt

Modules = dict[str, nn.Linear | LowRankLinear]


@dataclass
class Prune:
    """No pruning: every weight keeps its values."""

    needs: ClassVar[Needs] = Needs.NOTHING
    name: str

    @property
    def prunes(self) -> bool:
        return False

    def matrices(self, modules: Modules) -> dict[str, nn.Linear]:
        """The matrices among the compressible weights that are pruned, by full name."""
        return {}

    def pruned(self, W_MN: Tensor, inputs_NN: Tensor | None) -> tuple[Tensor, str | None]:
        """The weight with zeros in it, given E[xx^T] of its input, and a note where a safer way had to be taken."""
        raise NotImplementedError(f"prune={self.name} does not say what it zeroes")


@dataclass
class Magnitude(Prune):
    """Zero the smallest |W| of each matrix. Needs no data.

    `pattern` n:m keeps n of every m consecutive inputs of each output, and then says what `sparsity` is.
    """

    sparsity: float | None  # share of zeros, 0 <= sparsity < 1
    pattern: str | None
    where: str  # nlrc: the weights that stayed dense; all: these and both factors of every LRC

    def __post_init__(self):
        if self.where not in ("nlrc", "all"):
            raise Refused(f"prune.where={self.where} is unknown. Write nlrc or all.")
        if self.pattern is not None:
            self.sparsity = _agreed(self.sparsity, self.pattern)
        if self.sparsity is None or not 0 <= self.sparsity < 1:
            raise Refused(
                f"prune.sparsity={self.sparsity} is not a share in [0, 1). Write 0.5 to zero half of the weights, or "
                f"prune.pattern=2:4."
            )

    @property
    def prunes(self) -> bool:
        return True

    @property
    def group(self) -> int | None:
        """The m of a pattern n:m."""
        return None if self.pattern is None else int(self.pattern.partition(":")[2])

    def matrices(self, modules: Modules) -> dict[str, nn.Linear]:
        found: dict[str, nn.Linear] = {}
        for name, module in modules.items():
            if isinstance(module, nn.Linear):
                found[name] = module
            elif self.where == "all":
                found |= {f"{name}.B": module.B, f"{name}.A": module.A}
        return found

    def pruned(self, W_MN: Tensor, inputs_NN: Tensor | None) -> tuple[Tensor, str | None]:
        return W_MN.masked_fill(mask_magnitude(W_MN, self.sparsity, self.group), 0), None


@dataclass
class Wanda(Magnitude):
    """Zero the smallest |W| sqrt(E[x^2]) of each output (Wanda): a large weight on a silent input goes first."""

    needs: ClassVar[Needs] = Needs.INPUTS

    def pruned(self, W_MN: Tensor, inputs_NN: Tensor | None) -> tuple[Tensor, str | None]:
        return W_MN.masked_fill(mask_wanda(W_MN, inputs_NN.diagonal(), self.sparsity, self.group), 0), None


@dataclass
class SparseGpt(Magnitude):
    """Zero what changes the outputs least, and let the weights that follow make up for it (SparseGPT)."""

    needs: ClassVar[Needs] = Needs.INPUTS
    damping: float  # of E[xx^T], as a share of its mean diagonal
    block: int  # columns that share one threshold

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.damping < 1:
            raise Refused(f"prune.damping={self.damping} is not a share in (0, 1). Write 0.01, the published one.")
        if self.block < 1 or self.block % (self.group or 1):
            raise Refused(
                f"prune.block={self.block} with prune.pattern={self.pattern}: write a block of 1 or more that is a "
                f"multiple of the m in n:m, such as 128."
            )

    def pruned(self, W_MN: Tensor, inputs_NN: Tensor | None) -> tuple[Tensor, str | None]:
        return sparsegpt(W_MN, inputs_NN, self.sparsity, self.group, self.damping, self.block)


def _agreed(sparsity: float | None, pattern: str) -> float:
    """The sparsity of a pattern n:m, which is 1 - n / m."""
    parts = re.fullmatch(r"(\d+):(\d+)", pattern)
    keep, of = map(int, parts.groups()) if parts else (0, 0)
    if not 0 < keep < of:
        raise Refused(
            f"prune.pattern={pattern} is no pattern n:m with 0 < n < m. Write 2:4 to keep 2 of every 4 inputs (in a "
            f'YAML file in quotes, "2:4", for YAML takes it for a time).'
        )
    share = 1 - keep / of
    if sparsity is not None and abs(sparsity - share) > 1e-3:
        raise Refused(
            f"prune.sparsity={sparsity} contradicts prune.pattern={pattern}, which keeps {keep} of {of} and zeroes "
            f"{share:g}. Write prune.sparsity=null, or another pattern."
        )
    return share


@torch.no_grad()
def prune_model(prune: Prune, modules: Modules, moments: Callable[[str], Moments]) -> dict[str, Any]:
    """Prune the compressible weights in place, one at a time, and count the zeros. Biases are left alone.

    `moments` is called only where the option needs data. Returns the counts of `count_zeros`, and as `notes` the safer
    ways that had to be taken.
    """
    notes: list[str] = []
    if not prune.prunes:
        return count_zeros(prune, modules) | {"notes": notes}
    _check_matrices(prune, prune.matrices(modules))
    chosen = {name: module for name, module in modules.items() if prune.matrices({name: module})}
    for name, module in tqdm(chosen.items(), desc="prune", unit="weight", leave=False):
        for full, linear, inputs_NN in _with_inputs(prune, name, module, moments):
            if inputs_NN is not None and not inputs_NN.diagonal().any():
                inputs_NN = torch.eye(linear.in_features, device=linear.weight.device)
                notes.append(f"{full}: calibration saw no input of it, which counts as E[xx^T] = I")
            try:
                W_MN, note = prune.pruned(linear.weight, inputs_NN)
            except Refused as error:
                raise Refused(f"{full}: {error}") from error
            linear.weight.copy_(W_MN)
            notes += [f"{full}: {note}"] if note else []
    return count_zeros(prune, modules) | {"notes": notes}


def _check_matrices(prune: Prune, matrices: dict[str, nn.Linear]) -> None:
    if not matrices:
        raise Refused(
            f"prune={prune.name} with prune.where={prune.where} finds no weight that stayed dense: all are factored. "
            f"Write prune.where=all, ask for a smaller err, or change ranks.dense."
        )
    for name, linear in matrices.items():
        if linear.in_features % (prune.group or 1):
            raise Refused(
                f"{name} has {linear.in_features} inputs, which prune.pattern={prune.pattern} cannot divide into "
                f"groups of {prune.group}. Write prune.where=nlrc, or give a prune.sparsity instead of the pattern."
            )


def _with_inputs(
    prune: Prune, name: str, module: nn.Linear | LowRankLinear, moments: Callable[[str], Moments]
) -> Iterator[tuple[str, nn.Linear, Tensor | None]]:
    """Every stored matrix of a weight with E[xx^T] of its own input.

    That of A is B E[xx^T] B^T, with B as it is when A is asked for: pruned.
    """
    inputs_NN = None
    if prune.needs:
        inputs_NN = moments(name).inputs_NN.to(next(module.parameters()).device)
    if isinstance(module, nn.Linear):
        yield name, module, inputs_NN
        return
    yield f"{name}.B", module.B, inputs_NN
    B_RN = module.B.weight.double()
    yield f"{name}.A", module.A, None if inputs_NN is None else B_RN @ inputs_NN.double() @ B_RN.T


def mask_bytes(prune: Prune, modules: Modules) -> int:
    """What is held while a pruned model trains, so that its zeros stay (welore/sparse.py: KeptZeros)."""
    return sum(linear.weight.numel() for linear in prune.matrices(modules).values()) * torch.bool.itemsize


def count_zeros(prune: Prune, modules: Modules) -> dict[str, Any]:
    """`zeros` among the `parameters` values of the matrices that are pruned, and shares of zeros.

    `n_lrc_sparsity` is the share in the weights that stayed dense (None if there are none), `sparsity` that in all
    stored matrices. Count again after tuning: ranks that merged adapters append to an LRC (mode.lora_on) are dense.
    """
    dense = [m.weight for m in modules.values() if isinstance(m, nn.Linear)]
    factors = [f.weight for m in modules.values() if isinstance(m, LowRankLinear) for f in (m.A, m.B)]
    zeros, parameters = _zeros([linear.weight for linear in prune.matrices(modules).values()])
    n_lrc_zeros, n_lrc = _zeros(dense)
    all_zeros, stored = _zeros(dense + factors)
    return {
        "zeros": zeros,
        "parameters": parameters,
        "n_lrc_sparsity": n_lrc_zeros / n_lrc if n_lrc else None,
        "sparsity": all_zeros / stored,
    }


def _zeros(weights: list[Tensor]) -> tuple[int, int]:
    return sum(int((W == 0).sum()) for W in weights), sum(W.numel() for W in weights)
