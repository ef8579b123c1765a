"""Leading singular functions and eigenfunctions of operators by neural networks (NestedLoRA)."""
