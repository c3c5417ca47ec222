"""The four things that run at the same time: encode, forward, reduce, write."""
