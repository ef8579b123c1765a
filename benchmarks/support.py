"""What works together: every optimizer of the registry and every wrapper, as their tests come out here.

``python -m benchmarks.support`` runs the tests of each row, writes ``benchmarks/results/support.json``, and from it
``docs/support.md`` and the README's tables; with names of optimizers behind it, the tests of these only. Optimizers of
packages that are not installed keep an earlier result.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import readme
from benchmarks.common import Row
from hpc_oialr.optim.state_kinds import INSTEAD, OPTIMIZERS, REFUSED
from hpc_oialr.record.environment_report import environment_report

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "benchmarks/results/support.json", ROOT / "docs/support.md"
FACTORED_OPTIMIZERS = [f"{p}.Adafactor" for p in ("torch", "transformers")] + [
    "pytorch_optimizer.AdaFactor",
    "pytorch_optimizer.CAME",
]
OPTIMIZER_TEST = "tests/optim/test_supported.py::test_trains_converts_cuts_and_resumes"

_DDP = "tests/engines/test_ddp_wrapper.py::test_the_users_wrapper_goes_on_with_every_option"
_OTHER = "tests/engines/test_ddp_wrapper.py::test_compiled_around_python_reducer_mixed_precision_no_sync_and_refusals"
_SEVERAL = "tests/optim/test_stack.py::test_optimizers_of_several_processes"
_HANDED_ON = "tests/optim/test_stack.py::test_handing_on_changes_nothing"
_COPIES = "tests/method/test_copies.py"
_TRANSFORMS = "tests/lowrank/test_transforms.py"
_AROUND, _RESUME = "tests/method/test_surroundings.py", "tests/method/test_resume_order.py"

# What wraps a model or an optimizer, or goes round a loop: how it behaves, and the tests that say so.
WRAPPERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "DistributedDataParallel": (
        "works; the wrapper stays the user's own object, with its options; refused: delay_all_reduce_named_params, one "
        "axis of a larger device_mesh, hooks that step",
        (_DDP, _OTHER),
    ),
    "DistributedDataParallel, static_graph or find_unused_parameters": ("works", (_DDP,)),
    "DistributedDataParallel, communication hooks (fp16, PowerSGD)": (
        "works; PowerSGD's state is reset",
        (_DDP,),
    ),
    "DistributedDataParallel, mixed_precision": (
        "kept; its forward pass needs a GPU and was not run",
        (_OTHER,),
    ),
    "DistributedDataParallel created after OIALR(...), or around the model inside oialr's own wrapper": (
        "an error in its first forward pass",
        (f"{_AROUND}::test_wrappers_that_are_not_kept_up_to_date_and_lost_synchronisation_are_errors",),
    ),
    "DistributedDataParallel.join()": (
        "an error in oialr.step()",
        (f"{_AROUND}::test_wrappers_that_are_not_kept_up_to_date_and_lost_synchronisation_are_errors",),
    ),
    "parameters that DistributedDataParallel ignores": (
        "stay dense, the rest works",
        (f"{_AROUND}::test_wrappers_that_are_not_kept_up_to_date_and_lost_synchronisation_are_errors",),
    ),
    "fully_shard (FSDP2)": ("works", ("tests/engines/test_fsdp.py::test_a_model_its_user_has_sharded",)),
    "DataParallel, FullyShardedDataParallel (FSDP1)": (
        "refused at OIALR(...)",
        ("tests/engines/test_single.py::test_other_wrappers_are_refused",),
    ),
    "torch.compile": (
        "works, inside or around DistributedDataParallel",
        ("tests/method/test_compile.py", _OTHER),
    ),
    "torch.func (grad, vmap, jvp, vjp, jacrev, jacfwd, hessian, functional_call), forward-mode AD": (
        "works",
        (f"{_TRANSFORMS}::test_as_the_dense_layer",),
    ),
    "double and third backward, gradient penalties": (
        "works",
        (
            f"{_TRANSFORMS}::test_as_the_dense_layer",
            f"{_TRANSFORMS}::test_gradient_penalty_trains_the_core_as_the_weight",
        ),
    ),
    "torch.export": ("works, with dynamic shapes", (f"{_TRANSFORMS}::test_export_with_any_batch",)),
    "torch.jit.trace": ("works", (f"{_TRANSFORMS}::test_as_the_dense_layer",)),
    "torch.jit.script, torch.fx.symbolic_trace": (
        "an error; merge(model) can be scripted and traced",
        (f"{_TRANSFORMS}::test_script_and_symbolic_trace_are_errors_until_merged",),
    ),
    "AveragedModel (EMA, SWA)": (
        "works, given as averages=",
        ("tests/method/test_oialr.py::test_averages_follow",),
    ),
    "AveragedModel as the model": (
        "refused at OIALR(...)",
        (f"{_AROUND}::test_other_wrappers_are_refused_with_what_to_do",),
    ),
    "two controllers on one model": (
        "refused at OIALR(...); after detach() of the first, or once it is gone, the second goes on from its layers",
        (
            f"{_AROUND}::test_a_second_controller_is_refused_naming_the_first",
            f"{_RESUME}::test_a_low_rank_model_goes_on_under_a_new_controller",
        ),
    ),
    "stopping and loading at any step, with any of these optimizers, wrappers and options together": (
        "bitwise identical to an uninterrupted run; load the structure (model or controller) before the optimizer",
        (
            "tests/optim/test_properties.py::test_on_one_process",
            "tests/optim/test_properties.py::test_on_two_processes",
        ),
    ),
    "load_state_dict of another r, or of the dense phase, in any order and of any part": (
        "works; for live FSDP, TensorParallel and DeepSpeed models an error that names the call to use",
        (
            "tests/method/test_loading.py::test_a_model_of_any_phase_loads_into_one_of_any_other",
            "tests/method/test_loading.py::test_parts_of_a_model_load_too",
            f"{_RESUME}::test_one_projection_of_an_attention_loads_with_its_optimizer",
            "tests/engines/test_live_loads.py::test_split_models_say_what_to_call",
        ),
    ),
    "a low-rank state loaded before OIALR(...) (Lightning, Trainer)": (
        "works after match_structure(model, state_dict)",
        (
            f"{_RESUME}::test_a_state_loaded_before_the_controller_is_made_is_the_same_run",
            f"{_RESUME}::test_lightnings_order_on_two_processes",
        ),
    ),
    "Accelerate's prepare() before or after OIALR(...)": (
        "works on one process; on several call prepare() first, then OIALR(...) with its results",
        (f"{_RESUME}::test_an_empty_optimizer_state_belongs_to_no_structure", _HANDED_ON, _DDP),
    ),
    "autocast, GradScaler, accumulation, clipping, activation checkpointing": (
        "works",
        ("tests/method/test_oialr.py::test_autocast_accumulation_clipping_and_checkpointing",),
    ),
    "optimizer.step(closure)": ("works", (_HANDED_ON,)),
    "optimizers that delegate to `.optimizer` (Accelerate)": ("works", (_HANDED_ON,)),
    "Lookahead": ("works; slow weights follow", ("tests/optim/test_stack.py::test_slow_weights_follow",)),
    "SAM, several optimizers in a list": (
        "works",
        ("tests/optim/test_stack.py::test_sharpness_aware_and_chained",),
    ),
    "ZeroRedundancyOptimizer": (
        "works; not with parameters_as_bucket_view, overlap_with_ddp or muon_adamw",
        (_SEVERAL,),
    ),
    "PostLocalSGDOptimizer": ("works", (_SEVERAL,)),
    "L-BFGS": (
        "works; its history is reset at every change",
        ("tests/optim/test_stack.py::test_lbfgs_goes_on_with_a_new_history",),
    ),
    "torch.distributed.checkpoint": ("works", ("tests/optim/test_distributed_checkpoint.py",)),
    "copies and pickles of controller, optimizer and model": (
        "works on one process; refused on several",
        (
            f"{_COPIES}::test_controller_and_optimizer_together",
            f"{_COPIES}::test_model_and_optimizer_without_the_controller",
            "tests/optim/test_properties.py::test_on_two_processes",
        ),
    ),
    "one optimizer per parameter, in backward hooks": (
        "named in a warning at OIALR(...), an error after four steps in which cores stay as they are",
        (
            f"{_COPIES}::test_cores_that_only_hooks_would_train_are_an_error",
            f"{_COPIES}::test_optimizers_that_no_inspection_finds_train_no_step_after_the_conversion",
        ),
    ),
    "a second optimizer, made in the middle of a run": (
        "an error after three steps",
        (f"{_COPIES}::test_an_optimizer_made_anew_is_noticed",),
    ),
    "optimizers that keep their own lists or copies of parameters": (
        "refused at OIALR(...)",
        ("tests/optim/test_stack.py::test_lists_of_an_optimizers_own_are_refused",),
    ),
    "state of unknown meaning": (
        "an error before anything is changed; declare it by register_optimizer_state(...)",
        (
            "tests/optim/test_state_kinds.py::test_unknown_state_changes_nothing_and_the_line_of_the_message_helps",
            "tests/optim/test_state_kinds.py::test_state_of_another_form_is_refused",
        ),
    ),
}


_HEAD = """# What works with what

Written by `python -m benchmarks.support` from the outcome of the tests of each row; not edited by hand.

## Optimizers

Each was trained through the conversion and two cuts, stopped, and resumed bitwise identically. Its state is
transformed with the change of variables `W = U S Vh`: a *gradient* (anything linear in it, or a direction) and a
*weight* (a copy, average or anchor of it) exactly; a *square* of gradients and a *magnitude* as if entries were
uncorrelated. *Centred*: the variance as a square, the mean as a gradient.""".splitlines()

_BETWEEN = f"""
Any other optimizer works if its state keys have these names and meanings, or are declared by
`hpc_oialr.register_optimizer_state(MyOptimizer, {{"key": "gradient"}})`. State of unknown meaning, or with a shape
other than the weight's, raises an error before anything is changed.

## Refused at `OIALR(...)`

{INSTEAD}.""".splitlines()


def run_tests(ids: Iterable[str]) -> dict[str, list[str]]:
    """Outcomes of these tests and all their cases, by identifier without the case."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-n", "2", f"--junitxml={report}", "-W", "ignore::DeprecationWarning"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *ids], cwd=ROOT, check=False)
        outcomes: dict[str, list[str]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.attrib["classname"].replace(".", "/") + ".py"
            children = {child.tag for child in case}
            failed = bool(children & {"failure", "error"})
            outcome = "failed" if failed else "skipped" if "skipped" in children else "passed"
            outcomes.setdefault(f"{file}::{case.attrib['name']}", []).append(outcome)
        return outcomes


def result_of(test: str, outcomes: Mapping[str, list[str]]) -> str:
    """The worst outcome of a test's cases, or of a file's tests."""
    of_test = [key for key in outcomes if key == test or key.startswith((f"{test}[", f"{test}::"))]
    found = [outcome for key in of_test for outcome in outcomes[key]]
    return "failed" if not found or "failed" in found else "passed" if "passed" in found else "skipped"


def version(package: str) -> str:
    """Of an installed package."""
    name = {"pytorch_optimizer": "pytorch-optimizer"}.get(package, package)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def measured(earlier: Mapping[str, Row]) -> list[Row]:
    """A row for each optimizer and each wrapper."""
    tests = sorted({test for _, tests in WRAPPERS.values() for test in tests})
    outcomes = run_tests([OPTIMIZER_TEST, *tests])
    rows: list[Row] = []
    for name, kinds in OPTIMIZERS.items():
        row = {
            "optimizer": name,
            "state": dict(kinds),
            "result": result_of(f"{OPTIMIZER_TEST}[{name}]", outcomes),
        }
        row["version"] = version(name.partition(".")[0])
        if f"{OPTIMIZER_TEST}[{name}]" not in outcomes:
            row["result"] = "skipped"
        if row["result"] == "skipped" and earlier.get(name, {}).get("result") == "passed":
            row |= {"result": "passed", "version": earlier[name]["version"]}
        rows.append(row)
    for name, (how, tests_of) in WRAPPERS.items():
        results = {result_of(test, outcomes) for test in tests_of}
        worst = next(r for r in ("failed", "skipped", "passed") if r in results)
        rows.append({"wrapper": name, "how": how, "tests": list(tests_of), "result": worst})
    return rows


def summary(content: Mapping[str, Any]) -> str:
    """The README's tables: optimizers by library, and wrappers."""
    tested: dict[str, list[str]] = {}
    for row in content["rows"]:
        if "optimizer" in row and row["result"] == "passed":
            library, _, name = row["optimizer"].partition(".")
            tested.setdefault(f"{library} {row['version']}", []).append(name)
    lines = ["| library | tested | optimizers |", "| --- | --- | --- |"]
    lines += [f"| {library} | {len(names)} | {', '.join(names)} |" for library, names in tested.items()]
    lines += [f"| any library | refused: {len(REFUSED)} | {', '.join(REFUSED)} |"]
    return "\n".join([*lines, "", *_wrapper_lines(content["rows"])])


def _wrapper_lines(rows: Iterable[Row]) -> list[str]:
    lines = ["| what | support |", "| --- | --- |"]
    for row in (row for row in rows if "wrapper" in row):
        support = row["how"] if row["result"] == "passed" else row["result"].upper()
        lines.append(f"| {row['wrapper']} | {support} |")
    return lines


def page(content: Mapping[str, Any]) -> str:
    """``docs/support.md``."""
    rows = content["rows"]
    lines = [*_HEAD, "", "| optimizer | its state | tested with |", "| --- | --- | --- |"]
    for row in (row for row in rows if "optimizer" in row):
        state = ", ".join(f"`{key}` {kind}" for key, kind in row["state"].items()) or "reset at every change"
        if row["optimizer"] in FACTORED_OPTIMIZERS:
            state += ", means over rows and columns square"
        tested = (
            row["version"] if row["result"] == "passed" else "not tested" if row["result"] == "skipped" else "FAILED"
        )
        lines.append(f"| `{row['optimizer']}` | {state} | {tested} |")
    lines += [*_BETWEEN, "", "| optimizer | why: it ... |", "| --- | --- |"]
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    lines += [f"| {', '.join(names)} | {reason} |" for reason, names in reasons.items()]
    lines += ["", "## Wrappers and loops", "", *_wrapper_lines(rows)]
    return "\n".join([*lines, "", f"*torch {content['environment']['packages']['torch']}.*", ""])


def main() -> None:
    """Run, write, and end with 1 if a row failed."""
    old = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    if sys.argv[1:]:
        outcomes = run_tests(f"{OPTIMIZER_TEST}[{name}]" for name in sys.argv[1:])
        for row in old:
            if row.get("optimizer") in sys.argv[1:]:
                row["result"] = result_of(f"{OPTIMIZER_TEST}[{row['optimizer']}]", outcomes)
        rows = old
    else:
        rows = measured({row["optimizer"]: row for row in old if "optimizer" in row})
    content = {"rows": rows, "environment": environment_report()}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(content))
    readme.main([])
    failed = [row.get("optimizer") or row["wrapper"] for row in rows if row["result"] == "failed"]
    print(f"{RESULT}\n{PAGE}\nfailed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
