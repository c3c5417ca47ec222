"""What the cache lost against its teacher, and the card that says so."""
