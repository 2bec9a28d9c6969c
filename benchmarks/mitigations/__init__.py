"""Rival mitigations of memorisation on any diffusers Stable Diffusion, behind one interface, `Mitigation`.

Each family has its file; README.md has the equations, the sources and what was simplified.
"""
