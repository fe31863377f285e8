"""Pure functions of arrays that PPO is made of: log-probs, KL, rewards, advantages and losses."""
