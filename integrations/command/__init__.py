"""What the command line runs: train and demo."""
