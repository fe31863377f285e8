"""The subcommands of `ppo-jax`.

Each is a dataclass: its fields are the options, and `run` calls the library and prints.
"""
