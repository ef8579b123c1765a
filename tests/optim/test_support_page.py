"""docs/support.md, the results it is made of, the registry, and the tests of its rows belong together."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from benchmarks.support import PAGE, RESULT, ROOT, WRAPPERS, page
from hpc_oialr.optim.state_kinds import OPTIMIZERS

ROWS = json.loads(RESULT.read_text())["rows"]
HELP = "run python -m benchmarks.support"


def test_every_optimizer_of_the_registry_and_every_wrapper_has_a_row() -> None:
    assert {row["optimizer"]: row["state"] for row in ROWS if "optimizer" in row} == OPTIMIZERS, HELP
    wrappers = {row["wrapper"]: (row["how"], tuple(row["tests"])) for row in ROWS if "wrapper" in row}
    assert wrappers == WRAPPERS, HELP


def test_no_row_has_failed_and_what_was_not_tried_is_few() -> None:
    untried = {row.get("optimizer") or row["wrapper"] for row in ROWS if row["result"] != "passed"}
    assert untried <= {"bitsandbytes.Optimizer1State", "bitsandbytes.Optimizer2State"}


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page(json.loads(RESULT.read_text())), HELP


def test_the_tests_of_the_rows_exist() -> None:
    for name, (_, tests) in WRAPPERS.items():
        for test in tests:
            file, _, function = test.partition("::")
            tree = ast.parse((ROOT / Path(file)).read_text())
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert not function or function in names, (name, test)
