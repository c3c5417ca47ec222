"""What the three command lines share: errors, signals of the system, the next command."""
