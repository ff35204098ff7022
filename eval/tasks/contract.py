"""The equality contract of `omni.generation.contract` on the suite's model: cached = uncached = training forward.

The float64 difference is absolute; the float32 difference is relative to the largest number compared.
"""

from __future__ import annotations

from eval.task import Context, Measure, Outcome, TaskOptions, task
from omni.generation.contract import verify


@task("contract", TaskOptions, rows=("largest_difference", "rounding", "text_bits"))
def contract(context: Context, options: TaskOptions) -> Outcome:
    """Largest difference of logits and of F between the three computations, and of text-only logits.

    largest_difference: in float64, absolute. rounding: in float32, relative to the largest.
    """
    checks = verify(context.model, context.seed)
    by_unit = {unit: [check.value for check in checks if check.unit == unit] for unit in {c.unit for c in checks}}
    return Outcome(
        [
            Measure("largest_difference", max(by_unit["absolute"]), "float64, absolute"),
            Measure("rounding", max(by_unit["of the largest"]), "float32, of the largest"),
            Measure("text_bits", sum(by_unit["entries"]), "differing entries"),
        ],
        notes=[f"{check.name}: {check.value:.3g} (bar {check.bar:.3g})" for check in checks],
    )
