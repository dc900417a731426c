"""The HTTP edge: it imports the rooms before it."""
