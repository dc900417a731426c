"""What would go wrong, found before it does: it imports the rooms before it."""
