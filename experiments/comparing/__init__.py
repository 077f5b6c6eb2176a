"""What is compared (`subject`), who attacks it (`sides`), and the comparisons of `compare`."""
