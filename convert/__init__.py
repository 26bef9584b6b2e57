"""PyTorch checkpoints into ours: a table of rules per checkpoint format and one strict engine."""
