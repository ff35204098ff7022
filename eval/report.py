"""One self-contained HTML page of a suite's results: table, pictures beside their references, curves.

No script, no network: pictures are PNG data URLs, curves are inline SVG. All text is escaped. Pictures are uint8
(H, W, 3) tensors. Panels that failed come first; at most MAX_PANELS per task are shown, and the
page states how many of how many.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import torch

from eval.results import Row, TaskResult
from eval.task import Curve, Panel
from train.charts import charts, to_svg

MAX_PANELS = 60
CURVE = (520, 260)  # pixels
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#1f2328}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;border-bottom:1px solid #d0d7de;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}td.no{background:#ffebe9;font-weight:600}
td.yes{background:#dafbe1}code{font-size:12px}h2{margin-top:2.5rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));gap:.8rem}
figure{margin:0;border:1px solid #d0d7de;border-radius:6px;padding:.6rem}figure.wrong{border:2px solid #d1242f}
figcaption{font-size:13px;overflow-wrap:anywhere}.side{display:flex;flex-wrap:wrap;gap:.5rem;margin-top:.4rem}
.side div{font-size:11px;color:#57606a}img{image-rendering:pixelated;min-width:96px;border:1px solid #eee;display:block}
.note{color:#57606a;font-size:13px;white-space:pre-wrap}
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
    """The rows as an HTML table."""
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
    """Notes, curves and panels of a task."""
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
    """One example as a figure."""
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


def _curve(curve: Curve) -> str:
    """The curve as inline SVG; where matplotlib is missing, what to install."""
    if not any(curve.lines.values()):
        return ""
    try:
        figure = charts({curve.title: curve.lines}, curve.x_label, curve.y_label, CURVE)
    except ImportError as error:
        return f"<p class='note'>{escape(curve.title)}: {escape(str(error))}</p>"
    return f"<div>{to_svg(figure)}</div>"
