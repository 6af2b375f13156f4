"""Language models scored from their last hidden states; ``fuse_lm_head``."""
