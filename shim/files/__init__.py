"""Files that others may write, reached by descriptor: it imports contract, log and process."""
