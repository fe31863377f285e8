"""The language models that PPO trains: one decoder for all families, and what is built on it.

Read `transformer` first; it defines the decoder and `language_model`, the pure functions that the
rest of the package uses. The other modules are:

- `config`: `TransformerConfig`, with a switch for everything in which model families differ.
- `layers`: a block and its parts: linear layers, norms, attention and the MLP.
- `layer_loop`: a loop over the layers, with which large models compile faster for a TPU.
- `rounding`: where activations are rounded, so that compiled programs agree bit for bit.
- `heads`: critics and reward models.
- `lora`: low-rank adapters, with their settings in `lora_settings`.
- `sizes`: configurations of published model sizes.
- `io`: reading and writing checkpoints of `transformers`, GGUF files and adapters of PEFT.

A new model family is one file in `io/families`, which maps its config and the names of its tensors
to those of the decoder; the README there explains how. How parameters are sharded over devices is
in `ppo_jax.sharding`.
"""
