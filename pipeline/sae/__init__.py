"""The finished SAE: its activation functions, its format on disk, finding and exporting it."""
