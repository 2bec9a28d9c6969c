"""The end-to-end latency harness: models, contestants, what is counted, and what the tables say."""
