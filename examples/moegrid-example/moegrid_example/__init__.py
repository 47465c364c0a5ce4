"""Names of its own for moegrid. `declarations` is what a plan reads; nodes import the code that it names."""
