"""The built-in teacher, trained from scratch; if you have a teacher of your own, you do not need it."""
