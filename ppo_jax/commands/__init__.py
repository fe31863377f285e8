"""The subcommands of `ppo-jax`.

Each subcommand is a dataclass whose fields are its options. Its method `run` calls the library and
prints the result.
"""
