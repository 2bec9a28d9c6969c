"""Other people's loops: `protect`, `AMGScheduler`, and how guidance reaches into them."""
