"""One module a verb: it imports every room."""
