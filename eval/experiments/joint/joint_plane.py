"""Joint-token heads on joints with known probabilities: the distributions that one pass of the backbone can sample.

    joint_toys   the heads of a table (eval/suites/joint_toys.toml), each trained on each joint with several seeds
    poker        the same in a minute: names of poker hands, two words, both from one pass

The report row `JOINT_HEAD_tv` is the mean over seeds of the total variation between the joint and the head in one pass,
`_tv_N` in N passes, `_valid` the head's mass on strings of the joint, `_spread` the standard deviation of the first,
`_seconds` the processor time of training one head. The lower bounds (lower_bounds.py): `JOINT_floor_kl` and `_floor_tv`
of any distribution with independent tokens, `_floor_marginals` of the maximum-likelihood one, `_floor_samples` of as
many exact samples. `_plain_tv` is autoregressive decoding.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field, model_validator

from eval.experiments.joint.distances import sampling_error
from eval.experiments.joint.joints import Table
from eval.experiments.joint.lab import Group, HeadLine, LabOptions, Measured, check_lines, known_table, run_group
from eval.experiments.joint.lower_bounds import least_product_tv, marginal_product, marginals_tv, total_correlation
from eval.experiments.joint.pictures import pair_frequencies, table_picture
from eval.jobs import run_jobs
from eval.plots import grid
from eval.task import Context, Curve, Measure, Outcome, Panel, TaskOptions, task
from omni.config import nearest
from omni.media import save_png
from omni.rng import Key

Results = Mapping[str, Sequence[Group]]  # joint -> one group of heads per seed


class ToysOptions(TaskOptions):
    """heads: the table, by name. only: names of those to run; none is all. workers: processes that share the runs."""

    run: LabOptions = LabOptions()
    joints: tuple[str, ...] = ("poker_s6",)
    heads: dict[str, HeadLine] = Field(default_factory=dict)
    only: tuple[str, ...] = ()
    seeds: int = Field(default=3, ge=1)
    workers: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> ToysOptions:
        for name in self.only:
            if name not in self.heads:
                raise ValueError(f"there is no head {name!r} in the table{nearest(name, self.heads)}")
        return self

    @property
    def chosen(self) -> dict[str, HeadLine]:
        """The heads to run, by name."""
        return {name: line for name, line in self.heads.items() if not self.only or name in self.only}

    def of(self, joint: str) -> dict[str, HeadLine]:
        """The lines that run on a joint."""
        return {name: line for name, line in self.chosen.items() if not line.joints or joint in line.joints}


def ends_of(line: HeadLine, length: int) -> list[str]:
    """Ends of the report rows of a head."""
    return [*(tv_name(n) for n in line.numbers(length)), "valid", "spread", "seconds"]


def tv_name(passes: int) -> str:
    """The end of the row of total variation in this many passes."""
    return "tv" if passes == 1 else f"tv_{passes}"


def toys_rows(options: ToysOptions) -> list[str]:
    """All report rows; suites set bars on these names."""
    lower_bounds = [f"{j}_{name}" for j in options.joints for name in (*BOUNDS, "plain_tv")]
    return lower_bounds + [
        f"{j}_{name}_{end}"
        for j in options.joints
        for name, line in options.of(j).items()
        for end in ends_of(line, known_table(j).length)
    ]


@task("joint_toys", ToysOptions, rows=toys_rows)
def joint_toys(context: Context, options: ToysOptions) -> Outcome:
    """Joint-token heads on known joints: total variation of one pass, against proven lower bounds."""
    results = run_all(context, options)
    measures, notes = [], [conditions(options)]
    for joint in options.joints:
        found = lower_bounds(known_table(joint), options.run.num_samples, context.key("floors", joint))
        measures += [Measure(f"{joint}_{name}", value, BOUNDS[name]) for name, value in found.items()]
        measures += [Measure(f"{joint}_{name}", value, unit) for name, value, unit in head_rows(results[joint])]
        notes.append(table_of(joint, found, results[joint]))
    return Outcome(measures, curves=curves(results), notes=notes)


class PokerOptions(ToysOptions):
    """joints: one, of pairs of words. folder: of the output picture."""

    run: LabOptions = LabOptions(backbone_steps=300, head_steps=400, num_samples=40_000)
    seeds: int = Field(default=1, ge=1)
    folder: str = "runs/eval"

    @model_validator(mode="after")
    def _one_joint(self) -> PokerOptions:
        if len(self.joints) != 1 or known_table(self.joints[0]).length != 2 or not known_table(self.joints[0]).words:
            raise ValueError(f"poker shows one joint of pairs of words, such as poker_s6, not {', '.join(self.joints)}")
        return self


def poker_rows(options: PokerOptions) -> list[str]:
    """`toys_rows` without the name of the one joint."""
    cut = len(options.joints[0]) + 1
    return [row[cut:] for row in toys_rows(options)]


@task("poker", PokerOptions, rows=poker_rows)
def poker(context: Context, options: PokerOptions) -> Outcome:
    """Two words of a poker hand from one pass: a head with independent tokens emits "high pair"."""
    [name] = options.joints
    joint, groups = known_table(name), run_all(context, options)[name]
    found = lower_bounds(joint, options.run.num_samples, context.key("floors", name))
    measures = [Measure(row, value, BOUNDS[row]) for row, value in found.items()]
    measures += [Measure(row, value, unit) for row, value, unit in head_rows(groups)]
    notes = [conditions(options), table_of(name, found, groups), *examples(joint, groups[0])]
    return Outcome(measures, hand_panels(joint, groups[0], Path(options.folder) / "poker.png"), notes=notes)


# ---- running -------------------------------------------------------------------------------------------------------


def run_all(context: Context, options: ToysOptions) -> dict[str, list[Group]]:
    """One job for every joint and seed. A result does not depend on other jobs or on the worker."""
    check_lines(options.joints, options.chosen, options.run)
    jobs = [
        (joint, options.of(joint), options.run, context.key("joints", joint, seed))
        for joint in options.joints
        for seed in range(options.seeds)
    ]
    found: dict[int, Group] = {}
    for number, group in run_jobs(run_group, jobs, options.workers):
        found[number] = group
        values = "  ".join(f"{name} {head.distances[1].tv:.3f}" for name, head in group.heads.items())
        context.report(f"  {len(found)}/{len(jobs)} {jobs[number][0]}  plain {group.plain.tv:.3f}  {values}")
    results: dict[str, list[Group]] = {}
    for number, job in enumerate(jobs):  # in the order of the list
        results.setdefault(job[0], []).append(found[number])
    return results


# ---- what is read off ----------------------------------------------------------------------------------------------

# Report row of a lower bound -> its unit.
BOUNDS = {"entropy": "nats", "floor_kl": "nats", "floor_tv": "", "floor_marginals": "", "floor_samples": ""}


def lower_bounds(joint: Table, num_samples: int, key: Key) -> dict[str, float]:
    """The values of BOUNDS for a joint."""
    return {
        "entropy": joint.entropy(),
        "floor_kl": total_correlation(joint),
        "floor_tv": least_product_tv(joint, key),
        "floor_marginals": marginals_tv(joint),
        "floor_samples": sampling_error(joint, num_samples),
    }


def head_rows(groups: Sequence[Group]) -> Iterator[tuple[str, float, str]]:
    """(row, value, unit) over the seeds of one joint."""
    yield "plain_tv", statistics.fmean(group.plain.tv for group in groups), ""
    for name in groups[0].heads:
        runs = [group.heads[name] for group in groups]
        for n in runs[0].distances:
            yield f"{name}_{tv_name(n)}", mean_tv(runs, n), ""
        yield f"{name}_valid", statistics.fmean(run.distances[1].valid for run in runs), ""
        yield f"{name}_spread", statistics.stdev(run.distances[1].tv for run in runs) if len(runs) > 1 else 0.0, ""
        yield f"{name}_seconds", statistics.fmean(run.seconds for run in runs), "s"


def mean_tv(runs: Sequence[Measured], passes: int = 1) -> float:
    """The mean over seeds of the total variation."""
    return statistics.fmean(run.distances[passes].tv for run in runs)


def conditions(options: ToysOptions) -> str:
    """Sizes, steps and seeds, for the notes."""
    run = options.run
    return (
        f"{options.seeds} seed(s); a transformer of {run.depth} layers of {run.width}; {run.backbone_steps} steps of "
        f"{run.rows} strings for autoregressive decoding, then {run.head_steps} (or the line's own) for each "
        "head, the backbone frozen; total variation from the likelihood on all strings where it is exact, else from "
        f"{run.num_samples:,} draws"
    )


def table_of(joint: str, found: Mapping[str, float], groups: Sequence[Group]) -> str:
    """One line per head: mean +- spread of the total variation, mass on strings that exist, how it was measured."""
    rows = {name: value for name, value, _ in head_rows(groups)}
    head = f"{joint}: any product {found['floor_tv']:.3f}, that of marginals {found['floor_marginals']:.3f}, "
    lines = [head + f"exact samples {found['floor_samples']:.3f}, autoregressive decoding {rows['plain_tv']:.3f}"]
    for name, run in groups[0].heads.items():
        tv = f"{rows[f'{name}_tv']:.3f} +- {rows[f'{name}_spread']:.3f}"
        how = "likelihood" if run.exact else "draws"
        lines.append(f"{name:24}{tv:>18}  valid {rows[f'{name}_valid']:.3f}  {rows[f'{name}_seconds']:.0f} s  {how}")
    return "\n".join(lines)


def curves(results: Results) -> list[Curve]:
    """Total variation against passes, where any head samples in more than one."""
    found = []
    for joint, groups in results.items():
        lines = {
            name: [(float(n), mean_tv([g.heads[name] for g in groups], n)) for n in head.distances]
            for name, head in groups[0].heads.items()
        }
        if any(len(line) > 1 for line in lines.values()):
            found.append(Curve(joint, "passes", "total variation", lines))
    return found


def examples(joint: Table, group: Group) -> list[str]:
    """How often each head emits an impossible pair: the likeliest one of the product of marginals."""
    marginals = joint.marginals()
    illegal = torch.where(joint.full() > 0, -1.0, marginals[0][:, None] * marginals[1])
    first, second = divmod(int(illegal.argmax()), joint.vocab_size)
    message = f'"{joint.words[first]} {joint.words[second]}", which is no hand'
    shares = {"independent words": float(illegal.max())}
    shares |= {
        name: float(pair_frequencies(head.ids, joint.vocab_size)[first, second]) for name, head in group.heads.items()
    }
    return [f"{message}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())]


def hand_panels(joint: Table, group: Group, path: Path) -> list[Panel]:
    """The distribution of the pairs, also as a file: the joint, the product of marginals, and each head's samples."""
    legal, marginals = joint.full() > 0, joint.marginals()
    tables = {"the_joint": joint.full(), "product_of_marginals": marginals[0][:, None] * marginals[1]}
    tables |= {name: pair_frequencies(head.ids, joint.vocab_size) for name, head in group.heads.items()}
    cells = [(name, table_picture(probs, legal, joint.words)) for name, probs in tables.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid([cells[i : i + 3] for i in range(0, len(cells), 3)]), path)
    tv = {name: f"total variation {head.distances[1].tv:.3f}" for name, head in group.heads.items()}
    tv["product_of_marginals"] = f"{float(marginal_product(joint).sum()):.1%} of its mass is on hands"
    return [Panel(name.replace("_", " "), answer=(pixels,), note=tv.get(name, "")) for name, pixels in cells]
