"""One file for each family of checkpoints: how to recognise it, what its config says, how it spells its tensors."""
