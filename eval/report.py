"""One self-contained HTML page of a suite's results: table, pictures beside their references, curves.

No script, no network: pictures are PNG data URLs, curves are inline SVG. All text is escaped. Pictures are uint8
(H, W, 3) tensors. Panels that failed come first; at most MAX_PANELS per task are shown, and the page says so.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import torch

from eval.results import Row, TaskResult
from eval.task import Curve, Panel

MAX_PANELS = 60
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#57606a")
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#1f2328}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;border-bottom:1px solid #d0d7de;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}td.no{background:#ffebe9;font-weight:600}
td.yes{background:#dafbe1}code{font-size:12px}h2{margin-top:2.5rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));gap:.8rem}
figure{margin:0;border:1px solid #d0d7de;border-radius:6px;padding:.6rem}figure.wrong{border:2px solid #d1242f}
figcaption{font-size:13px;overflow-wrap:anywhere}.side{display:flex;flex-wrap:wrap;gap:.5rem;margin-top:.4rem}
.side div{font-size:11px;color:#57606a}img{image-rendering:pixelated;min-width:96px;border:1px solid #eee;display:block}
.note{color:#57606a;font-size:13px;white-space:pre-wrap}svg text{font-size:11px;fill:#57606a}
"""


def html_report(title: str, results: Sequence[TaskResult], conditions: str) -> str:
    """The whole page as text."""
    rows = [row for result in results for row in result.rows]
    failing = sum(not row.holds for row in rows)
    verdict = "Every bar holds." if not failing else f"{failing} bar(s) do not hold."
    body = [
        f"<h1>{escape(title)}</h1><p>{verdict} {escape(conditions)}.</p>",
        _table(rows),
        *(_section(result) for result in results),
    ]
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _table(rows: Sequence[Row]) -> str:
    lines = ["<table><tr><th>name<th>value<th>unit<th>bar<th>holds<th>command</tr>"]
    for row in rows:
        mark = "" if row.bar is None else ("yes" if row.holds else "no")
        value = "nan" if row.value is None else f"{row.value:.6g}"
        name = f"<td title='{escape(row.note)}'>{escape(row.name)}"
        lines.append(
            f"<tr>{name}<td class='number'>{value}<td>{escape(row.unit)}<td>{escape(row.bar or '')}"
            f"<td class='{mark}'>{mark}<td><code>{escape(row.command)}</code></tr>"
        )
    return "".join(lines) + "</table>"


def _section(result: TaskResult) -> str:
    outcome = result.outcome
    parts = [f"<h2>{escape(result.name)}</h2><p class='note'>{result.seconds:.1f} s</p>"]
    parts += [f"<p class='note'>{escape(note)}</p>" for note in outcome.notes]
    parts += [_curve(curve) for curve in outcome.curves]
    if outcome.panels:
        shown = sorted(outcome.panels, key=lambda panel: panel.right is not False)[:MAX_PANELS]
        total = len(outcome.panels)
        if total > len(shown):
            parts.append(f"<p class='note'>{len(shown)} of {total} examples, failures first.</p>")
        parts.append("<div class='panels'>" + "".join(_panel(panel) for panel in shown) + "</div>")
    return "".join(parts)


def _panel(panel: Panel) -> str:
    kind = " class='wrong'" if panel.right is False else ""
    sides = [
        f"<div>{label}<br>{image_tag(pixels)}</div>"
        for label, pictures in (("given", panel.given), ("reference", panel.reference), ("answer", panel.answer))
        for pixels in pictures
    ]
    note = f"<div class='note'>{escape(panel.note)}</div>" if panel.note else ""
    caption = f"<figcaption>{escape(panel.request)}</figcaption>"
    return f"<figure{kind}>{caption}<div class='side'>{''.join(sides)}</div>{note}</figure>"


def image_tag(pixels: torch.Tensor) -> str:
    """An <img> with the picture inside it as a PNG data URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.cpu().contiguous().numpy()).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"<img alt='' width='96' src='data:image/png;base64,{data}'>"


def _curve(curve: Curve, width: int = 640, height: int = 240, margin: int = 44) -> str:
    points = [point for line in curve.lines.values() for point in line]
    if not points:
        return ""
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return margin + across * (width - 2 * margin), height - margin - up * (height - 2 * margin)

    parts = [f"<svg width='{width}' height='{height}' role='img'>"]
    parts.append(f"<text x='{margin}' y='16'>{escape(curve.title)}</text>")
    for i, (name, line) in enumerate(curve.lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in line))
        parts.append(f"<polyline fill='none' stroke='{colour}' stroke-width='1.5' points='{path}'/>")
        at = f"x='{width - margin}' y='{16 + 13 * i}' text-anchor='end'"
        parts.append(f"<text {at} style='fill:{colour}'>{escape(name)}</text>")
    labels = ((x_low, margin, "start"), (x_high, width - margin, "end"))
    for value, at, anchor in labels:
        parts.append(f"<text x='{at}' y='{height - margin + 16}' text-anchor='{anchor}'>{value:g}</text>")
    for value, at in ((y_low, height - margin), (y_high, margin)):
        parts.append(f"<text x='{margin - 4}' y='{at + 4}' text-anchor='end'>{value:.3g}</text>")
    parts.append(f"<text x='{width / 2:.0f}' y='{height - 8}' text-anchor='middle'>{escape(curve.x_label)}</text>")
    parts.append(f"<text x='4' y='{margin - 12}'>{escape(curve.y_label)}</text></svg>")
    return "".join(parts)
