"""What was agreed with platforms, as values: it imports nothing of the package."""
