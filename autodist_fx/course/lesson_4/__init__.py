"""Lesson 4: a whole Llama over tensor parallel ranks."""
