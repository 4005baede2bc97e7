"""What several tests need: disks that fail or remember, small checkpoints, two ranks."""
