"""Pictures of the report page and two figures of a comparison, for the README.

The ones in the repository are of the demo, whose figures are in ``results/demo.json``:

    make demo
    python -m benchmarks.report_pictures runs/demo

Needs the program ``chromium`` and the extras ``plot``, ``report`` and ``test``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from hpc_oialr.report.page import write_report
from hpc_oialr.report.plots import inner_dimension, save, stability
from hpc_oialr.report.runs import Run, find_runs

RESULTS = Path(__file__).parent / "results"
# The head of the page by day, the layers by night.
PICTURES = {"light": ("header", "#progress"), "dark": ("#layers", "#spectrum")}
BORDER = 24


def main() -> None:
    """Write the page beside the runs, and all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of oialr compare")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default benchmarks/results")
    given = parser.parse_args()
    runs = find_runs([given.folder])
    page = write_report(runs, given.folder / "report.html")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for theme in PICTURES:
            print(take(browser, page, theme, given.out / f"report_{theme}.png"))
        browser.close()
    for path in figures(runs[-1], given.out):
        print(path)


def take(browser: Browser, page: Path, theme: str, picture: Path) -> Path:
    """A picture of the page from one of its parts to another."""
    context = browser.new_context(color_scheme=theme, viewport={"width": 1200, "height": 900})
    tab = context.new_page()
    tab.goto(page.resolve().as_uri())
    tab.wait_for_function("document.documentElement.dataset.drawn")
    first, last = (tab.locator(part).bounding_box() for part in PICTURES[theme])
    assert first is not None
    assert last is not None
    top = max(0, first["y"] - BORDER)
    clip = {"x": 0, "y": top, "width": 1200, "height": last["y"] + last["height"] + BORDER - top}
    tab.screenshot(path=picture, full_page=True, clip=clip)
    context.close()
    return picture


def figures(run: Run, folder: Path) -> list[Path]:
    """Stability and r of a run."""
    assert run.spectra is not None
    heat_map = inner_dimension(run.spectra, width="double", last_step=run.last_step)
    return [
        save(stability(run.spectra, width="double"), folder / "stability.png"),
        save(heat_map, folder / "r_heatmap.png"),
    ]


if __name__ == "__main__":
    main()
