"""What the shim and the command say, as JSON lines: it imports nothing of ours but contract."""
