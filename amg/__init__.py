"""amg: sample from diffusion models without regurgitating their training set."""

__version__ = "0.1.0"
