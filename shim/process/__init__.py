"""The command from its start to the end of the last process that it left: it imports contract."""
