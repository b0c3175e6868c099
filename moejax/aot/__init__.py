"""What a TPU pod or a GPU host would do with a program, compiled here without one."""
