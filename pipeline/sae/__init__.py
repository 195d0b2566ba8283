"""What is trained and used: the finished SAE and its formats."""
