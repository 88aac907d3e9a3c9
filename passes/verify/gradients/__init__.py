"""Checks what backward passes owe, and which ranks add it up."""
