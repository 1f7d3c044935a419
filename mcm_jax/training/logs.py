"""What a run reports: one JSON line and one TensorBoard event each time."""

import json
import pathlib
import time
from collections.abc import Mapping
from contextlib import suppress

from mcm_jax.files import write_atomically


class Log:
    """The reports of a workdir. Lines after the resumed step are dropped: they come again.

    Args:
      workdir: of the run.
      resumed_step: steps that were done before.
    """

    def __init__(self, workdir: pathlib.Path, resumed_step: int):
        # Slow to import. SummaryWriter would write in a thread of its own, which dies on a full disk: the run hangs.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resumed_step]
            write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        events = workdir / "tensorboard" / "events"
        events.parent.mkdir(exist_ok=True)
        self._events = EventsWriter(str(events), filename_suffix=f".{resumed_step}")
        if resumed_step:  # TensorBoard hides what older files have from this step on
            again = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=resumed_step + 1, session_log=again))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a report. Raises OSError where it cannot be written."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for key, value in metrics.items():
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(key, value)))
        self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        with suppress(OSError):  # a full disk was reported when it was written to
            self._events.close()
