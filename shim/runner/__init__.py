"""The use cases, one task and the runtime around tasks: it imports the rooms before it."""
