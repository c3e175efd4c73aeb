"""Figures of the GPU benchmark as a picture: one panel for each table, one mark for each library that ran a case."""

from __future__ import annotations

from pathlib import Path

from flash_attn_det.commands.figures import Result, groups

MARK = 0.2  # inches that one library of one case takes


def _bars(axes, results: list[Result], name: str, ys: list[float], height: float, colour: str) -> None:
    """TFLOP/s, from 0: longer is better."""
    rates = [result.case.flop / result.figures[name].seconds / 1e12 for result in results]
    drawn = axes.barh(ys, rates, height, label=name, color=colour)
    axes.bar_label(drawn, fmt="%.4g", padding=2, fontsize=7)


def _points(axes, results: list[Result], name: str, ys: list[float], height: float, colour: str) -> None:
    """Microseconds on a logarithmic scale, which has no 0 for bars to begin at: further left is better."""
    times = [result.figures[name].seconds * 1e6 for result in results]
    axes.plot(times, ys, "o", label=name, color=colour, markersize=5)
    for x, y in zip(times, ys, strict=True):
        axes.annotate(f"{x:.4g}", (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7)


def _panel(axes, title: str, results: list[Result], colours: dict[str, str]) -> None:
    """The first case on top; the libraries of a case under one another, each in its own colour."""
    replay = results[0].case.replay
    names = [name for name in colours if any(name in result.libraries for result in results)]
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        timed = [(y, result) for y, result in enumerate(results) if name in result.figures]
        ys = [y + (place - (len(names) - 1) / 2) * height for y, _ in timed]
        if timed:
            (_points if replay else _bars)(axes, [result for _, result in timed], name, ys, height, colours[name])
    axes.set_yticks(range(len(results)), [result.case.shape for result in results], fontsize=8)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.margins(x=0.12)
    if replay:
        axes.set_xscale("log")
        axes.grid(axis="x", which="both", alpha=0.2)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("microseconds, left is better" if replay else "TFLOP/s, right is better", fontsize=8)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def draw(path: Path, results: list[Result]) -> None:
    """Rates of prefills and microseconds of what is replayed, in one picture."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = {title: group for title, group in groups(results).items() if any(result.figures for result in group)}
    names = dict.fromkeys(name for result in results for name in result.libraries)
    colours = dict(zip(names, colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]))
    heights = [1 + MARK * sum(len(result.libraries) for result in group) for group in panels.values()]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (title, group) in zip(rows, panels.items(), strict=True):
        _panel(axes, title, group, colours)
    figure.savefig(path, dpi=120)
