"""The machine: devices, memory, progress, interruption, and what other packages need."""
