"""``--out`` of benchmarks: an earlier result may be replaced, any other file is refused before hours of measuring."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc_oialr.errors import OIALRError
from hpc_oialr.outputs import claim, marked

RESULT = marked("a benchmark's result", b'{\n "rows": ', mark=b'"environment": ')


def result_file(text: str) -> Path:
    """The path, as argparse's ``type``."""
    try:
        claim(text, RESULT, force=None)
    except OIALRError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)
