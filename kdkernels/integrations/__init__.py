"""Drop-in replacements inside other projects' trainers. Each module is imported by name and needs only its own host."""
