"""PPO fine-tuning (RLHF) of GPT-style language models in JAX and Flax, as functions to import.

Start with `sample`, `score` and `learn`, the three steps of a PPO iteration, or with `Trainer`,
which runs them in a loop. `__init__.pyi` lists all public names by topic; each is imported from its
module when it is first used. Shapes in docstrings use the axes that `ppo_jax.types` lists.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
