"""What `experiments.scaling` is made of: programs that are compiled, read, and reckoned with."""
