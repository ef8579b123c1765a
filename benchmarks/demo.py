"""The demo, `oialr compare fashion_mnist_vit --own`, kept as a result file with the plot beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import arguments, finish

KEYS = ("metric_name", "metric", "wall_s", "update_wall_s", "trainable_params", "peak_memory_gib", "steps")


def main() -> None:
    """Run both sides, or take a finished comparison."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--run", type=Path, help="folder of a finished comparison, e.g. runs/demo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run or Path(scratch) / "demo"
        if options.run is None:
            command = [
                sys.executable,
                "-m",
                "hpc_oialr",
                "compare",
                "fashion_mnist_vit",
                "--own",
                "--out",
                str(folder),
            ]
            subprocess.run(command, check=True)
        result = json.loads((folder / "compare.json").read_text())
        rows = [{"side": side, **{key: result[side][key] for key in KEYS}} for side in ("dense", "oialr")]
        finish(rows, options.out, **result)
        if options.out is not None:
            shutil.copyfile(folder / "compare.png", options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
