"""Records and rows as text: the summary of one run, tables in Markdown and LaTeX."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from welore import metrics
from welore.metrics import Metric
from welore.records import Record


def announce(line: str) -> None:
    """One line about what a run does now, beside the progress bars."""
    print(f"· {line}", file=sys.stderr, flush=True)


def number(value: Any, digits: int) -> str:
    """With separators for thousands; a dash where there is none."""
    if value is None:
        return "—"
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else str(value)


def summary(record: Record, folder: Path) -> str:
    """What one run came to, in a small table."""
    found, config = record.metrics, record.config
    budgets = ("err", "keep", "bytes", "flops")
    asked = next((f"{key} {config[key]}" for key in budgets if config.get(key) is not None), "given ranks")
    lines = [
        "  ".join(
            [config["model"]["name"], config["svd"]["name"], config["ranks"]["name"], asked, config["mode"]["name"]]
        ),
        f"{record.environment['protocol']}",
        "",
        f"{'':24}{'dense':>16}{'compressed':>16}{'tuned':>16}",
        *_scores(found),
        _row(
            "parameters",
            [_get(found, m) for m in (metrics.DENSE_PARAMETERS, metrics.PARAMETERS, metrics.TUNED_PARAMETERS)],
        ),
        _row("bytes", [_get(found, metrics.DENSE_BYTES), _get(found, metrics.BYTES), ""]),
        "",
    ]
    questions, tokens = metrics.EVAL_QUESTIONS_PER_SECOND, metrics.EVAL_TOKENS_PER_SECOND
    pairs = [
        ("asked", asked),
        *_pairs(found, metrics.ERR, metrics.KEEP),
        ("LRC / N-LRC", f"{_get(found, metrics.LRC)} / {_get(found, metrics.N_LRC)}"),
        *_pairs(found, metrics.PREDICTED_NATS, metrics.NATS),
        *(_pairs(found, metrics.SPARSITY, metrics.N_LRC_SPARSITY) if metrics.SPARSITY.key in found else ()),
        *_pairs(found, questions if questions.key in found else tokens, metrics.EVAL_PEAK_GIB),
    ]
    if metrics.FIT_TOKENS.key in found:
        pairs += _pairs(
            found,
            metrics.TRAINABLE_PARAMETERS,
            metrics.FIT_TOKENS,
            metrics.FIT_STEPS,
            metrics.FIT_TOKENS_PER_SECOND,
            metrics.FIT_PADDED_TOKENS_PER_SECOND,
            metrics.FIT_PEAK_GIB,
        )
    pairs += [("seconds", f"{record.seconds:.0f}"), ("device", record.environment["device"])]
    return "\n".join(
        [*lines, *(f"{title:36}{value}" for title, value in pairs), f"{'record':36}{folder / 'record.json'}"]
    )


def _row(title: str, cells: Sequence[str]) -> str:
    return f"{title:24}" + "".join(f"{cell:>16}" for cell in cells)


def _get(found: dict[str, Any], metric: Metric) -> str:
    return number(found.get(metric.key), metric.digits)


def _pairs(found: dict[str, Any], *wanted: Metric) -> list[tuple[str, str]]:
    return [(metric.title, _get(found, metric)) for metric in wanted]


STAGES = ("dense", "compressed", "tuned")


def _scores(found: dict[str, Any]) -> list[str]:
    """What the benchmark measures, by stage: perplexity, accuracy by what was written or likely, or ratings."""
    harness = sorted(key.removeprefix("dense/") for key in found if key.startswith("dense/lm_eval/"))
    if harness:
        shown = [key for key in harness if "stderr" not in key]
        return [_row(key[8:], [number(found.get(f"{stage}/{key}"), 4) for stage in STAGES]) for key in shown]
    if "dense/empty" in found:
        shown = sorted(key[6:] for key in found if key.startswith(("dense/score", "dense/rouge")))
        shown += [key for key in ("judged", "unjudged", "empty") if f"dense/{key}" in found]
        return [
            _row(key.replace("/", " "), [_rated(found.get(f"{stage}/{key}")) for stage in STAGES]) for key in shown
        ]
    if metrics.EVAL_EXAMPLES.key not in found:
        return [_row("perplexity", [_perplexity(found, stage) for stage in STAGES])]
    lines = {"accuracy": "", "by likelihood": "option_"}
    present = {title: prefix for title, prefix in lines.items() if f"dense/{prefix}accuracy" in found}
    rows = [_row(title, [_accuracy(found, stage, prefix) for stage in STAGES]) for title, prefix in present.items()]
    counts = {"unparsed": "unparsed"} if "accuracy" in present else {}
    broken = {"broken": "broken", "broken by likelihood": "option_broken"}
    counts |= {title: key for title, key in broken.items() if any(f"{stage}/{key}" in found for stage in STAGES)}
    return rows + [_row(title, [number(found.get(f"{s}/{key}"), 0) for s in STAGES]) for title, key in counts.items()]


def _accuracy(found: dict[str, Any], stage: str, prefix: str) -> str:
    if f"{stage}/{prefix}correct" not in found:
        return "—"
    share = 100 * found[f"{stage}/{prefix}accuracy"]
    return f"{share:.1f} % ({found[f'{stage}/{prefix}correct']})"


def _rated(value: float | int | None) -> str:
    """A count as it is, a rating or a share with its digits."""
    return number(value, 0 if isinstance(value, int) else 3)


def _perplexity(found: dict[str, Any], stage: str) -> str:
    if f"{stage}/{metrics.BREAKS_AT}" in found:
        return "NaN"
    return number(found.get(f"{stage}/perplexity"), metrics.DENSE_PERPLEXITY.digits)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded so that it reads as plain text too."""
    columns = zip(*[header, *rows], strict=True)
    widths = [max(len(str(cell)) for cell in column) for column in columns]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def latex(
    header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, label: str, notes: Sequence[str] = ()
) -> str:
    """The same table for a paper (booktabs), shrunk to the text width where it is wider, its notes below it."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_escape(str(cell)) for cell in cells) + r" \\"

    return "\n".join(
        [
            r"% needs \usepackage{booktabs,adjustbox}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape(caption)}}}",
            rf"\label{{{label}}}",
            r"\begin{adjustbox}{max width=\textwidth}",
            r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}",
            r"\toprule",
            line(header),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{adjustbox}",
            *(rf"\par\smallskip{{\footnotesize {_escape(note)}\par}}" for note in notes),
            r"\end{table}",
        ]
    )


def latex_figure(file: str, caption: str, label: str) -> str:
    """A figure float around an image that lies beside the document."""
    return "\n".join(
        [
            r"% needs \usepackage{graphicx}",
            r"\begin{figure}",
            r"\centering",
            rf"\includegraphics[width=\textwidth]{{{file}}}",
            rf"\caption{{{_escape(caption)}}}",
            rf"\label{{{label}}}",
            r"\end{figure}",
        ]
    )


_SIGNS = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%_#${}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "—": "---",
        "×": r"$\times$",
        "≥": r"$\geq$",
        "<": r"$<$",
        ">": r"$>$",
        "·": r"$\cdot$",
    }
)


def _escape(text: str) -> str:
    return text.translate(_SIGNS)
