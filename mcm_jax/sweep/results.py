"""What is written of a sweep, after each trial: a table, a report, a picture, and TensorBoard's page of HParams."""

import csv
import io
import pathlib
import shlex
import time
from collections.abc import Sequence
from typing import Any

from mcm_jax import config
from mcm_jax.files import write_atomically
from mcm_jax.sweep.outcomes import DIVERGED, DONE, ENDED, OF_THE_MACHINE, STATUSES, Outcome, best_of, settings_of
from mcm_jax.sweep.plots import draw
from mcm_jax.training.actions import DIVERGED as DIVERGED_FILE
from mcm_jax.training.actions import less_is_better

_OF_ONE_LOSS = ("loss", "held_out_loss")  # their scale is the weighting's
_OF_ONE_SIGHT = (*_OF_ONE_LOSS, "mse", "held_out_mse")  # of conditions hidden, and noise drawn, as the trial's own are
_OF_WHAT_IS_SHOWN = ("modalities.", "data.prompt_drop_rate", "draws.")
_OF_THE_EXAMPLES = ("base.", "data.name", "data.path", "data.seed", "data.held_out_share", "data.partial")
_OF_THE_EXAMPLES += ("train.held_out",)


def write(outcomes: Sequence[Outcome], workdir: pathlib.Path, metric: str, command: Sequence[str]) -> None:
    """Writes ``results.csv``, ``results.md``, ``results.png``, and of each trial what TensorBoard's HParams page shows.

    Args:
      outcomes: of all trials.
      workdir: of the sweep.
      metric: by which they are ranked.
      command: words of the command that trains the config alone, without its workdir.

    Raises:
      OSError: they cannot be written.
    """
    for outcome in outcomes:
        if outcome.status in ENDED:
            _write_hparams(outcome, workdir / outcome.trial.name / "tensorboard")
    write_atomically(workdir / "results.csv", _table(outcomes).encode())
    drawn = draw(outcomes, workdir / "results.png", metric)
    write_atomically(workdir / "results.md", _report(outcomes, workdir, metric, command, drawn).encode())


def _table(outcomes: Sequence[Outcome]) -> str:
    """A line for each trial, with the last of all its numbers."""
    axes = list(outcomes[0].trial.labels)
    names = sorted({name for o in outcomes for name in o.numbers})
    names.sort(key=lambda name: name in OF_THE_MACHINE)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    apart = [f"last {name}" if name in axes else name for name in names]  # the rate at the end is not the rate swept
    writer.writerow(["trial", "workdir", "status", "step", *axes, *apart])
    for o in outcomes:
        own = [o.trial.number, o.trial.name, o.status, o.step, *o.trial.labels.values()]
        writer.writerow([*own, *(o.numbers.get(name, "") for name in names)])
    return text.getvalue()


def counts(outcomes: Sequence[Outcome]) -> str:
    """How many trials have come how far, in words."""
    found = [o.status for o in outcomes]
    parts = [f"{found.count(s)} {s}" for s in STATUSES if s in found]
    return f"{len(outcomes)} trials: {', '.join(parts)}"


def commands(best: Outcome, workdir: pathlib.Path, command: Sequence[str]) -> tuple[str, str]:
    """What a shell trains a trial with alone, in a folder beside the sweep's, and what it samples the trial with.

    ``PICTURE`` stands for conditions that the user has: there are pictures of the scenes only.
    """
    trial, cache = best.trial, best.trial.settings.cache
    changes = dict(trial.overrides) | ({"cache.path": cache.path} if cache.mode != "off" else {})
    texts = {key: _typed(value) for key, value in changes.items()}
    kept = [word for word in command if not word.startswith(tuple(f"--config.{key}=" for key in texts))]
    alone = [*kept, *(f"--config.{key}={value}" for key, value in texts.items()), f"--workdir={workdir}_best"]
    conditions = []
    for m in trial.settings.modalities.shown:
        flag = f"--{m.name}" if m.name in ("segmentation", "sketch") else f"--condition={m.name}"
        shipped = trial.settings.data.name == "scenes"
        conditions.append(f"{flag}=" + (f"docs/examples/{m.name}.png" if shipped else "PICTURE"))
    sample = ["python", "sample.py", f"--workdir={workdir / trial.name}", *conditions]
    return shlex.join(alone), shlex.join([*sample, f"--out={workdir / 'samples'}"])


def _typed(value: Any) -> str:
    """A value as it is typed after ``--config.KEY=``; a shell puts texts in a tuple into single quotes as a whole."""
    return str(tuple(value)).replace("'", '"') if isinstance(value, list) else str(value)


def summary(outcomes: Sequence[Outcome], workdir: pathlib.Path, metric: str, command: Sequence[str]) -> str:
    """The end of a sweep in a few lines."""
    lines = [counts(outcomes), *_unranked(outcomes, metric)]
    if best := best_of(settings_of(outcomes, metric), metric):
        alone, sample = commands(best, workdir, command)
        lines += [f"best by {metric}: {best.trial}, {_number(best.score(metric))}", f"  {alone}", f"  {sample}"]
    return "\n".join([*lines, f"{workdir / 'results.md'} has them all"])


def _report(
    outcomes: Sequence[Outcome], workdir: pathlib.Path, metric: str, command: Sequence[str], drawn: bool
) -> str:
    rows = settings_of(outcomes, metric)
    axes = list(rows[0].labels)
    better = "lower" if less_is_better(metric) else "higher"
    seeded = any(len(row.outcomes) > 1 for row in rows)
    lines = [f"# {workdir.name}", "", f"{counts(outcomes)}.", ""]
    over = "; mean and standard deviation over seeds" if seeded else ""
    nothing = "" if any(o.status == DONE for o in outcomes) else " None is done yet, so that none is ranked."
    lines += [f"Ranked by the last `{metric}` of each trial, {better} is better{over}.{nothing}", ""]
    lines += [line for text in _unranked(outcomes, metric) for line in (text, "")]
    if caution := _caution(outcomes, metric):
        lines += [caution, ""]
    lines += [_row(["", *axes, metric, "trials"]), _row(["---"] * (len(axes) + 3))]
    for place, row in enumerate(rows, 1):
        value = "" if not row.scores else _number(row.mean)
        value += "" if row.spread is None else f" ± {_number(row.spread)}"
        trials = ", ".join(str(o.trial.number) + ("" if o.status == DONE else f" ({o.status})") for o in row.outcomes)
        lines.append(_row([str(place) if row.scores else "", *map(_cell, row.labels.values()), value, trials]))
    if best := best_of(rows, metric):
        alone, sample = commands(best, workdir, command)
        lines += ["", "## The best", "", f"`{best.trial.name}`, {metric} {_number(best.score(metric))}.", ""]
        yours = " (PICTURE: a condition of yours)" if "=PICTURE" in sample else ""
        lines += [f"It trains alone, and samples{yours}, with", "", "```bash", alone, sample, "```"]
    if diverged := [o for o in outcomes if o.status == DIVERGED]:
        lines += ["", "## Diverged", ""]
        lines += [f"- {o.trial}: `{workdir / o.trial.name / DIVERGED_FILE}` has the batch" for o in diverged]
    if drawn:
        lines += ["", "![The metric over each axis, and all curves](results.png)"]
    return "\n".join(lines) + "\n"


def _unranked(outcomes: Sequence[Outcome], metric: str) -> list[str]:
    """A line on the trials that are done without the number that ranks; none where there are none."""
    lacking = [o for o in outcomes if o.status == DONE and o.score(metric) is None]
    if not lacking:
        return []
    which, known = ", ".join(str(o.trial.number) for o in lacking), ", ".join(sorted(lacking[0].numbers))
    return [f"Not ranked, as they are done without a finite `{metric}`: trials {which}. METRIC may be one of {known}."]


def _caution(outcomes: Sequence[Outcome], metric: str) -> str:
    """What a reader must know of numbers that do not compare."""
    flat = [config.flatten(o.trial.settings) for o in outcomes]
    keys = sorted({key for o in outcomes for key in o.trial.overrides})
    different = [k for k in keys if len({str(values.get(k)) for values in flat}) > 1]
    of_loss = [k for k in different if k.startswith("loss.")] if metric in _OF_ONE_LOSS else []
    seen = different if metric in _OF_ONE_SIGHT else []
    of_draws = [k for k in seen if k.startswith(_OF_WHAT_IS_SHOWN)]
    of_examples = [k for k in seen if k.startswith(_OF_THE_EXAMPLES)]
    if not of_loss and not of_draws and not of_examples:
        return ""
    other = "" if of_draws else '`METRIC = "held_out_mse"` in the sweep file, or '
    way_out = "." if of_examples else f": {other}control (`mean_iou`) ranks them all."
    return (
        f"The trials differ in {', '.join(of_loss + of_draws + of_examples)}, and `{metric}` compares only where these "
        f"are the same{way_out}"
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _write_hparams(outcome: Outcome, folder: pathlib.Path) -> None:
    """A file of events for TensorBoard's HParams page, once a trial has ended."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import hparams

    if list(folder.glob("*.hparams")):
        return
    folder.mkdir(exist_ok=True)  # one that diverged before its first report has none
    for half in folder.glob("*.hparams.tmp"):
        half.unlink()
    measured = [name for name in outcome.numbers if name not in OF_THE_MACHINE]
    experiment, start, end = hparams(dict(outcome.trial.labels), dict.fromkeys(measured, 0.0))
    events = EventsWriter(str(folder / "events"), filename_suffix=".hparams.tmp")
    for summary_ in (experiment, start, *([end] if outcome.status == DONE else [])):
        events.write_event(Event(wall_time=time.time(), step=0, summary=summary_))
    events.close()
    for whole in folder.glob("*.hparams.tmp"):
        whole.replace(whole.with_suffix(""))
