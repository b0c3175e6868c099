"""Commands: flags become frozen configs, and one library call does the work."""
