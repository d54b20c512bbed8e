"""The trainer: step, loop, optimizer, averages, health, metrics, routing log."""
