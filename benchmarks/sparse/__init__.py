"""The study of a bounded sparse backward, measured and left out: its README says why."""
