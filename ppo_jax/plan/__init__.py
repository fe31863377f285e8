"""Predict what a PPO iteration costs in memory, arithmetic and communication, without running it.

* `memory`: an estimate of the memory of a PPO step, from the sizes of its arrays.
* `topology`: slices of TPUs that need not be attached to this machine.
* `compile`: a PPO iteration compiled for such a slice, and what each chip would hold and compute.
* `extrapolation`: the same for models too deep to compile here, from two shallower ones.
* `report`: the figures as text and JSON, and advice where a program does not fit.
* `account`: the time, collectives and memory traffic of a compiled program, from its text.
* `decoding`: the time of a decode step beside the least that its memory traffic takes.
* `hlo`: the operations in the text of a compiled program, and how often each runs.
* `traffic`: the bytes that an operation moves.
* `flops`: counts the arithmetic of matrix products in a traced function.
"""
