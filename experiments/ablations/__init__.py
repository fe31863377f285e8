"""Ablations of PPO methods over many seeds: critic, KL penalty, age of the answers, and groups.

    python -m experiments.ablations --study critic --out runs/critic

Each study trains small transformers from scratch on one task (`task.py`). All seeds of a variant
are one compiled program (`training.py`). The run's folder then holds `summary.json`, `table.md`,
`curves.npz` and `curves.png`. experiments/ablations.md has the results.
"""
