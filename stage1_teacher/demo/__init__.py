"""The built-in teacher, trained from nothing; nobody with a teacher of their own needs it."""
