"""Evidence beyond the demo: what free signals detect, and whether the promise holds under attack."""
