"""What differs between model families: table, loading, inputs, pictures."""
