"""Reading and making preference data."""
