"""One copy of a model's weights per node, in memory; engines of every TP degree map their slices of it.

`plan` says where things lie (pure), `fill` writes the file, `store` is the process that owns and describes
it, `transport` maps it in engines.
"""
