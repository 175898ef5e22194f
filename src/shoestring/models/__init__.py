"""Small plain models made of blocks, for training from scratch."""
