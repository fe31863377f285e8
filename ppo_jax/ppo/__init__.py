"""The compiled stages of a PPO iteration, and the losses of the training before it.

Read `iteration` first: it shows one iteration as `sample`, `score` and `learn`. `choices` lists the
estimators and losses that a setting can choose.
"""
