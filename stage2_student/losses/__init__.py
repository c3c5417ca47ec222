"""What the student learns from: pure functions, and the objective that wires them."""
