"""Import DeepSpeed, without compiling anything.

python try_deepspeed.py cpu|cuda
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys


def main(device: str) -> None:
    """Import it; its own output is dropped."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed = importlib.import_module("deepspeed")
    sys.stdout.write(json.dumps({"deepspeed": str(deepspeed.__version__)}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
