"""Perplexities side by side: what a table prints of a row, and the comparisons that claims are made of."""

import math
from collections.abc import Sequence

from experiments.cells import Row
from experiments.page import Outcomes, cited
from welore import metrics
from welore.report import number

BUDGET = "(err achieved, share of the parameters of the compressible weights kept, parameters of the model)"


def entry(row: Row) -> str:
    """The perplexity of a row with the budget that it was reached in."""
    if row.diverged:
        return "diverged"
    return "missing" if row.record is None else cited(f"{perplexity(row)} ({', '.join(budget(row))})", [row])


def perplexity(row: Row) -> str:
    return f"NaN ({row.breaks_at})" if row.breaks_at is not None else number(row.perplexity, 2)


def budget(row: Row) -> list[str]:
    """err and keep as achieved, and the parameters of the model, in millions."""
    million = row.number(metrics.PARAMETERS) / 1e6
    return [f"{row.number(metrics.ERR):.3f}", f"{row.number(metrics.KEEP):.3f}", f"{million:,.1f}M"]


def dense(rows: Sequence[Row]) -> str:
    """The perplexity of the uncompressed model, once where all rows have the same."""
    found = dict.fromkeys(number(row.number(metrics.DENSE_PERPLEXITY), 2) for row in rows if row.record)
    return " / ".join(found) or "missing"


def measured(rows: Sequence[Row]) -> list[str]:
    """The protocol and the device behind the numbers, each said once."""
    done = [row.record for row in rows if row.record]
    protocols = dict.fromkeys(f"{r.config['model']['name']} on {r.environment['protocol']}" for r in done)
    devices = dict.fromkeys(str(record.environment["device"]) for record in done)
    return [f"protocol: {line}" for line in protocols] + [f"device: {line}" for line in devices]


def below(low: float | None, high: float | None) -> bool | None:
    """NaN is worse than any number, and not better than another NaN; None where one is missing."""
    if low is None or high is None:
        return None
    return (math.inf if math.isnan(low) else low) < (math.inf if math.isnan(high) else high)


def least(value: float | None, others: Sequence[float | None]) -> bool | None:
    """Whether a value lies below all others; one below it refutes that, whatever is missing."""
    outcomes = [below(value, other) for other in others]
    return False if False in outcomes else None if None in outcomes else True


def ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None or math.isnan(over / under) else over / under


def joined(*outcomes: Outcomes) -> Outcomes:
    return {place: outcome for found in outcomes for place, outcome in found.items()}
