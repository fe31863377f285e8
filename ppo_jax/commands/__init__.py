"""The subcommands of `ppo-jax`: a dataclass each, whose fields are its options and whose `run` does the work."""
