"""What Figures 3 and 7 draw: the spectra and the ranks that one run left in its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from experiments.cells import Cell, Row
from experiments.compare import dense, measured, perplexity
from experiments.scales import setting
from welore import metrics
from welore.ranks import NORMALIZATIONS, read_ranks
from welore.report import number

FILES = ("spectra.safetensors", "ranks.json")
MODELS = {"laptop": "smollm2_135m", "paper": "llama2_7b"}


@dataclass(frozen=True)
class Cut:
    """Normalized singular values, descending, and the rank (None where dense) of each compressible weight."""

    spectra: dict[str, Tensor]
    ranks: dict[str, int | None]
    threshold: float
    title: str
    notes: list[str]

    @property
    def ratios(self) -> dict[str, float | None]:
        """The share of its ranks that a weight keeps, None where it stays dense."""
        return {name: None if rank is None else rank / len(self.spectra[name]) for name, rank in self.ranks.items()}

    @property
    def above(self) -> dict[str, float]:
        """The share of the singular values of a weight that are at least k."""
        return {name: float((s >= self.threshold).float().mean()) for name, s in self.spectra.items()}


def cell(scale: str) -> Cell:
    """The 50 % reduction of Figures 3 and 7; a cell of Table 1 too."""
    return {"model": MODELS[scale], "ranks": "welore", "mode": "none", "err": 0.5, **setting(scale)}


def read_cut(row: Row) -> Cut:
    folder, config = Path(row.folder), row.record.config
    normalize = NORMALIZATIONS[config["ranks"]["normalize"]]
    ranks, spectra = read_ranks(folder / "ranks.json"), load_file(folder / "spectra.safetensors")
    title = (
        f"{config['model']['name']}: err asked {config['err']:g}, achieved {row.number(metrics.ERR):.3f}, "
        f"keep {row.number(metrics.KEEP):.3f}, k = {row.number(metrics.THRESHOLD):.3f}"
    )
    notes = [
        title,
        f"{number(row.number(metrics.PARAMETERS), 0)} parameters; perplexity dense {dense([row])}, "
        f"compressed {perplexity(row)}",
        *measured([row]),
    ]
    return Cut({name: normalize(spectra[name]) for name in ranks}, ranks, row.number(metrics.THRESHOLD), title, notes)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
