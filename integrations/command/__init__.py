"""The command line's train and demo."""
