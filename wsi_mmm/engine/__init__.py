"""Who runs what, where: plans slides into works, hands works to an executor, publishes what comes back."""
