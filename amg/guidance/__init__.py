"""The method, free of any loop: terms, schedules of lambda, gates, free signals, captions of later tries."""
