"""The equality contract of `omni.verify` on the suite's model: cached = uncached = training forward, in float32."""

from __future__ import annotations

from eval.task import Context, Measure, Outcome, TaskOptions, task
from omni.verify import verify


@task("contract", TaskOptions, rows=("largest_difference", "text_bits"))
def contract(context: Context, options: TaskOptions) -> Outcome:
    """Largest difference of logits and of F between the three ways of computing them, and of text-only logits."""
    checks = verify(context.model, context.seed)
    exact = [check for check in checks if check.bar == 0]
    close = [check for check in checks if check.bar > 0]
    return Outcome(
        [
            Measure("largest_difference", max(check.value for check in close), "absolute"),
            Measure("text_bits", sum(check.value for check in exact), "differing entries"),
        ],
        notes=[f"{check.name}: {check.value:.3g} (bar {check.bar:.3g})" for check in checks],
    )
