"""HTTP/1.1 as a client: it imports contract, process and files."""
