"""What a run reports: to JSON lines, TensorBoard and, if asked, Weights & Biases, each time the same numbers."""

import json
import pathlib
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically


class Writer(Protocol):
    """Where reports go."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a report. Raises OSError where it cannot be written."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class Log:
    """All writers of a run.

    Args:
      workdir: of the run; gets ``metrics.jsonl`` and ``tensorboard/``.
      resumed_step: steps that were done before. Reports of later ones are dropped: they come again.
      wandb: project of Weights & Biases; '' for none.
      config: of the run, for that.
      active: whether this process writes; the others' reports go nowhere.

    Raises:
      UserError: Weights & Biases is asked for and not installed, or cannot begin.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        resumed_step: int,
        *,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        active: bool = True,
    ):
        self._writers: list[Writer] = []
        if active:
            self._writers = [JsonLines(workdir, resumed_step), TensorBoard(workdir, resumed_step)]
        if active and wandb:
            self._writers.append(WandB(workdir, wandb, config or {}))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a report everywhere. Raises OSError where it cannot be written."""
        for writer in self._writers:
            writer.write(step, metrics)

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers:
            writer.close()


class JsonLines:
    """``metrics.jsonl``: one object a line."""

    def __init__(self, workdir: pathlib.Path, resumed_step: int):
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resumed_step]
            write_atomically(self.path, "".join(line + "\n" for line in kept).encode())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self) -> None:
        """Nothing is open between two reports."""


class TensorBoard:
    """``tensorboard/``: one file of events for each time that the run goes on."""

    def __init__(self, workdir: pathlib.Path, resumed_step: int):
        # Slow to import. SummaryWriter would write in a thread of its own, which dies on a full disk: the run hangs.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        events = workdir / "tensorboard" / "events"
        events.parent.mkdir(exist_ok=True)
        goes_on = any(events.parent.glob("events*"))  # whether a checkpoint was left or not
        self._events = EventsWriter(str(events), filename_suffix=f".{resumed_step}")
        if goes_on:  # TensorBoard hides what older files have from this step on
            again = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=resumed_step + 1, session_log=again))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a scalar for each number."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for key, value in metrics.items():
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(key, value)))
        self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        with suppress(OSError):  # a full disk was reported when it was written to
            self._events.close()


def check_wandb(project: str) -> None:
    """Raises UserError where Weights & Biases' client is not installed."""
    try:
        import wandb  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"config.train.wandb={project!r} needs the package wandb (pip install 'mcm-jax[wandb]'), or leave it "
            f"'': metrics.jsonl and tensorboard/ have the same numbers"
        ) from e


class WandB:
    """Weights & Biases, by its own client: one run there for each workdir, which a resumed one goes on with."""

    def __init__(self, workdir: pathlib.Path, project: str, config: Mapping[str, Any]):
        check_wandb(project)
        import wandb

        name_file = workdir / "wandb_run"
        if not name_file.exists():
            write_atomically(name_file, secrets.token_hex(4).encode())
        run_id = name_file.read_text().strip()
        try:
            self._run = wandb.init(
                project=project, id=run_id, name=workdir.name, dir=str(workdir), config=dict(config), resume="allow"
            )
        except Exception as e:  # its own errors, and whatever a network has
            reason = (str(e).strip() or repr(e)).splitlines()[0]
            raise UserError(
                f"config.train.wandb={project!r}: Weights & Biases cannot begin its run ({reason}). Log in (wandb "
                f"login), or set WANDB_MODE=offline and send it later (wandb sync), or leave it '': metrics.jsonl and "
                f"tensorboard/ have the same numbers"
            ) from e

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends a report."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Waits until all was sent."""
        self._run.finish()
