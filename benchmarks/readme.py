"""Writes the tables of README and docs from the committed result files, so that no number there is typed by hand.

`python -m benchmarks.readme` rewrites what stands between the markers `<!-- NAME -->` and
`<!-- end NAME -->`; with `--check` it changes nothing, and the exit code is 1 if a page is out of date. Figures within
sentences are compared with the result files: see `pages/claims.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from benchmarks.pages.accuracy import budgets, cifar, cifar_gpu, convolutions, demo, ett, settings, stability, text
from benchmarks.pages.claims import missing
from benchmarks.pages.contents import contents
from benchmarks.pages.finetune import finetune
from benchmarks.pages.method import (
    bases_conversion,
    bases_h100,
    bases_trained,
    bases_windows,
    budgets_trials,
    detection,
)
from benchmarks.pages.operators import operators, operators_distributed, streaming
from benchmarks.pages.rivals import rivals
from benchmarks.pages.speed import gpu, image_shards, layer, record, serve, step
from benchmarks.pages.systems import engines, life, plan, scaling, support, traffic
from benchmarks.pages.tables import ROOT

PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCKS: dict[str, Callable[[], str]] = {
    "contents": contents,
    "demo": demo,
    "bases_conversion": bases_conversion,
    "bases_h100": bases_h100,
    "bases_trained": bases_trained,
    "bases_windows": bases_windows,
    "budgets": budgets,
    "budgets_trials": budgets_trials,
    "cifar": cifar,
    "cifar_gpu": cifar_gpu,
    "convolutions": convolutions,
    "detection": detection,
    "finetune": finetune,
    "gpu": gpu,
    "ett": ett,
    "image_shards": image_shards,
    "layer": layer,
    "step": step,
    "serve": serve,
    "settings": settings,
    "engines": engines,
    "traffic": traffic,
    "plan": plan,
    "life": life,
    "operators": operators,
    "operators_distributed": operators_distributed,
    "record": record,
    "rivals": rivals,
    "scaling": scaling,
    "stability": stability,
    "streaming": streaming,
    "support": support,
    "text": text,
}


def rendered(text: str) -> str:
    """The README with every block regenerated."""
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if pattern.search(text):
            body = block()
            text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is out of date")
    before = {page: page.read_text() for page in PAGES}
    after = {page: rendered(text) for page, text in before.items()}
    if parser.parse_args(arguments).check:
        if before != after:
            sys.exit(1)
    else:
        for page, text in after.items():
            page.write_text(text)
    names = {page: page.relative_to(ROOT).as_posix() for page in PAGES}
    if wrong := [f"{names[page]}: {claim}" for page, text in after.items() for claim in missing(names[page], text)]:
        sys.exit("Result files say otherwise; must stand in the text:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
