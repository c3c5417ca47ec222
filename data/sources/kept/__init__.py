"""What was found out about large files of data once, kept for later runs and other processes, and shared by them."""
