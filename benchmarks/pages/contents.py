"""The table of benchmarks/README.md: every result file, what it answers, and the command that makes it."""

from __future__ import annotations

import ast

from benchmarks.pages.tables import RESULTS, ROOT, load, table

# Commands whose name is not that of their result file.
COMMANDS = {
    "bases_conversion": "bases",
    "bases_windows": "bases --steps ...",
    "bases_h100": "cifar --size small --validation",
    "budgets": "budgets --times 1",
    "budgets_h100": "budgets --seeds 0 1",
    "budgets_trials": "budgets --trials",
    "cifar_h100": "cifar --epochs 40",
    "cifar_small": "cifar --size small",
    "engines": "worlds --settings ...",
    "engines_full": "worlds --settings ...",
    "engines_text": "worlds --recipe text_gpt ...",
    "gpu_nvidia_h100_80gb_hbm3": "gpu",
    "layer_avx2": "layer --dtypes float32",
    "rivals": "rivals --mode tune test",
    "rivals_cpu": "rivals --mode time",
    "stability_convnet": "stability",
    "stability_gpt": "stability",
    "stability_vit": "stability",
}


def contents() -> str:
    """One row a result file."""
    rows = []
    for name in sorted(path.stem for path in RESULTS.glob("*.json")):
        environment, command = load(name)["environment"], COMMANDS.get(name, name)
        gpus = environment.get("gpus") or []
        machine = gpus[0]["name"] if gpus else environment["machine"]["cpu"]
        asked = question(command.partition(" ")[0])
        rows.append((f"[`{name}`](results/{name}.json)", asked, f"`{command}`", machine, environment["date"][:10]))
    return table(("result", "question", "`python -m benchmarks.`", "machine", "date"), rows)


def question(module: str) -> str:
    """The first sentence of a benchmark's docstring."""
    folder = ROOT / "benchmarks"
    for path in (folder / f"{module}.py", folder / module / "__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) if path.exists() else None
        if text:
            return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".").replace("|", "/")
    raise FileNotFoundError(f"benchmarks/{module}: which command makes its result? Say so in COMMANDS.")
