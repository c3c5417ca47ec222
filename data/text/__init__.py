"""From a conversation to one training sequence, and back."""
