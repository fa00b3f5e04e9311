"""Diffusion: noise schedules (schedules.py) and samplers as coefficient tables (samplers.py)."""
