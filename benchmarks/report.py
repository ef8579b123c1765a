"""Load time of the report page, in headless Chromium: a run of 200 layers and 500 updates, made up.

Only the record's size matters here, so its numbers are random. Needs the program ``chromium`` and the extras
``report`` and ``test``. The time runs from the moment the page is asked for until all charts are drawn.

    python -m benchmarks.report --out benchmarks/results/report.json
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, sync_playwright

from benchmarks.common import arguments, finish
from hpc_oialr.report.page import write_report
from hpc_oialr.report.runs import find_runs
from hpc_oialr.spectra.files import write_record
from hpc_oialr.spectra.schema import EVENT, KINDS, LayerRows


def main() -> None:
    """Make the record, write the page, open it."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--k", type=int, default=768, help="singular values a layer")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record, page = Path(folder, "spectra.h5"), Path(folder, "report.html")
        make_record(record, given.layers, given.updates, given.k)
        begin = time.perf_counter()
        write_report(find_runs([record]), page)
        seconds, size = time.perf_counter() - begin, page.stat().st_size
        loads = load_seconds(page, given.repeats)
    row = {
        "layers": given.layers,
        "updates": given.updates,
        "k": given.k,
        "page_mib": size / 2**20,
        "write_s": seconds,
        "load_median_s": statistics.median(loads),
        "load_least_s": min(loads),
        "load_most_s": max(loads),
    }
    finish([row], given.out, chromium=shutil.which("chromium"))


def make_record(path: Path, layers: int, updates: int, k: int) -> None:
    """A record of the schema's form: r falls from k to k/4, every quantity is there."""
    generator = np.random.default_rng(0)
    made = (_layer(generator, number, updates, k) for number in range(layers))
    write_record(path, {"config": {}, "environment": {}, "seed": 0, "world_size": 1}, made)


def _layer(generator: np.random.Generator, number: int, updates: int, k: int) -> LayerRows:
    name = f"model.layers.{number // 4}.{('q_proj', 'k_proj', 'fc1', 'fc2')[number % 4]}"
    events = _events(generator, updates, k)
    values = np.sort(generator.random((updates, k), dtype=np.float32))[:, ::-1].copy()
    values[np.arange(k) >= events["r_before"][:, None]] = np.nan
    return LayerRows(name, number, 4 * k, k, events, values)


def load_seconds(page: Path, repeats: int) -> list[float]:
    """Of fresh browser contexts, after one that warms the program up."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        seconds = [_load(browser, page) for _ in range(repeats + 1)]
        browser.close()
    return seconds[1:]


def _load(browser: Browser, page: Path) -> float:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_function("document.documentElement.dataset.drawn")
    drawn_ms = float(tab.evaluate("document.documentElement.dataset.drawn"))
    context.close()
    return drawn_ms / 1e3


def _events(generator: np.random.Generator, updates: int, k: int) -> np.ndarray:
    events = np.zeros(updates, dtype=EVENT)
    events["t"] = 100 * np.arange(1, updates + 1)
    events["kind"] = KINDS["update"]
    events["kind"][0] = KINDS["conversion"]
    events["r"] = np.linspace(k, k // 4, updates).round()
    events["r_before"] = np.concatenate([[k], events["r"][:-1]])
    events["cut_values"] = events["r_before"] - events["r"]
    for name in (name for name in EVENT.names or () if EVENT[name].kind == "f"):
        events[name] = generator.random(updates)
    events["noise_edge"] = 0.3
    return events


if __name__ == "__main__":
    main()
