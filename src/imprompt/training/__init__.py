"""Making adapters: one configuration, a cache of everything frozen, and the loop (floor 4)."""
