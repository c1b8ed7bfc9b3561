"""Real images in: prepared sets by name, and seeded, sharded, resumable batches of them."""
