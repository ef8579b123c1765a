"""The model card of an export: what the run reached and cost, and how the files are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_oialr.lowrank import low_rank_layers
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.serve.trained import Trained
from hpc_oialr.system_errors import read_json

# The Hub's name of a task, by that of this package.
TASKS = {
    "Classification": "image-classification",
    "TextClassification": "text-classification",
    "LanguageModelling": "text-generation",
    "Forecasting": "time-series-forecasting",
}


def write_card(trained: Trained, folder: Path, difference: Mapping[str, Any]) -> None:
    """Write ``README.md`` with the Hub's metadata; ``difference`` as in ``export.json``. No network is needed."""
    text = f"---\n{_metadata(trained)}\n---\n\n{_text(trained, difference)}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _metadata(trained: Trained) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    summary, task = _summary(trained), TASKS.get(type(trained.config.task).__name__)
    data = type(trained.config.data).__name__
    results = None
    if summary and task:
        results = [
            EvalResult(
                task_type=task,
                dataset_type=data.lower(),
                dataset_name=data,
                dataset_split=summary["metric_name"].partition("_")[0],
                metric_type=trained.config.task.metric,
                metric_value=summary["metric"],
            )
        ]
    stock = type(trained.model).__module__.startswith("transformers.")
    card = ModelCardData(
        library_name="transformers" if stock else "hpc_oialr",
        pipeline_tag=task,
        tags=["low-rank", "oialr", "hpc_oialr"],
        model_name=trained.run.resolve().name if results else None,
        eval_results=results,
    )
    return card.to_yaml()


def _summary(trained: Trained) -> dict[str, Any]:
    """``summary.json`` of the run, if it has ended with this checkpoint; empty otherwise."""
    folder = RunFolder(trained.run)
    summary: dict[str, Any] = folder.read_summary() if folder.finished else {}
    return summary if summary.get("steps") == trained.step else {}


def _text(trained: Trained, difference: Mapping[str, Any]) -> str:
    name, model = trained.run.resolve().name, type(trained.model).__name__
    layers = low_rank_layers(trained.model)
    method = "OIALR ([arXiv 2401.08505](https://arxiv.org/abs/2401.08505))" if layers else "dense training"
    parts = [
        f"# {name}",
        f"A `{model}`, trained on `{type(trained.config.data).__name__}` by {method} with hpc_oialr, step "
        f"{trained.step:,}.",
        *_results(trained),
        *_usage(model, difference, stock=type(trained.model).__module__.startswith("transformers.")),
    ]
    if layers:
        rows = [(f"`{each}`", f"{x.m} x {x.n}", str(x.r), f"{x.r / x.k:.1%}") for each, x in layers.items()]
        parts += ["## Inner dimensions", _table(("layer", "weight", "r", "of k = min(m, n)"), rows)]
    parts += ["## Environment", _table(("", ""), _environment(trained))]
    return "\n\n".join(parts) + "\n"


def _results(trained: Trained) -> Iterator[str]:
    summary = _summary(trained)
    yield "## Results"
    if not summary:
        yield "The run had not ended at this step: it has no result yet."
        return
    accuracy = summary["metric_name"].endswith("accuracy")
    metric = f"{100 * summary['metric']:.2f} %" if accuracy else f"{summary['metric']:.4f}"
    share = summary["trainable_params"] / summary["dense_trainable_params"]
    rows = [
        (summary["metric_name"].replace("_", " "), metric),
        ("trained parameters at the end", f"{summary['trainable_params']:,} ({share:.1%} of the dense model's)"),
        ("training time", f"{summary['wall_s']:,.1f} s on {summary['world_size']} process(es)"),
        ("of which updates of the bases", f"{summary['update_wall_s']:.2f} s"),
        ("peak memory of all tensors", f"{1024 * summary['peak_memory_gib']:,.1f} MiB"),
        ("steps", f"{summary['steps']:,}"),
        ("seed", str(summary["seed"])),
    ]
    yield _table(("", ""), rows)


def _usage(model: str, difference: Mapping[str, Any], *, stock: bool) -> Iterator[str]:
    dense = f'from transformers import {model}\n\nmodel = {model}.from_pretrained("FOLDER")  # dense\n'
    factored = 'from hpc_oialr import load_factored\n\nmodel = load_factored("FOLDER")  # two thin layers\n'
    yield "## Use"
    yield "\n".join(f"```python\n{code}```" for code in (*([dense] if stock else []), factored))
    yield (
        f"Outputs of the factored model differ from those of the trained one by at most {difference['relative']:.1e} of "
        f"the largest output, for {difference['samples']} random inputs."
    )


def _environment(trained: Trained) -> list[tuple[str, str]]:
    path = RunFolder(trained.run).environment
    report: dict[str, Any] = read_json(path) if path.exists() else {}
    packages, machine = report.get("packages") or {}, report.get("machine") or {}
    gpus = ", ".join(gpu["name"] for gpu in report.get("gpus") or ())
    known = {
        "date": report.get("date"),
        "processor": machine.get("cpu") and f"{machine['cpu']}, {machine.get('cores')} cores",
        "GPUs": gpus,
        "Python": report.get("python"),
        **{name: packages.get(name) for name in ("hpc_oialr", "torch", "transformers", "numpy")},
        "commit": (report.get("git") or {}).get("commit"),
    }
    return [(name, str(value)) for name, value in known.items() if value]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
