"""The compiled stages of a PPO iteration, and the losses of the training before it.

Read `iteration` first: it shows one iteration as `sample`, `score` and `learn`. `choices` lists the
estimators and losses that a setting can choose.

Where "score" and "loss" stand in a name: `scoring` computes log-probs, KL and values of responses;
`task_scores` turns what the reward returned into the scores that PPO optimizes; `loss` makes a loss
of parameters from the losses of arrays in `ppo_jax.ops`; `reward_model` and `sft` have the losses
of the training before PPO.
"""
