"""`amg ...`: a file a command."""
