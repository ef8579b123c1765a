"""The rows of ``metrics.jsonl`` for TensorBoard as well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_oialr.errors import MissingExtraError


class TensorBoard:
    """Writes every number of a row as a scalar of its step.

    Parameters
    ----------
    folder
        Where the event files go.
    step
        Steps done already; what an earlier run wrote after them is hidden.

    Raises
    ------
    MissingExtraError
        If tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            purpose = "record.tensorboard"
            raise MissingExtraError("tensorboard", "tensorboard", purpose=purpose) from None
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row; its ``split`` leads the names."""
        prefix = f"{row['split']}/" if "split" in row else "train/"
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("step", "total_steps"):
                self._writer.add_scalar(prefix + name, value, row["step"])

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()
