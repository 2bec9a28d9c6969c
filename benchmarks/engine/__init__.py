"""What the engine costs beside plain diffusers, and how near its pictures are."""
