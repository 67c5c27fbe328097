"""What benchmarks of ops measured, side by side: as a table, and as a plot (with matplotlib)."""

from __future__ import annotations

UNITS = {"tb_per_s": "TB/s", "tflop_per_s": "TFLOP/s", "tokens_per_s": "tokens/s"}


def merged(results: list[dict]) -> dict[str, dict]:
    """{benchmark: its result}, where several results of one benchmark measured different rows."""
    found: dict[str, dict] = {}
    for result in results:
        known = found.setdefault(result["benchmark"], result | {"results": []})
        known["results"] = known["results"] + result["results"]
    return found


def table(result: dict) -> list[str]:
    """Lines: a row for each direction and case, a column for each path, in it the rate, or "-" where it raised."""
    rates: dict[tuple, dict[str, str]] = {}
    paths = list(dict.fromkeys(row["path"] for row in result["results"]))
    for row in result["results"]:
        case = (row["direction"], *(str(row[label]) for label in result["labels"]))
        rate = row.get(result["rate"])
        rates.setdefault(case, {})[row["path"]] = "-" if rate is None else f"{rate:.4g}"
    widths = [max(9, len(path)) + 1 for path in paths]
    lines = [f"{result['benchmark']}, {result['dtype']}, {UNITS[result['rate']]}",
             "".join(f"{head:>13}" for head in ("direction", *result["labels"]))
             + "".join(f"{path:>{width}}" for path, width in zip(paths, widths))]
    for case, row in sorted(rates.items(), key=lambda item: item[0][0], reverse=True):
        lines.append("".join(f"{word:>13}" for word in case)
                     + "".join(f"{row.get(path, ''):>{width}}" for path, width in zip(paths, widths)))
    return lines


def draw(result: dict, file: str) -> None:
    """Write a plot, in the format that the file's ending names: a panel for each direction and case, in it the rate
    over the case's last label, a line for each path. Rows without a rate, of paths that raised, are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    *others, size = result["labels"]
    panels: dict[str, dict[str, list]] = {}
    for row in result["results"]:
        title = ", ".join([*(f"{label.replace('_', ' ')} {row[label]}" for label in others), row["direction"]])
        lines = panels.setdefault(title, {})
        if "error" not in row:
            lines.setdefault(row["path"], []).append((row[size], row[result["rate"]]))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items()):
        for path, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=path)
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel=size, ylabel=UNITS[result["rate"]])
        axes.set_ylim(bottom=0)
        if lines:
            axes.legend(fontsize="small")
    figure.suptitle(f"{result['benchmark']}, {result['dtype']}, {result['device']}, torch {result['torch']}, "
                    f"triton {result['triton']}, {result['date']}")
    figure.savefig(file)
