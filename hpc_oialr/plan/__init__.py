"""Memory, traffic and time of a run on any number of nodes, before it starts."""
