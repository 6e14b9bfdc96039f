"""What a server gives under load."""
