"""Fine-tuning of time-series and video models by RL, on TRL's trainers (extra `rl`)."""
