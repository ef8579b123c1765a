"""OIALR inside other libraries' loops: Accelerate, transformers' ``Trainer``, Lightning; each imports its library."""
