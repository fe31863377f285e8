"""The stateful edge: assembling, training, checkpoints, resume, and the files of a run.

Start with `assembly` (a model becomes a `Learner`) and `trainer` (the loop).
"""
