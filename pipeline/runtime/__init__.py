"""The machine: devices, memory, threads, progress, requests to stop, and workarounds for other packages."""
