"""The public ops: check, plan, dispatch to a backend."""
