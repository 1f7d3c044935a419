"""The picture of a sweep: the metric over each axis, and the curves of all trials."""

import functools
import io
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from mcm_jax.files import write_atomically
from mcm_jax.sweep.outcomes import DIVERGED, Outcome, Setting, settings_of

_COLUMNS = 3
_NAMED = 6  # lines with a name and a colour of their own; all others are grey
_GREY = "0.75"


def draw(outcomes: Sequence[Outcome], path: pathlib.Path, metric: str) -> bool:
    """Draws the sweep.

    Args:
      outcomes: of all trials.
      path: of the PNG.
      metric: by which they are ranked.

    Returns:
      Whether it was drawn: without matplotlib it is not, and that is said.

    Raises:
      OSError: it cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # pyplot would look for a display
    except ImportError:
        _say(f"{path.name} is left out: it needs matplotlib (pip install 'mcm-jax[sweep]')")
        return False
    rows = [row for row in settings_of(outcomes, metric) if row.scores]
    axes = list(rows[0].labels) if rows else []
    panels = len(axes) + 1
    columns = min(panels, _COLUMNS)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for plot, axis in zip(grid, axes, strict=False):
        _over(plot, axis, rows, metric)
    _curves(grid[panels - 1], outcomes, rows, metric)
    for plot in grid[panels:]:
        plot.remove()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomically(path, data.getvalue())
    return True


_say = functools.cache(print)  # once, not after each trial


def _over(plot: Any, axis: str, rows: Sequence[Setting], metric: str) -> None:
    """The metric over one axis, a line for each setting of the others, the best first."""
    in_order = sorted(rows, key=lambda row: row.outcomes[0].trial.number)
    values = list(dict.fromkeys(row.labels[axis] for row in in_order))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    values = sorted(values) if numeric else values
    at = {v: v if numeric else i for i, v in enumerate(values)}
    lines: dict[str, list[Setting]] = {}
    for row in rows:
        lines.setdefault(_named(row, axis), []).append(row)
    for i, (name, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda row: at[row.labels[axis]])
        x, y = [at[row.labels[axis]] for row in line], [row.mean for row in line]
        how = {"color": f"C{i}", "label": name or None, "zorder": 3} if i < _NAMED else {"color": _GREY}
        plot.errorbar(x, y, [row.spread or 0 for row in line], marker="o", markersize=4, capsize=3, **how)
    if numeric and min(values) > 0 and max(values) >= 8 * min(values):
        plot.set_xscale("log")
    if not numeric or len(values) <= 6:
        plot.set_xticks([at[v] for v in values], [f"{v:g}" if numeric else _text(v) for v in values])
        plot.minorticks_off()
    if not numeric:
        plot.tick_params(axis="x", labelrotation=30 if len(values) > 3 else 0)
    plot.set_xlabel(_text(axis))
    plot.set_ylabel(_text(metric))
    if any(lines):
        plot.legend(fontsize=7)


def _curves(plot: Any, outcomes: Sequence[Outcome], rows: Sequence[Setting], metric: str) -> None:
    """A curve for each trial: of the metric, or of the loss where that is measured at the end only."""
    shown = metric if any(len(_curve(o, metric)) > 1 for o in outcomes) else "loss"
    best = {o.trial.number: (i, row) for i, row in enumerate(rows[:_NAMED]) for o in row.outcomes}
    named = set()
    for outcome in outcomes:
        curve = _curve(outcome, shown)
        if not curve:
            continue
        how: dict[str, Any] = {"color": _GREY, "linewidth": 1}
        if outcome.trial.number in best:
            i, row = best[outcome.trial.number]
            how = {"color": f"C{i}", "linewidth": 1.5, "zorder": 3}
            how |= {} if i in named else {"label": _named(row) or None}
            named.add(i)
        if outcome.status == DIVERGED:
            how |= {"linestyle": ":", "color": "red"}
        plot.plot(*zip(*curve, strict=True), marker="o" if len(curve) == 1 else None, **how)
    if shown.endswith(("loss", "mse")):
        plot.set_yscale("log")
    plot.set_xlabel("step")
    plot.set_ylabel(_text(shown))
    if any(plot.get_legend_handles_labels()[1]):
        plot.legend(fontsize=7)


def _curve(outcome: Outcome, name: str) -> list[tuple[float, float]]:
    return [(r["step"], r[name]) for r in outcome.reports if math.isfinite(r.get(name, math.nan))]


def _named(row: Setting, without: str = "") -> str:
    shown = {axis: v for axis, v in row.labels.items() if axis != without}
    return _text(", ".join(f"{axis}={v:g}" if isinstance(v, float) else f"{axis}={v}" for axis, v in shown.items()))


def _text(value: Any) -> str:
    """As it is: matplotlib would take what stands between dollars for mathematics."""
    return str(value).replace("$", r"\$")
