"""Tables of the README and of docs, each from a committed result file."""
