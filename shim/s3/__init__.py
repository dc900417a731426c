"""A small S3 client over the standard library that could be lifted out whole."""
