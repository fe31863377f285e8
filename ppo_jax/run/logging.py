"""Logs of a run: JSON lines of metrics, samples and faults; TensorBoard; Weights & Biases."""

import math
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ppo_jax.run.files import LINES, append_lines, synced_size

# The metrics of an update that a fault made the run skip.
SKIPPED = {"faults/skipped": 1.0}
# Number of responses to the same prompts before and after training that a person is shown.
PAIRS = 3
# The progress bar of a run; in 80 columns it has room for the time left and four numbers.
BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
Rows = Iterable[Mapping[str, Any]]


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Replace numbers that are not finite by None, because JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def measured(metrics: Mapping[str, float], *, waits: bool) -> dict[str, float]:
    """Leave out what an update did not measure because the policy waited for its critic.

    Args:
      metrics: the metrics of an update, by name.
      waits: whether the update is one of the critic's warm-up.

    Example:
      >>> metrics = {"loss/total": math.nan, "loss/value": 0.5}
      >>> measured(metrics, waits=True)
      {'loss/value': 0.5}
    """
    of_critic = ("critic/", "value/", "loss/value")  # A NaN of these is a fault.
    return {
        name: x
        for name, x in metrics.items()
        if not (waits and math.isnan(x)) or name.startswith(of_critic)
    }


def progress_text(
    metrics: Mapping[str, float], shown: Mapping[str, str], evaluated: int | None = None
) -> str:
    """Return the metrics that the progress bar shows, as a text.

    Args:
      metrics: the metrics, by name. One that is missing is left out.
      shown: for each short name on the bar, the name of its metric.
      evaluated: the number of updates before the evaluation whose metrics are shown, if known.

    Example:
      >>> shown = {"kl": "objective/kl", "eval": "eval/scores"}
      >>> progress_text({"objective/kl": 0.51234, "eval/scores": 2.0}, shown, evaluated=40)
      'kl=0.512, eval=2@40'
    """
    at = "" if evaluated is None else f"@{evaluated}"
    return ", ".join(
        f"{short}={metrics[name]:z.3g}{at if name.startswith('eval/') else ''}"
        for short, name in shown.items()
        if name in metrics
    )


class NoLog:
    """A `RunLog` that writes nothing, for all processes but the first."""

    def metrics(self, update: int, metrics: Mapping[str, float]) -> None:
        """Write nothing."""

    def samples(self, update: int, rows: Rows) -> None:
        """Write nothing."""

    def evaluation(self, update: int, rows: Rows) -> None:
        """Write nothing."""

    def fault(self, update: int, kind: str, message: str, rows: Rows) -> None:
        """Write nothing."""

    def sizes(self) -> dict[str, int]:
        """Return no sizes."""
        return {}

    def close(self) -> None:
        """Close nothing."""


class RunLog:
    """Appends to the files of a run.

    `sizes` says how long they are at a checkpoint, and `files.cut_back` removes what came after.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        first_update: int = 0,
        settings: Mapping[str, Any] | None = None,
    ):
        """Open the logs.

        Args:
          folder: the run's folder.
          tensorboard: write TensorBoard events.
          wandb_project: the Weights & Biases project, or None.
          first_update: the update that the run starts with or is resumed from.
          settings: the run's settings, which TensorBoard and Weights & Biases show.

        Raises:
          ValueError: if Weights & Biases is not installed or does not start.
        """
        self._folder = folder
        self._board = None
        if tensorboard:
            from ppo_jax.run.tensorboard import EventWriter  # imports PyTorch where it finds it

            # The evaluation before the first update has the number -1.
            start = first_update if first_update else -1
            self._board = EventWriter(folder / "tensorboard", start)
            self._board.settings(start, settings or {})
        self._wandb = None
        if wandb_project is not None:
            self._wandb = _start_wandb(folder, wandb_project, first_update, settings or {})

    def metrics(self, update: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of an update, or of the evaluation before the first one (-1)."""
        append_lines(self._folder / "metrics.jsonl", [{"update": update, **finite(metrics)}])
        if self._board is not None:
            self._board.scalars(update, metrics)
        if self._wandb is not None and update < 0:  # Weights & Biases has no step before 0.
            self._wandb.summary.update({f"before/{name}": x for name, x in metrics.items()})
        elif self._wandb is not None:
            self._wandb.log(dict(metrics), step=update)

    def samples(self, update: int, rows: Rows) -> None:
        """Write sampled texts of an update."""
        self._texts("samples", update, list(rows))

    def evaluation(self, update: int, rows: Rows) -> None:
        """Write responses to held-out prompts, after an update or before the first one (-1)."""
        self._texts("evaluations", update, list(rows))

    def _texts(self, name: str, update: int, rows: list[Mapping[str, Any]]) -> None:
        lines = [{"update": update, **row} for row in rows]
        append_lines(self._folder / f"{name}.jsonl", lines)
        if self._board is not None and rows:
            self._board.texts(update, name, rows)
        if self._wandb is not None and rows:
            self._wandb.log({name: _wandb_table(rows)}, step=max(update, 0))

    def fault(self, update: int, kind: str, message: str, rows: Rows) -> None:
        """Write the rows that a fault concerns, with its kind and message."""
        fault = {"update": update, "kind": kind, "message": message}
        append_lines(self._folder / "faults.jsonl", [{**fault, **row} for row in rows])

    def sizes(self) -> dict[str, int]:
        """Flush the files of lines to the disk and return their sizes in bytes."""
        return {name: synced_size(self._folder / name) for name in LINES}

    def close(self) -> None:
        """Close TensorBoard and Weights & Biases."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(folder: Path, project: str, first_update: int, settings: Mapping[str, Any]) -> Any:
    """Start a run of Weights & Biases, or continue it if this run is resumed.

    The run's id is kept in the folder. Updates that a resumed run repeats are there already, with
    the same numbers, and are not logged again.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "Weights & Biases is not installed; pip install 'ppo-jax[wandb]'."
        ) from error
    id_file = folder / "wandb" / "run_id.txt"
    if first_update == 0 or not id_file.exists():
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(secrets.token_hex(8))
    try:
        return wandb.init(
            project=project,
            name=folder.resolve().name,
            dir=folder,
            config=dict(settings),
            id=id_file.read_text(),
            resume="allow",
        )
    except wandb.errors.Error as error:
        raise ValueError(f"Weights & Biases does not start: {error}") from error


def _wandb_table(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Make a table of the columns of sampled texts that a person reads."""
    import wandb

    columns: list[str | int] = ["prompt", "response", "score"]
    return wandb.Table(
        columns=columns, data=[[row.get(str(name)) for name in columns] for row in rows]
    )
