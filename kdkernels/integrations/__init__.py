"""Drop-in replacements for other projects' trainers. Import each module by name. It needs only its own host."""
