"""What a call hands from layer to layer: its checked state, its checks, the loss table."""
