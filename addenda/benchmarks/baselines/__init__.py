"""Baselines that Addenda is compared with: the dense mask, fine-tuning and LoRA, and continual-learning methods."""
