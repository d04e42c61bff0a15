"""The engine: plans slides into work units, runs the units on an executor, and publishes the results."""
