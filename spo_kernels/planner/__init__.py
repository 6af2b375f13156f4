"""Pure functions from sizes and a byte budget to what an op runs."""
