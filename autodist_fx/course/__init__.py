"""A course: five lessons in which the reader writes what the compiler does, each with tests that grade it."""
