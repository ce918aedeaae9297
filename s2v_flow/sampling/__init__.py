"""Schedules, solvers, noise and guidance: functions over one contract, `denoise(x, sigma) -> x0`."""
