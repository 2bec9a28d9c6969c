"""What is known of diffusers' pipelines: denoiser, conditions, safety checker, identity."""
