"""What a run will need, before it begins: memory, messages and time on any number of nodes."""
