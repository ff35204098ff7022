"""Line charts by matplotlib (extra `plots`): pictures for files, SVG for a page. No window, no global state.

`charts` lays panels out in a row with one legend; a name has one colour and marker in all of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    Line = Sequence[tuple[float, float]]

COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#000000",
    "#7f7f7f", "#0b3d91", "#b8860b", "#006d5b", "#c71585", "#5f9ea0",
)  # fmt: skip
MARKERS = "osD^v"  # the next one after each round of the colours, and past ten lines
DPI = 100  # so that a figure of 9 x 2.6 inches has 900 x 260 pixels


def require_matplotlib() -> Any:
    """The package. ImportError that names the extra where it is missing: call it before work that a chart ends."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise ImportError("charts need matplotlib: pip install 'omni-flow[plots]'") from None
    return matplotlib


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of this many pixels."""
    return require_matplotlib().figure.Figure((width / DPI, height / DPI), DPI, layout="constrained")


def charts(
    panels: Mapping[str, Mapping[str, Line]], x_label: str, y_label: str, size: tuple[int, int], log: bool = False
) -> Figure:
    """Panels by title, each with lines by name. size: pixels of a panel (width, height); the legend comes beside.

    log: both axes are logarithmic, every x has a tick, and points that are not finite and positive are left out.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    legend = 40 + 7 * max((len(name) for name in names), default=0)
    figure = new_figure(size[0] * len(panels) + legend, max(size[1], 30 + 18 * len(names)))
    handles: dict[str, Any] = {}
    with require_matplotlib().rc_context({"text.parse_math": False}):
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, lines) in zip(row, panels.items(), strict=True):
            axes.set(title=title, xlabel=x_label, ylabel=y_label if axes is row[0] else "")
            axes.grid(color="#e2e2e2", linewidth=0.7)
            for name, line in lines.items():
                shown = [(x, y) for x, y in line if math.isfinite(y) and (not log or min(x, y) > 0)]
                style = _style(names.index(name), log)
                [handles[name]] = axes.plot([x for x, _ in shown], [y for _, y in shown], **style)
            if log:
                _log_axes(axes, sorted({x for line in lines.values() for x, _ in line if x > 0}))
        if names:
            figure.legend([handles[n] for n in names], names, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _style(number: int, marked: bool) -> dict[str, Any]:
    """Colour and marker of the line of this number."""
    marker = MARKERS[number // 10 % len(MARKERS)] if marked else ""
    return {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.5, "marker": marker, "markersize": 4}


def _log_axes(axes: Any, ticks: Sequence[float]) -> None:
    """Make both axes logarithmic, with these ticks of x."""
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xticks([], minor=True)
    plain_numbers(axes.yaxis)


def plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, or round numbers where fewer than two are within
    it; written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    within = [tick for tick in LogLocator(subs=(1, 2, 5)).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if len(within) > 1 else MaxNLocator(4))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def to_picture(figure: Figure) -> Image.Image:
    """Of the size that the figure was made with, in a palette: a third of the file."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    picture = Image.open(buffer).convert("RGB")
    return picture.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def to_svg(figure: Figure) -> str:
    """An <svg> element for an HTML page: text stays text, and nothing in it names an address."""
    matplotlib = require_matplotlib()
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    for name, address in (("xmlns:xlink", "1999/xlink"), ("xmlns", "2000/svg")):  # an HTML parser knows both
        element = element.replace(f' {name}="http://www.w3.org/{address}"', "", 1)
    return element.strip()
