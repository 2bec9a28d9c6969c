"""The fast path of sampling. So far: schedulers as tables of numbers."""
