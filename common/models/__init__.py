"""Our own vision-language models: students, and teachers of the same families."""
