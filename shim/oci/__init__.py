"""Images: what their documents say, where they are kept; on http and aws."""
