"""The subcommands of `ppo-jax`.

Each subcommand is a dataclass whose fields are its options. Its method `run` calls the library and
prints the result. The modules of the options do not import JAX, so that help and errors about
arguments appear quickly; `run` imports what the command does, which stands in a module of its own
if it is long:

| options | what the command does |
|---|---|
| `train` | `training`, `learner` |
| `evaluation` | `evaluating` |
| `inference` | `sampling` |
| `runs` | `replaying` |
| `convert` | `conversion` |

`parsing` turns the arguments into a command. `command_line` says which options have a short name
and which ones `--help` shows, `config_files` reads settings from files, and `dry_run` reports what
a command would do.
"""
